"""Wait for jobs while their client is there, and make the JSON answer of their outcomes."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Coroutine, Sequence
from difflib import SequenceMatcher
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from openwu.serving.access import Caller
from openwu.serving.engines import Outcome, Task
from openwu.serving.errors import Failure, ServiceError, refused
from openwu.serving.queue import Job
from openwu.serving.requests.schema import MEDIA_TYPES, EditSpec
from openwu.serving.state import Service
from openwu.serving.stores import StoredAdapter

T = TypeVar("T")
CANCELLED = 499


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
    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(client_left(request.receive))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise refused(CANCELLED, "cancelled", "the client left")
        return done.result()
    finally:
        gone.cancel()
        if not done.done():
            done.cancel()


async def client_left(receive: Receive) -> None:
    """Return when the client has gone."""
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
        "example": first.example,
        "adapter_id": ids[0],
        "adapter_ids": ids,
        "timings": {"queue": round(waited, 4), **{name: round(value, 4) for name, value in first.timings.items()}},
        "cache": first.cache,
        "batch": first.batch,
        "ignored": list(spec.ignored),
        "notes": list(first.notes),
    }
