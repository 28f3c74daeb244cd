"""Run tasks on a Ray cluster: replicas of a Ray Serve deployment, each with an Editor, on one machine or on many."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openwu.errors import OpenwuError
from openwu.extras import library
from openwu.serving.engines import CACHE_BYTES, Engine, Health, ModelInfo, ModelSource, Outcome, Report, Task
from openwu.serving.engines.processes import REPORT_SECONDS, limit_memory
from openwu.serving.errors import STOPPED, Failure, WorkerLostError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

DEPLOYMENT = "editors"
WINDOW = 2
"""Batches that are handed over for each replica: one that runs and one that waits, from which Ray sees that more
replicas are needed. All others wait in the fair queue."""
LOOK_SECONDS = 1.0
"""Time between two looks at how many replicas run."""
REACH_SECONDS = 10.0
"""How long the address of a cluster has to answer."""
ROUTE_SECONDS = 60.0
"""How long a batch that no replica has begun is offered again while replicas and nodes die."""
log = logging.getLogger("openwu.serving")


@dataclass(frozen=True)
class ClusterOptions:
    """Where the replicas run, and how many."""

    address: str | None = None
    """Of the cluster; None or "auto": RAY_ADDRESS, or the cluster that this machine is in, or a new one here."""
    replicas: int = 1
    max_replicas: int | None = None
    """Under load, Ray starts up to so many; None: always `replicas`."""
    idle_seconds: float = 600.0
    """How long fewer replicas must have been enough before Ray takes one back."""
    threads: int = 1
    """CPUs of a replica."""
    gpus: float = 0.0
    """GPUs of a replica; a part of one is shared."""
    batch: int | None = None
    memory_bytes: int | None = 4 * 2**30
    """What a replica on a CPU may take beyond its loaded model; None: no limit."""
    cache_bytes: int = CACHE_BYTES
    """Of each key's adapter cache in each replica."""


class EditReplica:
    """The deployment: one Editor in a process of its own."""

    def __init__(self, source: ModelSource, options: ClusterOptions) -> None:
        """Load the model and make a warm edit."""
        import torch

        from openwu.serving.engines.worker import EditWorker, load

        torch.set_num_threads(options.threads)
        self._worker = EditWorker(load(source), options.batch, options.cache_bytes)
        self._info = self._worker.warm()
        self._thread = ThreadPoolExecutor(1, "openwu-edit")
        if options.memory_bytes is not None and self._worker.on_cpu:
            limit_memory(options.memory_bytes)

    async def info(self) -> ModelInfo:
        """Return what is loaded."""
        return self._info

    async def run(self, tasks: Sequence[Task]) -> AsyncIterator[tuple[str, Any]]:
        """Run a batch: yield `("begun", None)`, `("progress", (task, done, total))` and last `("done", outcomes)`.

        A caller that cancels stops the batch at its next tile or step; the replica is busy until then.
        """
        yield "begun", None
        loop, events, stop = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]](), threading.Event()
        told: dict[str, float] = {}

        def report(task: str, done: int, total: int) -> None:
            if time.monotonic() - told.get(task, 0.0) >= REPORT_SECONDS:
                told[task] = time.monotonic()
                loop.call_soon_threadsafe(events.put_nowait, ("progress", (task, done, total)))

        running = loop.run_in_executor(self._thread, self._worker.run, tasks, report, lambda _: stop.is_set())
        running.add_done_callback(lambda _: events.put_nowait(("done", None)))
        try:
            while (event := await events.get())[0] != "done":
                yield event
            yield "done", running.result()
        finally:
            stop.set()
            if not running.done():
                await asyncio.wait({running})


def deployment(source: ModelSource, options: ClusterOptions) -> Any:
    """Return the application of Ray Serve that consists of the replicas. Raises OpenwuError without Ray."""
    serve = library("ray.serve", "ray")
    most = options.max_replicas or options.replicas
    if most < options.replicas:
        raise OpenwuError(f"max_replicas: expected at least the {options.replicas} replicas, got {most}")
    scaling = {
        "min_replicas": options.replicas,
        "max_replicas": most,
        "target_ongoing_requests": 1,
        "downscale_delay_s": options.idle_seconds,
    }
    made = serve.deployment(EditReplica).options(
        name=DEPLOYMENT,
        max_ongoing_requests=1,
        # A number, or bounds between which Ray chooses by the batches that run and wait.
        **({"num_replicas": most} if most == options.replicas else {"autoscaling_config": scaling}),
        ray_actor_options={"num_cpus": options.threads, "num_gpus": options.gpus},
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=30.0,
    )
    return made.bind(source, options)


class RayEngine(Engine):
    """Hands batches to the replicas; one whose replica or node dies raises WorkerLostError, and is run once more."""

    def __init__(self, connect: Callable[[], DeploymentHandle], disconnect: Callable[[], None], app: str) -> None:
        """`connect`: returns a handle on the running deployment; it and `disconnect` may take their time.

        `app`: name of the application of Ray Serve that the deployment belongs to.
        """
        self._connect, self._disconnect, self._app = connect, disconnect, app
        self._handle: DeploymentHandle | None = None
        self._info: ModelInfo | None = None
        self._running: dict[str, _Running] = {}
        """Task -> its batch."""
        self._replicas, self._lost, self._reason = 0, 0, "the replicas are loading the model"
        self._watcher: asyncio.Task[None] | None = None

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "start() first"
        return self._info

    @property
    def capacity(self) -> int:
        return WINDOW * max(1, self._replicas)

    async def start(self) -> None:
        handle: DeploymentHandle = await asyncio.to_thread(self._connect)
        self._handle = handle
        try:
            self._info = await handle.info.remote()
            await self._look()
        except BaseException:
            await asyncio.to_thread(self._disconnect)
            raise
        self._watcher = asyncio.create_task(self._watch())

    async def submit(self, tasks: Sequence[Task], report: Report) -> list[Outcome | Failure]:
        from ray.exceptions import RayError, TaskCancelledError
        from ray.serve.exceptions import RayServeException

        assert self._handle is not None, "start() first"
        end = time.monotonic() + ROUTE_SECONDS
        while True:
            running = _Running(self._handle.options(stream=True).run.remote(list(tasks)), {task.id for task in tasks})
            self._running |= dict.fromkeys(running.waiting, running)
            try:
                return await running.outcomes(report)
            except TaskCancelledError as error:
                if not running.waiting:
                    return [STOPPED for _ in tasks]
                raise self._lose(error) from error
            except (RayError, RayServeException) as error:
                if not running.waiting:
                    return [STOPPED for _ in tasks]
                if running.begun or time.monotonic() > end:
                    raise self._lose(error) from error
                log.warning("a batch is offered again: %s", type(error).__name__)
                await asyncio.sleep(0.2)
            finally:
                for task in tasks:
                    self._running.pop(task.id, None)

    def cancel(self, task: str) -> None:
        running = self._running.get(task)
        if running is not None:
            running.cancel(task)

    def health(self) -> Health:
        return Health(self._info is not None and self._replicas > 0, self._reason, self._replicas, self._lost)

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        if self._handle is not None:
            await asyncio.to_thread(self._disconnect)

    def _lose(self, error: BaseException) -> WorkerLostError:
        self._lost += 1
        return WorkerLostError(type(error).__name__)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """Count the replicas that run."""
        try:
            self._replicas = await asyncio.to_thread(running_replicas, self._app)
            self._reason = "" if self._replicas else "no replica runs; Ray is starting them again"
        except Exception as error:  # whatever a cluster without its head answers
            self._replicas, self._reason = 0, f"the Ray cluster does not answer ({type(error).__name__})"


class _Running:
    """A batch on its way through the cluster."""

    def __init__(self, response: DeploymentResponseGenerator[Any], tasks: set[str]) -> None:
        self._response = response
        self.waiting = tasks
        """Tasks that somebody still waits for."""
        self.begun = False

    async def outcomes(self, report: Report) -> list[Outcome | Failure]:
        async for kind, value in self._response:
            self.begun = True
            if kind == "progress":
                report(*value)
            elif kind == "done":
                found: list[Outcome | Failure] = value
                return found
        raise WorkerLostError("the replica ended without a result")

    def cancel(self, task: str) -> None:
        self.waiting.discard(task)
        if not self.waiting:
            self._response.cancel()


def running_replicas(app: str) -> int:
    """Return how many replicas of an application run. Asks the cluster's controller."""
    from ray import serve

    found = serve.status().applications.get(app)
    editors = None if found is None else found.deployments.get(DEPLOYMENT)
    return 0 if editors is None else sum(n for state, n in editors.replica_states.items() if str(state) == "RUNNING")


def cluster_engine(source: ModelSource, options: ClusterOptions, app: str = "openwu") -> RayEngine:
    """Return an engine that deploys its replicas when it starts, and takes them back when it stops.

    Its `start` raises OpenwuError where no cluster answers and where the replicas cannot load the model.
    """
    application = deployment(source, options)

    def connect() -> DeploymentHandle:
        join_cluster(options.address)
        from ray import serve

        try:
            serve.start(proxy_location="Disabled")
            handle: DeploymentHandle = serve.run(application, name=app, route_prefix=None)
        except RuntimeError as error:
            disconnect()
            raise OpenwuError(f"the replicas could not start: {error}; the logs under /tmp/ray say why") from error
        return handle

    def disconnect() -> None:
        import ray
        from ray import serve

        with suppress(Exception):  # a cluster that is gone holds nothing to take back
            serve.delete(app)
        ray.shutdown()

    return RayEngine(connect, disconnect, app)


def join_cluster(address: str | None) -> None:
    """Join a Ray cluster as `ClusterOptions.address` says. Raises OpenwuError where none answers."""
    ray = library("ray", "ray")
    from ray.exceptions import RayError

    _check_reached(address)
    # In the main thread, Ray takes SIGTERM for itself.
    ours = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=None if address == "auto" else address,
            namespace="openwu",
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        hint = (
            "start one with `ray start --head`, or leave the address out; one with a token needs RAY_AUTH_MODE=token "
            "and the token here too (docs/serving.md)"
        )
        raise OpenwuError(f"--ray: expected a Ray cluster at {address or 'this machine'}: {error}; {hint}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def _check_reached(address: str | None) -> None:
    """Raise OpenwuError where nothing listens at HOST:PORT; Ray would go on trying for many minutes, without a word."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        hint = "check the address and the firewall, or start a cluster there with `ray start --head`"
        raise OpenwuError(f"--ray: expected a Ray cluster at {address}: {error}; {hint}") from error
