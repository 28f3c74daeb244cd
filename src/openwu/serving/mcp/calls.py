"""What the tools of both transports share: run a task with progress, explain a refusal, make a preview."""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
from collections.abc import Callable
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ImageContent
from PIL import Image

from openwu.images import read_picture
from openwu.serving.access import Caller
from openwu.serving.engines import Outcome, Task
from openwu.serving.errors import ServiceError
from openwu.serving.requests.schema import cost_of
from openwu.serving.routes.results import nearest_edits, with_suggestions
from openwu.serving.state import Service

PREVIEW_SIDE = 512
"""Longest side of a preview, in pixels: what an agent looks at costs tokens."""
TICK_SECONDS = 0.2


class Calls:
    """Runs the tools' tasks on a service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def adapt(self, caller: Caller, picture: bytes, instruction: str, seed: int | None = None) -> Task:
        """Make the task of generating an adapter. Raises ToolError."""
        if not instruction.strip():
            raise ToolError("instruction: expected what to do, got nothing")
        return Task(
            secrets.token_hex(16),
            caller.tenant,
            "adapt",
            images=(picture,),
            instruction=instruction,
            seed=self.service.engine.info.default_seed if seed is None else seed,
            cost=cost_of(0),
        )

    async def run(self, task: Task, context: Context[None, Any]) -> Outcome:
        """Queue a task and report its progress; a call that is cancelled stops it. Raises ServiceError."""
        scheduler = self.service.scheduler
        scheduler.admit([task])
        parts = [0, 1]

        def tell(done: int, total: int) -> None:
            parts[:] = done, total

        job = scheduler.submit(task, tell)
        waiting = asyncio.ensure_future(scheduler.result(job))
        last: tuple[float, str] | None = None
        try:
            while not waiting.done():
                words = f"queued, {scheduler.position(job)} before this" if job.started is None else "working"
                state = (parts[0] / max(1, parts[1]), words)
                if state != last:
                    last = state
                    await context.report_progress(state[0], 1.0, words)
                await asyncio.wait({waiting}, timeout=TICK_SECONDS)
            outcome = waiting.result()
        finally:
            waiting.cancel()
            scheduler.cancel(job)
        await context.report_progress(1.0, 1.0, "done")
        return outcome

    def explained(self, error: ServiceError, instruction: str) -> ToolError:
        """Return a refusal that says what an agent can do next."""
        failure = with_suggestions(self.service, error, instruction).failure
        near = failure.further.get("suggestions")
        if near:
            ways = f"Nearest known edits: {', '.join(near)}. Ask in the words of one (list_edits has examples)"
            return ToolError(f"{failure.message}. {ways}, or pass try_anyway=true.")
        if failure.code == "unknown_example":
            return ToolError(f"{failure.message}; here: pass try_anyway=true.")
        if failure.retryable:
            return ToolError(f"{failure.message}. Call again in {max(1, round(failure.retry_after or 5))} seconds.")
        return ToolError(failure.message)

    def list_edits(self, query: str, limit: int) -> dict[str, Any]:
        """List the known edits, the nearest to the query first. Raises ToolError."""
        if not 1 <= limit <= 200 or len(query) > 500:
            raise ToolError("expected a limit of 1 to 200 and a query of at most 500 characters")
        found = nearest_edits(self.service, query)
        return {"total": len(found), "edits": found[:limit]}

    async def understand(self, caller: Caller, instruction: str, context: Context[None, Any]) -> dict[str, Any]:
        """Say which edit an instruction would be taken for. Raises ToolError."""
        try:
            outcome = await self.run(self.adapt(caller, _grey(), instruction), context)
        except ServiceError as error:
            if error.failure.code != "unknown_instruction":
                raise self.explained(error, instruction) from error
            found = with_suggestions(self.service, error, instruction).failure
            return {"known": False, "edit": None, "reason": found.message, "nearest": found.further["suggestions"]}
        return {"known": True, "edit": outcome.edit, "reason": "", "nearest": []}


def pair_of(before: str | None, after: str | None, read: Callable[[str], bytes]) -> list[tuple[bytes, bytes]]:
    """Return the pair of an example, or none. Raises ToolError where one of the two is missing."""
    if before is None and after is None:
        return []
    if before is None or after is None:
        name = "example_before" if before is None else "example_after"
        raise ToolError(f"{name}: expected both pictures of an example, before and after; add it")
    return [(read(before), read(after))]


def taken_for(outcome: Outcome, instruction: str) -> str:
    """Say what a request was understood as."""
    if outcome.example is None:
        return outcome.edit or instruction
    return f"the example shows ({max(0.0, outcome.example['reproduced']):.0%} of its change reproduced)"


async def preview(data: bytes) -> ImageContent:
    """Return a JPEG of a picture, its longest side at most `PREVIEW_SIDE`; transparency is left out."""
    image = await asyncio.to_thread(_reduced, data)
    return ImageContent(data=base64.b64encode(image).decode(), mime_type="image/jpeg")


def _reduced(data: bytes) -> bytes:
    pixels = read_picture(data).pixels
    picture = Image.fromarray((pixels >> 8).astype("uint8") if pixels.dtype.itemsize > 1 else pixels)
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _grey() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()
