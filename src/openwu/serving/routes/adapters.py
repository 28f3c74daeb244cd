"""Serve `/v1/adapters`: generate an adapter, list, download and delete those of one's own key."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from openwu.serving.access import Caller
from openwu.serving.engines import Outcome, Task
from openwu.serving.errors import unsupported
from openwu.serving.requests.forms import Body, example_pairs, read_body
from openwu.serving.requests.openapi import ADAPTER_OPERATION
from openwu.serving.requests.schema import ADAPTER_FIELDS, Values, cost_of, edit_spec
from openwu.serving.routes.edits import make_tasks
from openwu.serving.routes.results import all_results, unless_gone
from openwu.serving.state import Known, Service
from openwu.serving.stores import StoredAdapter

FORMATS = ("openwu", "peft", "diffusers", "comfyui")


def adapter_routes(service: Service) -> APIRouter:
    """Make the routes."""
    routes = APIRouter()

    @routes.post(
        "/v1/adapters",
        openapi_extra=ADAPTER_OPERATION,
        summary="Generate the adapter of a picture and an instruction",
        status_code=201,
    )
    async def generate(request: Request, caller: Known) -> dict[str, object]:
        task = await _task(service, caller, await read_body(request))
        outcome = await _run(service, request, task)
        words = outcome.words or task.instruction
        made = StoredAdapter(
            task.id, caller.tenant, outcome.data, task.id, service.engine.info.name, words, int(time.time())
        )
        service.adapters.put(made)
        if outcome.example is None:
            return made.described
        return {**made.described, "example": outcome.example, "notes": list(outcome.notes)}

    @routes.get("/v1/adapters", summary="List the adapters of your key")
    async def listed(caller: Known) -> dict[str, object]:
        return {"object": "list", "data": [each.described for each in service.adapters.of(caller.tenant)]}

    @routes.get("/v1/adapters/{id}", summary="Describe an adapter, or with format= download it as a zip archive")
    async def download(request: Request, id: str, caller: Known, format: str = "") -> Any:
        found = service.adapters.get(id, caller.tenant)
        if not format:
            return found.described
        outcome = await _run(service, request, export_task(caller, (found.key, found.data), format))
        name = {"content-disposition": f'attachment; filename="{found.id}.{format}.zip"'}
        return Response(outcome.data, media_type="application/zip", headers=name)

    @routes.delete("/v1/adapters/{id}", summary="Delete an adapter")
    async def delete(id: str, caller: Known) -> dict[str, object]:
        service.adapters.delete(id, caller.tenant)
        return {"id": id, "object": "adapter", "deleted": True}

    return routes


async def _task(service: Service, caller: Caller, body: Body) -> Task:
    for name in (*body.values, *body.files):
        if name not in ADAPTER_FIELDS:
            raise unsupported(name[:64], f"{name[:64]}: expected one of {', '.join(ADAPTER_FIELDS)}; leave it out")
    return await adapter_task(service, caller, body.values, body.files.get("image", []), example_pairs(body))


async def adapter_task(
    service: Service,
    caller: Caller,
    values: Values,
    images: Sequence[bytes],
    examples: Sequence[tuple[bytes, bytes]] = (),
) -> Task:
    """Make the task of generating an adapter, as `edit_spec` takes what it depends on. Raises ServiceError.

    `images`: none for the adapter that an example gives a whole series.
    """
    # Without a picture, the example's own stands in for the checks.
    spec = edit_spec(values, images or [before for before, _ in examples[:1]], None, examples)
    (task,) = await make_tasks(service, caller, spec)
    return replace(task, kind="adapt", images=tuple(images), batch_key=None)


def export_task(caller: Caller, adapter: tuple[str, bytes], format: str) -> Task:
    """Make the task of packing an adapter as an archive. `adapter`: as `Task.adapter`. Raises ServiceError."""
    if format not in FORMATS:
        raise unsupported("format", f"format: expected one of {', '.join(FORMATS)}, got {format[:40]!r}")
    return Task(secrets.token_hex(16), caller.tenant, "export", adapter=adapter, export_format=format, cost=cost_of(0))


async def _run(service: Service, request: Request, task: Task) -> Outcome:
    service.scheduler.admit([task])
    job = service.scheduler.submit(task)
    (outcome,) = await unless_gone(request, all_results(service, [job]))
    return outcome
