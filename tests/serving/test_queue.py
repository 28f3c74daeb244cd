"""The fair queue over an engine that sleeps: order, admission, batches, cancellation, retries."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from serving_clients import SleepingEngine

from openwu.serving.engines import Task
from openwu.serving.errors import ServiceError
from openwu.serving.metrics import Metrics
from openwu.serving.queue import FairQueue, Job, Limits, Scheduler


def task(name: str, tenant: str = "a", cost: float = 1.0, key: object = None) -> Task:
    return Task(name, tenant, instruction=name, cost=cost, batch_key=key)  # type: ignore[arg-type]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def scheduler(engine: SleepingEngine, **limits: Any) -> Scheduler:
    return Scheduler(engine, Limits(**limits), Metrics())


def order(queue: FairQueue, most: int = 1) -> list[list[str]]:
    batches = []
    while batch := queue.pop(most):
        batches.append([job.task.id for job in batch])
    return batches


def filled(*tasks: Task) -> FairQueue:
    async def fill() -> FairQueue:
        queue = FairQueue()
        for each in tasks:
            queue.push(Job(each, asyncio.get_running_loop().create_future()))
        return queue

    found: FairQueue = run(fill())
    return found


def test_a_flood_delays_another_key_by_one_job() -> None:
    queue = filled(*[task(f"a{i}") for i in range(50)], task("b0", "b"))
    assert "b0" in [batch[0] for batch in order(queue)][:2]


def test_turns_are_by_cost_not_by_count() -> None:
    queue = filled(*[task(f"a{i}", "a", 4.0) for i in range(3)], *[task(f"b{i}", "b", 1.0) for i in range(12)])
    first = [batch[0] for batch in order(queue)][:10]
    assert sum(name[0] == "b" for name in first) == 8  # two large ones, eight small ones: as much work


def test_a_batch_mixes_keys_and_adapters_but_not_shapes() -> None:
    queue = filled(
        task("a0", key=1), task("a1", key=1), task("b0", "b", key=1), task("c0", "c", key=2), task("d0", "d")
    )
    batches = order(queue, most=3)
    assert sorted(map(sorted, batches)) == [["a0", "a1", "b0"], ["c0"], ["d0"]]
    assert queue.cost == 0
    assert len(queue) == 0


def test_too_much_work_is_refused_with_a_time() -> None:
    async def full() -> tuple[str, float | None, str]:
        own = scheduler(SleepingEngine(5.0), queue_seconds=4.0, key_seconds=2.0)
        for number in range(3):
            own.submit(task(f"a{number}"))  # one runs, two wait
        with pytest.raises(ServiceError) as rate:
            own.admit([task("a3")])
        own.admit([task("b0", "b")])
        own.submit(task("b0", "b"))
        with pytest.raises(ServiceError) as queue:
            own.admit([task("c0", "c", 2.0)])
        return rate.value.failure.code, queue.value.failure.retry_after, queue.value.failure.code

    code, wait, other = run(full())
    assert (code, other) == ("rate_limited", "queue_full")
    assert wait == pytest.approx(3.0)


def test_a_queued_job_is_dropped_and_a_running_one_stopped() -> None:
    async def left() -> None:
        engine = SleepingEngine(10.0)
        own = scheduler(engine)
        running, waiting = own.submit(task("a0")), own.submit(task("a1"))
        waits = [asyncio.ensure_future(own.result(job)) for job in (running, waiting)]
        await asyncio.sleep(0.01)
        assert own.position(waiting) == 1
        for each in waits:
            each.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        assert engine.stopped == ["a0"]
        assert len(own.queue) == 0

    run(left())


def test_a_dead_worker_costs_one_retry_and_not_two() -> None:
    async def died(deaths: int) -> Any:
        engine = SleepingEngine(deaths=deaths)
        own = scheduler(engine)
        return await own.result(own.submit(task("a0"))), len(engine.batches)

    outcome, batches = run(died(1))
    assert outcome.data == b"a0"
    assert batches == 2
    with pytest.raises(ServiceError) as error:
        run(died(2))
    assert error.value.failure.status == 500
    assert not error.value.failure.retryable


def test_a_request_that_takes_too_long_is_stopped() -> None:
    async def late() -> list[str]:
        engine = SleepingEngine(1.0)
        own = scheduler(engine, request_seconds=0.05)
        with pytest.raises(ServiceError) as error:
            await own.result(own.submit(task("a0")))
        assert error.value.failure.status == 504
        return engine.stopped

    assert run(late()) == ["a0"]


def test_overload_is_answered_with_200_and_429_and_the_worker_is_never_idle() -> None:
    async def overload() -> tuple[int, int, float, float]:
        engine = SleepingEngine(0.01)
        own = scheduler(engine, queue_seconds=0.2, key_seconds=0.2)
        own.seconds_per_unit = 0.01
        served = refused = 0

        async def one(name: str) -> None:
            nonlocal served, refused
            try:
                own.admit([task(name, f"key{name[-1]}")])
            except ServiceError as error:
                refused += error.failure.status == 429
            else:
                await own.result(own.submit(task(name, f"key{name[-1]}")))
                served += 1

        began = asyncio.get_running_loop().time()
        clients = []
        for number in range(1000):
            clients.append(asyncio.ensure_future(one(str(number))))
            await asyncio.sleep(0.001)
        await asyncio.gather(*clients)
        return served, refused, engine.busy, asyncio.get_running_loop().time() - began

    served, refused, busy, seconds = run(overload())
    assert served + refused == 1000
    assert refused > 0
    assert served > 0
    assert busy > 0.7 * seconds
