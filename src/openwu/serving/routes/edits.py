"""Serve `POST /v1/images/edits`: from checked fields to tasks for the queue."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openwu.errors import PictureError
from openwu.images import MAX_PIXELS, check_picture
from openwu.serving.access import Caller
from openwu.serving.engines import ModelInfo, Task
from openwu.serving.errors import refused, unsupported
from openwu.serving.requests.forms import example_pairs, read_body
from openwu.serving.requests.schema import EXAMPLES, EditSpec, cost_of, edit_spec
from openwu.serving.routes.results import all_results, answer, unless_gone
from openwu.serving.routes.streams import EventStream
from openwu.serving.state import Service

REQUEST_PICTURES = 2
"""All pictures of a request, and its answer, may have as many pixels as so many of the largest ones."""
LEAST_SIDE = 64
"""Side of the smallest picture that takes less time than larger ones."""


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
    sizes = await asyncio.to_thread(check_sizes, spec, service.max_pixels)
    further = sum(width * height for width, height in sizes[1:])
    cost = cost_of(padded_pixels(sizes[0]), 1 + len(spec.then), further)
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


def padded_pixels(size: tuple[int, int]) -> int:
    """Return how many pixels of a picture are worked on: models pad one that is narrower than their windows."""
    return max(size[0], LEAST_SIDE) * max(size[1], LEAST_SIDE)


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


def check_sizes(spec: EditSpec, max_pixels: int) -> list[tuple[int, int]]:
    """Return the sizes of all pictures, the one to edit first and a larger answer last; only headers are read.

    Raises ServiceError that names the part with a picture of more than `max_pixels`, and where all pictures together
    have more than `REQUEST_PICTURES` times as many.
    """
    sizes = check_headers(spec.images, max_pixels)
    own = sizes[0]
    sizes += check_headers([] if spec.mask is None else [spec.mask], max_pixels, "mask")
    for pair in spec.examples:
        for name, data in zip(EXAMPLES, pair, strict=True):
            sizes += check_headers([data], max_pixels, name)
    if spec.size is not None and spec.size[0] * spec.size[1] > own[0] * own[1]:
        sizes.append(spec.size)
    total, most = sum(width * height for width, height in sizes), REQUEST_PICTURES * max_pixels
    if total > most:
        message = (
            f"image: expected at most {most / 1e6:g} megapixels in all pictures of a request and its answer together, "
            f"got {total / 1e6:.1f}; scale them down, or send fewer"
        )
        raise refused(400, "image_too_large", message, "image")
    return sizes


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
