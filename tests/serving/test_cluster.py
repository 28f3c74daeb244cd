"""The engine on a Ray cluster without a cluster: what it does when replicas answer, die, and are stopped."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from openwu.errors import OpenwuError
from openwu.serving.engines import ModelInfo, ModelSource, Outcome, Report, Task
from openwu.serving.engines import cluster as engine_module
from openwu.serving.engines.cluster import ClusterOptions, EditReplica, RayEngine, deployment, join_cluster
from openwu.serving.errors import STOPPED, Failure, WorkerLostError

pytest.importorskip("ray")
TASK = Task("one", "ann")
DONE = [Outcome(b"picture")]
Script = Callable[[], AsyncIterator[tuple[str, Any]]]


class Response:
    """What a handle answers with: events of a script."""

    def __init__(self, script: Script) -> None:
        self._events = script()
        self._cancelled = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[tuple[str, Any]]:
        from ray.serve.exceptions import RequestCancelledError

        while True:
            following = asyncio.ensure_future(anext(self._events))
            cancelled = asyncio.ensure_future(self._cancelled.wait())
            await asyncio.wait({following, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            cancelled.cancel()
            if not following.done():
                following.cancel()
                raise RequestCancelledError
            try:
                yield following.result()
            except StopAsyncIteration:
                return

    def cancel(self) -> None:
        self._cancelled.set()


class Handle:
    """A deployment's handle whose calls follow one script each."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.calls: list[Sequence[Task]] = []
        self.run = self.info = self

    def options(self, **_: object) -> Handle:
        return self

    def remote(self, *arguments: Any) -> Any:
        if not arguments:
            return self._info()
        self.calls.append(arguments[0])
        return Response(self._scripts.pop(0))

    async def _info(self) -> ModelInfo:
        return ModelInfo("stub")


async def good() -> AsyncIterator[tuple[str, Any]]:
    yield "begun", None
    yield "progress", ("one", 1, 2)
    yield "done", DONE


async def dies_first() -> AsyncIterator[tuple[str, Any]]:
    from ray.exceptions import ActorDiedError

    raise ActorDiedError
    yield


async def dies_later() -> AsyncIterator[tuple[str, Any]]:
    from ray.exceptions import ActorDiedError

    yield "begun", None
    raise ActorDiedError


async def hangs() -> AsyncIterator[tuple[str, Any]]:
    yield "begun", None
    await asyncio.sleep(60)


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replicas run, as the cluster's controller would say."""
    running = [2]
    monkeypatch.setattr(engine_module, "running_replicas", lambda _: running[0])
    monkeypatch.setattr(engine_module, "LOOK_SECONDS", 0.01)
    return running


def submitted(handle: Handle, report: Report = lambda *_: None, then: Callable[[RayEngine], None] | None = None) -> Any:
    async def run() -> Any:
        engine = RayEngine(lambda: handle, lambda: None, "app")  # type: ignore[arg-type,return-value]
        await engine.start()
        try:
            assert engine.info.name == "stub"
            waiting = asyncio.ensure_future(engine.submit([TASK], report))
            if then is not None:
                await asyncio.sleep(0.05)
                then(engine)
            return await waiting
        finally:
            await engine.stop()

    return asyncio.run(run())


def test_outcomes_and_progress_arrive(replicas: list[int]) -> None:
    told: list[tuple[str, int, int]] = []
    assert submitted(Handle(good), lambda *each: told.append(each)) == DONE
    assert told == [("one", 1, 2)]


def test_a_batch_that_no_replica_has_begun_is_offered_again(replicas: list[int]) -> None:
    handle = Handle(dies_first, dies_first, good)
    assert submitted(handle) == DONE
    assert len(handle.calls) == 3


def test_a_batch_that_was_begun_is_lost_with_its_replica(replicas: list[int]) -> None:
    handle = Handle(dies_later, good)
    with pytest.raises(WorkerLostError, match="ActorDiedError"):
        submitted(handle)
    assert len(handle.calls) == 1


def test_a_cancelled_batch_is_stopped_in_the_cluster(replicas: list[int]) -> None:
    assert submitted(Handle(hangs), then=lambda engine: engine.cancel("one")) == [STOPPED]


def test_capacity_and_health_follow_the_replicas(replicas: list[int]) -> None:
    async def run() -> None:
        engine = RayEngine(lambda: Handle(), lambda: None, "app")  # type: ignore[arg-type,return-value]
        assert not engine.health().ready
        await engine.start()
        assert (engine.capacity, engine.health().workers) == (4, 2)
        replicas[0] = 0
        while engine.health().ready:
            await asyncio.sleep(0.01)
        assert engine.capacity == 2
        assert "no replica runs" in engine.health().reason
        await engine.stop()

    asyncio.run(asyncio.wait_for(run(), 30))


class Worker:
    """Stands for an EditWorker: works until it is stopped, or answers at once."""

    def __init__(self, endless: bool) -> None:
        self._endless = endless
        self.ended = Event()

    def run(self, tasks: Sequence[Task], report: Report, stopped: Callable[[str], bool]) -> list[Outcome | Failure]:
        del tasks
        report("one", 1, 2)
        while self._endless and not stopped("one"):
            pass
        self.ended.set()
        return [STOPPED] if self._endless else list(DONE)


def replica(worker: Worker) -> EditReplica:
    made = EditReplica.__new__(EditReplica)
    made._worker, made._thread = worker, ThreadPoolExecutor(1)  # type: ignore[assignment]
    return made


def test_a_replica_streams_what_its_worker_does() -> None:
    async def run() -> list[tuple[str, Any]]:
        return [event async for event in replica(Worker(endless=False)).run([TASK])]

    assert asyncio.run(run()) == [("begun", None), ("progress", ("one", 1, 2)), ("done", DONE)]


def test_a_replica_whose_caller_leaves_stops_its_worker_before_it_takes_another() -> None:
    worker = Worker(endless=True)

    async def run() -> None:
        events = replica(worker).run([TASK])
        assert [await anext(events), await anext(events)] == [("begun", None), ("progress", ("one", 1, 2))]
        await events.aclose()  # type: ignore[attr-defined]
        assert worker.ended.is_set()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(OpenwuError, match="expected at least the 3 replicas, got 2"):
        deployment(ModelSource(), ClusterOptions(replicas=3, max_replicas=2))


def test_a_configuration_of_the_whole_service_is_checked() -> None:
    from openwu.serving.deployment import application

    with pytest.raises(OpenwuError, match="expected keys"):
        application({})
    with pytest.raises(OpenwuError, match="got replica_count"):
        application({"keys": "keys", "replica_count": 2})


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_the_deployment_files_are_accepted(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    from openwu.serving.deployment import application

    found = yaml.safe_load((Path(__file__).parents[2] / "deploy" / name).read_text())
    served = found if name == "serve.yaml" else yaml.safe_load(found["spec"]["serveConfigV2"])
    (app,) = served["applications"]
    assert app["import_path"] == f"{application.__module__}:{application.__name__}"
    assert application(app["args"])._bound_deployment.name == "front"


def test_an_address_at_which_no_cluster_listens_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "no-such-host.invalid:6379", "127.0.0.1:99999"):
        with pytest.raises(OpenwuError, match="expected a Ray cluster at"):
            join_cluster(address)
