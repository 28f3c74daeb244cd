"""Worker processes on this machine, each with its own Editor, under a memory limit; one that dies is started again."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from openwu.errors import OpenwuError
from openwu.serving.engines import CACHE_BYTES, Engine, Health, ModelInfo, ModelSource, Outcome, Report, Task
from openwu.serving.errors import Failure, WorkerLostError

REPORT_SECONDS = 0.1
"""Shortest time between two reports of progress of one batch."""
STOP_SECONDS = 20.0
"""A worker whose whole batch was stopped, and that goes on for longer than this, is killed."""
RESTART_SECONDS = 2.0
"""Wait before a worker that could not start is tried again."""


class ProcessEngine(Engine):
    """Several worker processes; a picture that kills one costs the others nothing."""

    def __init__(
        self,
        source: ModelSource,
        *,
        workers: int = 1,
        batch: int | None = None,
        memory_bytes: int | None = 4 * 2**30,
        threads: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`memory_bytes`: what a worker on a CPU may take beyond its loaded model; None: no limit.

        `threads`: of each worker; None: the machine's cores shared between them. `cache_bytes`: of each key's adapter
        cache in each worker.
        """
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        threads = threads or max(1, cores // workers)
        self._start_arguments = (source, batch, memory_bytes, threads, cache_bytes)
        self._count = workers
        self._workers: list[_Worker] = []
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._busy: dict[str, _Worker] = {}
        """Running task -> its worker."""
        self._info: ModelInfo | None = None
        self._restarts = 0
        self._reason = "the model is loading"
        self._background: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "start() first"
        return self._info

    @property
    def capacity(self) -> int:
        return self._count

    async def start(self) -> None:
        try:
            await asyncio.gather(*(self._launch() for _ in range(self._count)))
        except BaseException:
            await self.stop()
            raise

    async def submit(self, tasks: Sequence[Task], report: Report) -> list[Outcome | Failure]:
        worker = await self._idle.get()
        while not worker.alive:
            worker = await self._idle.get()
        self._busy |= dict.fromkeys([task.id for task in tasks], worker)
        try:
            return await worker.run(tasks, report)
        finally:
            for task in tasks:
                self._busy.pop(task.id, None)
            if worker.alive:
                self._idle.put_nowait(worker)

    def cancel(self, task: str) -> None:
        worker = self._busy.get(task)
        if worker is not None:
            worker.cancel(task)

    def health(self) -> Health:
        alive = sum(worker.alive for worker in self._workers)
        return Health(alive > 0 and self._info is not None, self._reason, alive, self._restarts)

    @property
    def processes(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.pid for worker in self._workers if worker.alive]

    async def stop(self) -> None:
        self._stopping = True
        for each in self._background:
            each.cancel()
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def _launch(self) -> None:
        worker = _Worker(self._start_arguments, self._lost)
        self._workers.append(worker)
        info = await worker.started()
        self._info = self._info or info
        self._reason = ""
        self._idle.put_nowait(worker)

    def _lost(self, worker: _Worker) -> None:
        """A worker that had started has died."""
        if worker in self._workers:
            self._workers.remove(worker)
        if not self._stopping:
            self._reason = "every worker has died; they are being started again"
            task = asyncio.ensure_future(self._relaunch())
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _relaunch(self) -> None:
        while not self._stopping:
            self._restarts += 1
            try:
                await self._launch()
            except OpenwuError as error:
                self._reason = str(error)
                await asyncio.sleep(RESTART_SECONDS)
            else:
                return


class _Worker:
    """This side of one worker process."""

    def __init__(self, arguments: tuple[Any, ...], lost: Any) -> None:
        context = get_context("spawn")
        self._loop = asyncio.get_running_loop()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
        self._sender = ThreadPoolExecutor(1, "openwu-send")
        self._ready: asyncio.Future[ModelInfo] = self._loop.create_future()
        self._result: asyncio.Future[list[Outcome | Failure]] | None = None
        self._report: Report | None = None
        self._waiting: set[str] = set()
        """Tasks of the running batch that somebody still waits for."""
        self._lost, self._started = lost, False
        self.alive = False
        self._theirs = theirs

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    async def started(self) -> ModelInfo:
        """Start the process; return what it loaded. Raises OpenwuError where it could not."""
        await self._loop.run_in_executor(self._sender, self._process.start)
        self._theirs.close()  # so that the end of the process is the end of the pipe
        threading.Thread(target=self._listen, name="openwu-listen", daemon=True).start()
        info = await self._ready
        self.alive = self._started = True
        return info

    async def run(self, tasks: Sequence[Task], report: Report) -> list[Outcome | Failure]:
        self._result, self._report = self._loop.create_future(), report
        self._waiting = {task.id for task in tasks}
        self._send(("run", list(tasks)))
        try:
            return await self._result
        finally:
            self._result, self._report = None, None

    def cancel(self, task: str) -> None:
        """Stop one task; the process is killed if it goes on though nobody waits for anything that it does."""
        self._waiting.discard(task)
        self._send(("cancel", task))
        if not self._waiting and self._result is not None:
            self._loop.call_later(STOP_SECONDS, self._kill_if_running, self._result)

    async def stop(self) -> None:
        """End the process: kindly, then not."""
        self.alive = False
        self._send(("stop", None))
        if self._process.pid is not None:
            await self._loop.run_in_executor(None, self._process.join, 3.0)
            if self._process.is_alive():
                self._process.kill()
                await self._loop.run_in_executor(None, self._process.join, 5.0)
        self._sender.shutdown(wait=False)

    def _kill_if_running(self, result: asyncio.Future[list[Outcome | Failure]]) -> None:
        if not result.done():
            self._process.kill()

    def _send(self, message: tuple[str, Any]) -> None:
        def send() -> None:
            with suppress(OSError, ValueError):  # a dead process: the listener says so
                self._connection.send(message)

        with suppress(RuntimeError):  # after stop
            self._sender.submit(send)

    def _listen(self) -> None:
        """In a thread: hand over what the process says, until it ends."""
        with suppress(RuntimeError):  # the loop is closed
            try:
                while True:
                    kind, value = self._connection.recv()
                    self._loop.call_soon_threadsafe(self._hear, kind, value)
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._ended)

    def _hear(self, kind: str, value: Any) -> None:
        if kind == "ready" and not self._ready.done():
            self._ready.set_result(value)
        elif kind == "failed" and not self._ready.done():
            self._ready.set_exception(OpenwuError(value))
        elif kind == "done" and self._result is not None and not self._result.done():
            self._result.set_result(value)
        elif kind == "progress" and self._report is not None:
            for task, done, total in value:
                self._report(task, done, total)

    def _ended(self) -> None:
        self.alive = False
        self._connection.close()
        if not self._ready.done():
            self._ready.set_exception(OpenwuError("a worker ended while it loaded the model; its memory may be short"))
        if self._result is not None and not self._result.done():
            self._result.set_exception(WorkerLostError(f"exit code {self._process.exitcode}"))
        self._sender.shutdown(wait=False)
        if self._started:
            self._lost(self)


def work(
    connection: Connection,
    source: ModelSource,
    batch: int | None,
    memory_bytes: int | None,
    threads: int,
    cache_bytes: int,
) -> None:
    """Be a worker process: load, warm up, then run batch after batch until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the service decides when its workers end
        signal.signal(number, signal.SIG_IGN)
    import torch

    from openwu.serving.engines.worker import EditWorker, load

    torch.set_num_threads(threads)
    try:
        worker = EditWorker(load(source), batch, cache_bytes)
        info = worker.warm()
    except Exception as error:
        connection.send(
            ("failed", f"{error}" if isinstance(error, OpenwuError) else f"{type(error).__name__}: {error}")
        )
        return
    if memory_bytes is not None and worker.on_cpu:
        limit_memory(memory_bytes)
    inbox = _Inbox(connection)
    inbox.say(("ready", info))
    while (tasks := inbox.tasks.get()) is not None:
        outcomes = worker.run(tasks, inbox.report, inbox.is_stopped)
        inbox.forget()
        inbox.say(("done", outcomes))


def limit_memory(further: int) -> None:
    """Limit this process's own memory to what it has now and so many bytes more; on Linux, elsewhere nothing."""
    if sys.platform != "linux":
        return
    import resource

    status = Path("/proc/self/status").read_text(encoding="ascii")
    now = int(status.partition("VmData:")[2].split()[0]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = now + further
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


class _Inbox:
    """The worker's side of the pipe: a thread reads, so that a stop arrives while the worker computes."""

    def __init__(self, connection: Connection) -> None:
        self.tasks: queue.Queue[list[Task] | None] = queue.Queue()
        self._connection = connection
        self._stopped: set[str] = set()
        self._lock = threading.Lock()
        self._told: dict[str, tuple[int, int]] = {}
        self._last = 0.0
        threading.Thread(target=self._read, name="openwu-inbox", daemon=True).start()

    def say(self, message: tuple[str, Any]) -> None:
        self._connection.send(message)

    def is_stopped(self, task: str) -> bool:
        with self._lock:
            return task in self._stopped

    def forget(self) -> None:
        """Forget what was stopped: the batch is done."""
        with self._lock:
            self._stopped.clear()
        self._told.clear()

    def report(self, task: str, done: int, total: int) -> None:
        self._told[task] = done, total
        if time.monotonic() - self._last >= REPORT_SECONDS:
            self._last = time.monotonic()
            self.say(("progress", [(name, *parts) for name, parts in self._told.items()]))
            self._told.clear()

    def _read(self) -> None:
        try:
            while True:
                kind, value = self._connection.recv()
                if kind == "run":
                    self.tasks.put(value)
                elif kind == "cancel":
                    with self._lock:
                        self._stopped.add(value)
                else:
                    break
        except (EOFError, OSError):
            pass
        os._exit(0)  # whatever is being computed, nobody will read it
