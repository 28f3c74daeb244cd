"""Serve `POST /v1/images/edits`: from checked fields to tasks, and from outcomes to JSON or server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from difflib import SequenceMatcher
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from openwu.errors import PictureError
from openwu.images import MAX_PIXELS, check_picture
from openwu.serving.access import Caller
from openwu.serving.engines import ModelInfo, Outcome, Task
from openwu.serving.errors import Failure, ServiceError, refused, unsupported
from openwu.serving.forms import EXAMPLES, example_pairs, read_body
from openwu.serving.queue import Job
from openwu.serving.schema import MEDIA_TYPES, EditSpec, cost_of, edit_spec
from openwu.serving.state import Service
from openwu.serving.stores import StoredAdapter

T = TypeVar("T")
PEEK_SECONDS = 1.0
"""How long a stream waits for an early refusal, so that it can still be an HTTP status."""
TICK_SECONDS, KEEP_ALIVE_SECONDS = 0.5, 10.0
CANCELLED = 499


async def serve_edit(service: Service, caller: Caller, request: Request) -> Response:
    """Answer one edit request. Raises ServiceError for everything that is refused."""
    spec = await read_spec(request)
    tasks = await make_tasks(service, caller, spec)
    service.scheduler.admit(tasks)
    if spec.stream:
        return await EventStream.opened(service, caller, request, spec, tasks)
    jobs = [service.scheduler.submit(task) for task in tasks]
    outcomes = await unless_gone(request, all_results(service, jobs))
    return JSONResponse(answer(service, caller, request, spec, jobs, outcomes))


async def read_spec(request: Request) -> EditSpec:
    """Read and check the body of an edit request."""
    body = await read_body(request)
    return edit_spec(body.values, body.files.get("image", []), body.one_file("mask"), example_pairs(body))


async def make_tasks(service: Service, caller: Caller, spec: EditSpec) -> list[Task]:
    """Make the tasks of a request, one for each of its n pictures. Raises ServiceError."""
    service.check_model(spec.model)
    info = service.engine.info
    check_able(info, spec)
    adapter = None
    if spec.adapter is not None:
        stored = service.adapters.get(spec.adapter, caller.tenant)
        adapter = (stored.key, stored.data)
    sizes = await asyncio.to_thread(check_headers, spec.images, service.max_pixels)
    if spec.mask is not None:
        await asyncio.to_thread(check_headers, [spec.mask], service.max_pixels, "mask")
    await asyncio.to_thread(check_example_headers, spec, service.max_pixels)
    cost = cost_of(sizes[0][0] * sizes[0][1], 1 + len(spec.then))
    own = adapter is not None or bool(spec.then)
    key = None if own else (sizes[0], len(spec.images), len(spec.examples), spec.allow_out_of_scope)
    seed = info.default_seed if spec.seed is None else spec.seed
    return [
        Task(
            id=secrets.token_hex(16),
            tenant=caller.tenant,
            images=spec.images,
            instruction=spec.prompt,
            then=spec.then,
            examples=spec.examples,
            strength=spec.strength,
            seed=seed + number,
            allow_out_of_scope=spec.allow_out_of_scope,
            adapter=adapter,
            mask=spec.mask,
            size=spec.size,
            output_format=spec.output_format,
            compression=spec.compression,
            opaque=spec.opaque,
            metadata=spec.metadata,
            cost=cost,
            batch_key=key,
        )
        for number in range(spec.n)
    ]


def check_able(info: ModelInfo, spec: EditSpec) -> None:
    """Raise ServiceError that names what the model cannot serve."""
    if info.max_pictures is not None and len(spec.images) > info.max_pictures:
        message = f"image: {info.name} reads at most {info.max_pictures} pictures, got {len(spec.images)}"
        raise refused(400, "too_many_images", message, "image")
    if spec.allow_out_of_scope and not info.refuses_out_of_scope:
        message = f"allow_out_of_scope: {info.name} refuses no instruction; leave it out"
        raise unsupported("allow_out_of_scope", message)
    if spec.examples and not info.reads_examples:
        message = f"example_before: {info.name} does not read examples; say what to do in prompt"
        raise unsupported("example_before", message)


def check_example_headers(spec: EditSpec, max_pixels: int) -> None:
    """Read the headers of the pictures that show an edit. Raises ServiceError that names the part."""
    for pair in spec.examples:
        for name, data in zip(EXAMPLES, pair, strict=True):
            check_headers([data], max_pixels, name)


def check_headers(files: Sequence[bytes], max_pixels: int, name: str = "image") -> list[tuple[int, int]]:
    """Read the headers of pictures and return their sizes. Raises ServiceError; nothing is decoded."""
    sizes = []
    for data in files:
        try:
            size = check_picture(data, max_pixels=MAX_PIXELS * 1000).size
        except PictureError as error:
            raise refused(400, "invalid_image", f"{name}: {error}", name) from error
        if size[0] * size[1] > max_pixels:
            millions = f"{size[0] * size[1] / 1e6:.1f} megapixels ({size[0]}x{size[1]})"
            message = f"{name}: expected at most {max_pixels / 1e6:g} megapixels, got {millions}; scale it down"
            raise refused(400, "image_too_large", message, name)
        sizes.append(size)
    return sizes


async def all_results(service: Service, jobs: Sequence[Job]) -> list[Outcome]:
    """Wait for every job; if one fails, the others are stopped. Raises ServiceError."""
    waiting = [asyncio.ensure_future(service.scheduler.result(job)) for job in jobs]
    try:
        return list(await asyncio.gather(*waiting))
    except ServiceError as error:
        raise with_suggestions(service, error, jobs[0].task.instruction) from error
    finally:
        for each in waiting:
            each.cancel()
        for job in jobs:
            service.scheduler.cancel(job)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for some work, and cancel it when the client leaves."""
    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise refused(CANCELLED, "cancelled", "the client left")
        return done.result()
    finally:
        gone.cancel()
        if not done.done():
            done.cancel()


async def _wait(job: Job, seconds: float) -> None:
    await asyncio.wait({job.result}, timeout=seconds)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def with_suggestions(service: Service, error: ServiceError, prompt: str) -> ServiceError:
    """Add the nearest known edits to the refusal of an unknown instruction."""
    failure = error.failure
    if failure.code != "unknown_instruction":
        return error
    names = {str(edit["id"]): str(edit["id"]).replace("_", " ") for edit in service.engine.info.edits}
    near = [name for name, words in names.items() if f" {words} (" in failure.message]  # those that the model names
    near = near or [edit["id"] for edit in nearest_edits(service, prompt)[:3]]
    return ServiceError(
        Failure(failure.status, failure.code, failure.message, failure.param, further={"suggestions": near})
    )


def nearest_edits(service: Service, query: str) -> list[dict[str, Any]]:
    """Return the known edits, those whose name or examples resemble the query first; all in their order without one."""
    edits = [dict(edit) for edit in service.engine.info.edits]
    wanted = query.strip().lower()
    if not wanted:
        return edits

    def likeness(edit: dict[str, Any]) -> float:
        texts = [str(edit["id"]).replace("_", " "), *map(str, edit["examples"].values())]
        return max(
            SequenceMatcher(None, wanted, text.lower()).ratio() + 0.5 * (wanted in text.lower()) for text in texts
        )

    return sorted(edits, key=likeness, reverse=True)


def keep_adapter(service: Service, caller: Caller, task: Task, outcome: Outcome) -> str | None:
    """Keep the adapter of an outcome for its key; return its id."""
    if task.adapter is not None or not outcome.adapter:
        return None
    words = outcome.words or task.instruction
    kept = StoredAdapter(
        task.id, caller.tenant, outcome.adapter, task.id, service.engine.info.name, words, int(time.time())
    )
    service.adapters.put(kept)
    return kept.id


def answer(
    service: Service,
    caller: Caller,
    request: Request,
    spec: EditSpec,
    jobs: Sequence[Job],
    outcomes: Sequence[Outcome],
) -> dict[str, Any]:
    """Make the JSON answer of all pictures."""
    first = outcomes[0]
    kept = [keep_adapter(service, caller, job.task, each) for job, each in zip(jobs, outcomes, strict=True)]
    for each in outcomes:
        service.metrics.cache.labels(each.cache).inc()
        for stage, seconds in each.timings.items():
            service.metrics.stages.labels(stage).observe(seconds)
    return {
        "created": int(time.time()),
        "data": [picture(service, request, spec, each) for each in outcomes],
        **shown(spec, first),
        "usage": usage(spec, outcomes),
        "openwu": ours(spec, jobs, outcomes, kept),
    }


def picture(service: Service, request: Request, spec: EditSpec, outcome: Outcome) -> dict[str, Any]:
    """One entry of `data`."""
    if not spec.as_url:
        return {"b64_json": base64.b64encode(outcome.data).decode()}
    link = service.pictures.put(outcome.data, MEDIA_TYPES[spec.output_format])
    return {"url": str(request.base_url).rstrip("/") + link}


def shown(spec: EditSpec, outcome: Outcome) -> dict[str, Any]:
    """What the answer says about its pictures."""
    size = f"{outcome.size[0]}x{outcome.size[1]}"
    return {"output_format": spec.output_format, "size": size, "quality": "auto", "background": spec.background}


def usage(spec: EditSpec, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Clients require the token counts of OpenAI; no tokens are counted here, so they are 0."""
    del spec, outcomes
    none = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": none}


def ours(
    spec: EditSpec, jobs: Sequence[Job], outcomes: Sequence[Outcome], kept: Sequence[str | None]
) -> dict[str, Any]:
    """What this service says beside OpenAI's fields."""
    first = outcomes[0]
    ids = [spec.adapter if each is None else each for each in kept]
    waited = (jobs[0].started or jobs[0].queued) - jobs[0].queued
    return {
        "seed": jobs[0].task.seed,
        "seeds": [job.task.seed for job in jobs],
        "edit": first.edit,
        "adapter_id": ids[0],
        "adapter_ids": ids,
        "timings": {"queue": round(waited, 4), **{name: round(value, 4) for name, value in first.timings.items()}},
        "cache": first.cache,
        "batch": first.batch,
        "ignored": list(spec.ignored),
        "notes": list(first.notes),
    }


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
        gone = asyncio.ensure_future(_left(receive))
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
