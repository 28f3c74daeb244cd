"""A fair queue over an engine: deficit round robin between API keys by cost, admission in seconds of work.

A key that floods the queue delays another key by one batch and its own turns, never by its whole backlog.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from openwu.serving.engines import Engine, Outcome, Task
from openwu.serving.errors import Failure, ServiceError, WorkerLostError, refused
from openwu.serving.metrics import Metrics

ATTEMPTS = 2
"""An edit is a pure function of request and seed, so one whose worker died is run once more."""

HOPELESS = 3.0
"""Work that is estimated to take so many times the longest time to answer is refused at once. The margin is for the
estimate: of small pictures, which a speed may have been learnt from, a megapixel takes longer."""


@dataclass(eq=False)
class Job:
    """A task on its way."""

    task: Task
    result: asyncio.Future[Outcome]
    tell: Callable[[int, int], None] | None = None
    """Called with (parts done, parts in all) while it runs."""
    queued: float = field(default_factory=time.monotonic)
    started: float | None = None
    attempts: int = 0


class FairQueue:
    """Jobs of several keys; `pop` takes turns between the keys by the cost of what they were served."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, deque[Job]] = OrderedDict()
        """The keys that wait, the one whose turn it is first."""
        self._deficits: dict[str, float] = {}
        self.cost = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def cost_of(self, tenant: str) -> float:
        """Return the queued cost of one key."""
        return sum(job.task.cost for job in self._jobs.get(tenant, ()))

    def push(self, job: Job, *, first: bool = False) -> None:
        """Add a job behind its key's others, or before them."""
        jobs = self._jobs.setdefault(job.task.tenant, deque())
        self._deficits.setdefault(job.task.tenant, 0.0)
        (jobs.appendleft if first else jobs.append)(job)
        self.cost += job.task.cost

    def remove(self, job: Job) -> bool:
        """Take a job out; False where it is not here any more."""
        jobs = self._jobs.get(job.task.tenant)
        if jobs is None or job not in jobs:
            return False
        jobs.remove(job)
        self._left(job)
        return True

    def pop(self, most: int = 1) -> list[Job]:
        """Return the next job, and others that may share its pass, at most `most` in all; empty for an empty queue."""
        if not self._jobs:
            return []
        quantum = max(jobs[0].task.cost for jobs in self._jobs.values())
        while True:
            tenant, jobs = next(iter(self._jobs.items()))
            if self._deficits[tenant] >= jobs[0].task.cost:
                break
            self._deficits[tenant] += quantum
            if self._deficits[tenant] >= jobs[0].task.cost:
                break
            self._jobs.move_to_end(tenant)
        batch = [self._take(tenant)]
        key = batch[0].task.batch_key
        while key is not None and len(batch) < most:
            # One of each key in turn, so that a batch is as mixed as the queue.
            matching = [name for name, waiting in self._jobs.items() if waiting[0].task.batch_key == key]
            if not matching:
                break
            batch += [self._take(name) for name in matching[: most - len(batch)]]
        if tenant in self._jobs and self._deficits[tenant] < self._jobs[tenant][0].task.cost:
            self._jobs.move_to_end(tenant)
        return batch

    def __iter__(self) -> Iterator[Job]:
        """Go through the waiting jobs, about in the order in which they will be served: keys take turns."""
        rows = [list(jobs) for jobs in self._jobs.values()]
        for place in range(max(map(len, rows), default=0)):
            yield from (row[place] for row in rows if place < len(row))

    def _take(self, tenant: str) -> Job:
        job = self._jobs[tenant].popleft()
        self._deficits[tenant] -= job.task.cost
        self._left(job)
        return job

    def _left(self, job: Job) -> None:
        self.cost = max(0.0, self.cost - job.task.cost)
        if not self._jobs[job.task.tenant]:
            del self._jobs[job.task.tenant], self._deficits[job.task.tenant]
        if not self._jobs:
            self.cost = 0.0


@dataclass(frozen=True)
class Limits:
    """How much work may wait."""

    queue_seconds: float = 60.0
    """Of work, for all keys together."""
    key_seconds: float = 30.0
    """Of work, for one key; a key without waiting work may always send one request."""
    jobs: int = 500
    request_seconds: float = 300.0
    """Longest time from admission to answer, after which a request is stopped with 504."""


class Scheduler:
    """Admits tasks, orders them fairly, hands batches to the engine, and retries once when a worker dies."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.queue = FairQueue()
        self.seconds_per_unit = 1.0
        """Measured: of one worker, for one unit of cost."""
        self.draining = False
        self._running: set[asyncio.Task[None]] = set()
        self._jobs: dict[str, Job] = {}
        """Running jobs by their task's id."""

    @property
    def idle(self) -> bool:
        return not self.queue.cost and not len(self.queue) and not self._running

    def wait_of(self, cost: float) -> float:
        """Return the seconds that all workers together take for so much work."""
        return cost * self.seconds_per_unit / max(1, self.engine.capacity)

    def admit(self, tasks: list[Task]) -> None:
        """Raise ServiceError where so much more work may not wait.

        503 while draining, 400 for work that could not be done in the time of a request, 429 with Retry-After.
        """
        if self.draining:
            raise refused(503, "shutting_down", "the service is shutting down; try again", retry_after=5)
        if not self.engine.health().ready:
            raise refused(503, "not_ready", f"not ready: {self.engine.health().reason}", retry_after=5)
        cost, tenant = sum(task.cost for task in tasks), tasks[0].tenant
        if self.wait_of(cost) > HOPELESS * self.limits.request_seconds:
            self.metrics.rejected.labels("too_long").inc()
            message = (
                f"image: expected work of at most {self.limits.request_seconds:g} s, got about {self.wait_of(cost):.0f}"
                " s; scale the picture down, or ask for fewer pictures or passes"
            )
            raise refused(400, "image_too_large", message, "image")
        wait, own = self.wait_of(self.queue.cost), self.wait_of(self.queue.cost_of(tenant))
        if len(self.queue) + len(tasks) > self.limits.jobs or (
            self.queue.cost and wait + self.wait_of(cost) > self.limits.queue_seconds
        ):
            self.metrics.rejected.labels("queue_full").inc()
            raise refused(429, "queue_full", "too much work is waiting; try again later", retry_after=wait)
        if own and own + self.wait_of(cost) > self.limits.key_seconds:
            self.metrics.rejected.labels("rate_limited").inc()
            message = "your key has too much work waiting; try again later"
            raise refused(429, "rate_limited", message, retry_after=own)

    def submit(self, task: Task, tell: Callable[[int, int], None] | None = None) -> Job:
        """Queue an admitted task."""
        job = Job(task, asyncio.get_running_loop().create_future(), tell)
        self.queue.push(job)
        self._dispatch()
        return job

    async def result(self, job: Job) -> Outcome:
        """Wait for a job; whoever is cancelled meanwhile cancels it. Raises ServiceError, also after too long."""
        try:
            return await asyncio.wait_for(asyncio.shield(job.result), self.limits.request_seconds)
        except TimeoutError:
            raise refused(504, "timeout", f"not done within {self.limits.request_seconds:g} s") from None
        finally:
            self.cancel(job)

    def cancel(self, job: Job) -> None:
        """Drop a queued job, or stop a running one at its next tile or step; nothing for a finished one."""
        if job.result.done():
            return
        job.result.cancel()
        self.metrics.cancelled.inc()
        if self.queue.remove(job):
            self._measure()
        else:
            self.engine.cancel(job.task.id)

    def position(self, job: Job) -> int:
        """Return how many jobs will be served before this one; 0 once it runs."""
        return 0 if job.started else next((at for at, each in enumerate(self.queue, 1) if each is job), 0)

    def _dispatch(self) -> None:
        """Hand over as many batches as the engine can run; the rest waits here, where it is in fair order."""
        while len(self._running) < self.engine.capacity and len(self.queue):
            jobs = self.queue.pop(self.engine.info.max_batch)
            running = asyncio.create_task(self._run(jobs))
            self._running.add(running)
            running.add_done_callback(self._finished)
        self._measure()

    def _finished(self, running: asyncio.Task[None]) -> None:
        self._running.discard(running)
        self._dispatch()

    def _measure(self) -> None:
        self.metrics.queue_length.set(len(self.queue))
        self.metrics.queued_seconds.set(self.wait_of(self.queue.cost))

    async def _run(self, jobs: list[Job]) -> None:
        began = time.monotonic()
        for job in jobs:
            job.started = began
            job.attempts += 1
            self._jobs[job.task.id] = job
            self.metrics.queue_wait.observe(began - job.queued)
        self.metrics.batch_size.observe(len(jobs))
        try:
            outcomes = await self.engine.submit([job.task for job in jobs], self._report)
        except WorkerLostError as error:
            self._again(jobs, error)
            return
        except Exception as error:  # an engine's fault must reach whoever waits
            outcomes = [Failure(500, "server_error", f"the engine failed ({type(error).__name__})")] * len(jobs)
        finally:
            for job in jobs:
                self._jobs.pop(job.task.id, None)
        # What was refused or failed took less than it would have, and would make the limits in seconds too lax.
        done = not any(isinstance(outcome, Failure) for outcome in outcomes)
        if done and not any(job.result.cancelled() for job in jobs):
            self._learn(sum(job.task.cost for job in jobs), time.monotonic() - began)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if job.result.done():
                continue
            if isinstance(outcome, Failure):
                job.result.set_exception(ServiceError(outcome))
            else:
                job.result.set_result(outcome)

    def _again(self, jobs: list[Job], error: WorkerLostError) -> None:
        """Queue the jobs of a dead worker once more, each alone: whichever killed it must not take others along."""
        for job in jobs:
            if job.result.done():
                continue
            if job.attempts >= ATTEMPTS:
                message = f"the worker died twice while it computed this ({error})"
                job.result.set_exception(refused(500, "server_error", message))
            else:
                self.metrics.retried.inc()
                job.started = None
                job.task = replace(job.task, batch_key=None)
                self.queue.push(job, first=True)

    def _report(self, task: str, done: int, total: int) -> None:
        job = self._jobs.get(task)
        if job is not None and job.tell is not None:
            job.tell(done, total)

    def _learn(self, cost: float, seconds: float) -> None:
        """Follow the measured speed, so that seconds of work are seconds."""
        self.seconds_per_unit += 0.2 * (seconds / cost - self.seconds_per_unit)
