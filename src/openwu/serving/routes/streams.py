"""Answer an edit as server-sent events: the place in the queue, progress, then each completed picture."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from openwu.serving.access import Caller
from openwu.serving.engines import Task
from openwu.serving.errors import Failure, ServiceError
from openwu.serving.queue import Job
from openwu.serving.requests.schema import EditSpec
from openwu.serving.routes.results import answer, client_left, unless_gone, with_suggestions
from openwu.serving.state import Service

PEEK_SECONDS = 1.0
"""How long a stream waits for an early refusal, so that it can still be an HTTP status."""
TICK_SECONDS, KEEP_ALIVE_SECONDS = 0.5, 10.0


class EventStream(Response):
    """Server-sent events of one request: comments while it waits and runs, then a completed picture for each of n."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(media_type="text/event-stream")
        self._events = events

    @classmethod
    async def opened(
        cls, service: Service, caller: Caller, request: Request, spec: EditSpec, tasks: Sequence[Task]
    ) -> EventStream:
        """Queue the tasks; wait a moment, so that an early refusal is raised as ServiceError, not streamed."""
        told: dict[str, tuple[int, int]] = {}

        def tell(id: str) -> Any:
            return lambda done, total: told.__setitem__(id, (done, total))

        jobs = [service.scheduler.submit(task, tell(task.id)) for task in tasks]
        try:
            await unless_gone(request, _wait(jobs[0], PEEK_SECONDS))
            first = jobs[0].result
            if first.done() and first.exception() is not None:
                error = first.exception()
                assert isinstance(error, ServiceError)
                raise with_suggestions(service, error, tasks[0].instruction)
        except BaseException:
            for job in jobs:
                service.scheduler.cancel(job)
            raise
        return cls(_events(service, caller, request, spec, jobs, told))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.ensure_future(client_left(receive))
        events = asyncio.ensure_future(self._send_all(send))
        try:
            await asyncio.wait({gone, events}, return_when=asyncio.FIRST_COMPLETED)
            if events.done():
                events.result()
        finally:
            gone.cancel()
            if not events.done():
                events.cancel()
                with suppress(asyncio.CancelledError):
                    await events

    async def _send_all(self, send: Send) -> None:
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait(job: Job, seconds: float) -> None:
    await asyncio.wait({job.result}, timeout=seconds)


async def _events(
    service: Service,
    caller: Caller,
    request: Request,
    spec: EditSpec,
    jobs: Sequence[Job],
    told: dict[str, tuple[int, int]],
) -> AsyncIterator[bytes]:
    """Yield the events; whoever stops listening cancels the jobs."""
    deadline = time.monotonic() + service.scheduler.limits.request_seconds
    try:
        for job in jobs:
            last, silent = "", time.monotonic()
            while not job.result.done():
                text = _state(service, job, told)
                if text != last or time.monotonic() - silent > KEEP_ALIVE_SECONDS:
                    last, silent = text, time.monotonic()
                    yield f": {text}\n\n".encode()
                if time.monotonic() > deadline:
                    yield _event("error", Failure(504, "timeout", "not done in time").body)
                    return
                await asyncio.wait({job.result}, timeout=TICK_SECONDS)
            error = job.result.exception()
            if error is not None:
                assert isinstance(error, ServiceError)
                yield _event("error", with_suggestions(service, error, job.task.instruction).failure.body)
                return
            outcome = job.result.result()
            full = answer(service, caller, request, spec, [job], [outcome])
            name = "image_edit.completed"
            body = {**full.pop("data")[0], **full, "type": name, "created_at": full["created"]}
            yield _event(name, body)
    finally:
        for job in jobs:
            service.scheduler.cancel(job)


def _state(service: Service, job: Job, told: dict[str, tuple[int, int]]) -> str:
    if job.started is None:
        return f"queued {service.scheduler.position(job)}"
    done, total = told.get(job.task.id, (0, 1))
    return f"editing {done}/{total}"


def _event(name: str, body: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n".encode()
