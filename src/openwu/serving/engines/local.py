"""Run tasks in this process, on threads: for tests, notebooks, and `openwu serve --workers 0`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from openwu.serving.engines import CACHE_BYTES, Engine, Health, ModelInfo, ModelSource, Outcome, Report, Task
from openwu.serving.errors import Failure

if TYPE_CHECKING:
    from openwu.editor.editor import Editor


class LocalEngine(Engine):
    """One thread with an Editor; nothing limits its memory."""

    def __init__(
        self, source: ModelSource | Callable[[], Editor], *, batch: int | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """`source`: what to load, or a function that returns the editor. `batch`: requests of one pass, at most.

        `cache_bytes`: of each key's adapter cache.
        """
        self._source, self._batch, self._cache_bytes = source, batch, cache_bytes
        self._thread = ThreadPoolExecutor(1, "openwu-edit")
        self._stopped: set[str] = set()
        self._lock = threading.Lock()
        self._info: ModelInfo | None = None

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "start() first"
        return self._info

    @property
    def capacity(self) -> int:
        return 1

    async def start(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    def _load(self) -> None:
        from openwu.serving.engines.worker import EditWorker, load

        editor = load(self._source) if isinstance(self._source, ModelSource) else self._source()
        self._worker = EditWorker(editor, self._batch, self._cache_bytes)
        self._info = self._worker.warm()

    async def submit(self, tasks: Sequence[Task], report: Report) -> list[Outcome | Failure]:
        loop = asyncio.get_running_loop()

        def told(task: str, done: int, total: int) -> None:
            loop.call_soon_threadsafe(report, task, done, total)

        try:
            return await loop.run_in_executor(self._thread, self._worker.run, tasks, told, self._is_stopped)
        finally:
            with self._lock:
                self._stopped.difference_update(task.id for task in tasks)

    def cancel(self, task: str) -> None:
        with self._lock:
            self._stopped.add(task)

    def health(self) -> Health:
        return Health(self._info is not None, "" if self._info else "the model is loading", 1)

    async def stop(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _is_stopped(self, task: str) -> bool:
        with self._lock:
            return task in self._stopped
