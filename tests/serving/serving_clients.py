"""What the tests of the service share: pictures, and an engine that sleeps instead of editing."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image

from openwu.serving.engines import Engine, Health, ModelInfo, Outcome, Report, Task
from openwu.serving.errors import Failure, WorkerLostError
from openwu.serving.server import configured

PROMPT = "make it brighter"


def png(width: int = 48, height: int = 40, seed: int = 0, format: str = "PNG", **options: object) -> bytes:
    """A picture file of smooth noise."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, format, **options)
    return buffer.getvalue()


def png_url(data: bytes) -> dict[str, str]:
    """A picture as JSON bodies hold it."""
    return {"image_url": "data:image/png;base64," + base64.b64encode(data).decode()}


def mask_png(width: int = 48, height: int = 40) -> bytes:
    """A mask whose left half is transparent: edit there."""
    alpha = np.full((height, width), 255, np.uint8)
    alpha[:, : width // 2] = 0
    picture = Image.fromarray(np.dstack([np.zeros((height, width, 3), np.uint8), alpha]))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve an app from a thread; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(configured(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.05)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class SleepingEngine(Engine):
    """Takes its time for every batch, and answers with the task's own words."""

    def __init__(self, seconds: float = 0.01, *, workers: int = 1, batch: int = 1, deaths: int = 0) -> None:
        self.seconds, self.workers, self.deaths = seconds, workers, deaths
        self.batches: list[list[Task]] = []
        self.stopped: list[str] = []
        self.busy = 0.0
        """Seconds in which it had something to do."""
        self._info = ModelInfo("stub", max_batch=batch, seconds_per_unit=1.0)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def capacity(self) -> int:
        return self.workers

    async def start(self) -> None: ...

    async def submit(self, tasks: Sequence[Task], report: Report) -> list[Outcome | Failure]:
        self.batches.append(list(tasks))
        began = time.monotonic()
        try:
            return await self._slept(tasks, report)
        finally:
            self.busy += time.monotonic() - began

    async def _slept(self, tasks: Sequence[Task], report: Report) -> list[Outcome | Failure]:
        report(tasks[0].id, 0, 2)
        for _ in range(10):
            await asyncio.sleep(self.seconds / 10)
            if all(task.id in self.stopped for task in tasks):
                return [Failure(499, "cancelled", "stopped") for _ in tasks]
        if self.deaths:
            self.deaths -= 1
            raise WorkerLostError("killed")
        return [Outcome(task.instruction.encode(), (1, 1), b"adapter", edit=task.instruction) for task in tasks]

    def cancel(self, task: str) -> None:
        self.stopped.append(task)

    def health(self) -> Health:
        return Health(True, workers=self.workers)

    async def stop(self) -> None: ...
