"""The tools over HTTP at `/mcp`: photographs are uploaded to a link, results come as a preview and a link."""

from __future__ import annotations

import secrets
from contextlib import AbstractAsyncContextManager
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import CallToolResult, ContentBlock, ResourceLink, TextContent
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from openwu.serving.access import Caller
from openwu.serving.engines import Outcome
from openwu.serving.errors import ServiceError
from openwu.serving.mcp.calls import Calls, pair_of, preview, taken_for
from openwu.serving.requests.forms import picture_of
from openwu.serving.requests.schema import MEDIA_TYPES, edit_spec
from openwu.serving.routes.edits import make_tasks
from openwu.serving.state import Service, caller_of
from openwu.version import __version__

INSTRUCTIONS = (
    "Edits photographs. Call upload_link, send the file there with an HTTP PUT, and pass its image id; a small picture "
    "may be passed as a data URL instead. Results are a small preview and a link to the whole picture. If an "
    "instruction is refused, call list_edits or understand, and ask again in the words of a known edit."
)


class AgentEndpoint:
    """The ASGI app behind `/mcp`: one exchange a request, no sessions, under the caller's API key."""

    def __init__(self, service: Service) -> None:
        tools = RemoteTools(service)
        server = MCPServer("openwu", version=__version__, instructions=INSTRUCTIONS)
        for tool in (tools.upload_link, tools.edit_image, tools.compare, tools.list_edits, tools.understand):
            server.tool()(tool)
        # Hosts and origins are checked by the service's own middleware.
        unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        self._app = server.streamable_http_app(stateless_http=True, transport_security=unchecked)
        self._server = server

    def running(self) -> AbstractAsyncContextManager[None]:
        """Serve for the time of a block; once only."""
        return self._server.session_manager.run()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        request.state.caller = caller_of(request)
        await self._app(scope, receive, send)


class RemoteTools:
    """What an agent can call over HTTP; the docstrings are what it reads."""

    def __init__(self, service: Service) -> None:
        self._service, self._calls = service, Calls(service)

    async def upload_link(self, context: Context[None, Any]) -> dict[str, Any]:
        """Return a link for uploading one photograph: send the file as the body of an HTTP PUT, then use the image id.

        The link needs no API key and serves once, for 10 minutes; the picture is kept for an hour.
        """
        image = self._service.uploads.expect(_caller(context).tenant)
        return {"image": image, "method": "PUT", "url": f"{_base(context)}/v1/uploads/{image}"}

    async def edit_image(
        self,
        image: str,
        instruction: str,
        context: Context[None, Any],
        strength: float = 1.0,
        seed: int | None = None,
        reference: str | None = None,
        example_before: str | None = None,
        example_after: str | None = None,
        output_format: str = "png",
        try_anyway: bool = False,
    ) -> CallToolResult:
        """Edit a photograph as an instruction says (English or Chinese); return a small preview and a link to the file.

        image: id of an upload, or a data URL. strength: share of the change: 1 as asked, 0 no edit, up to 2 more, down
        to -1 the other way. reference: a second picture, for edits that need one. example_before and example_after:
        one picture before and after a look of tone and colour that the image shall get; instruction may then be "".
        output_format: png, jpeg or webp. try_anyway: also instructions that the model does not know, and examples
        that it does not understand.
        """
        images = [image] if reference is None else [image, reference]
        values: dict[str, list[object]] = {
            "prompt": [instruction],
            "strength": [strength],
            "seed": [seed],
            "output_format": [output_format],
            "allow_out_of_scope": [try_anyway],
        }
        content, about = await self._edited(images, values, context, (example_before, example_after))
        return CallToolResult(content=content, structured_content=about)

    async def compare(
        self, image: str, first: str, second: str, context: Context[None, Any], seed: int | None = None
    ) -> CallToolResult:
        """Edit one photograph by two instructions, and return both previews and links, to choose between them."""
        results = [
            await self._edited([image], {"prompt": [instruction], "seed": [seed]}, context)
            for instruction in (first, second)
        ]
        content = [each for found, _ in results for each in found]
        return CallToolResult(content=content, structured_content={"results": [about for _, about in results]})

    async def list_edits(self, query: str = "", limit: int = 10) -> dict[str, Any]:
        """List the edits that the model knows, those nearest to the query first, with example sentences."""
        return self._calls.list_edits(query, limit)

    async def understand(self, instruction: str, context: Context[None, Any]) -> dict[str, Any]:
        """Say which edit an instruction would be taken for, without editing anything."""
        return await self._calls.understand(_caller(context), instruction, context)

    async def _edited(
        self,
        images: list[str],
        values: dict[str, list[object]],
        context: Context[None, Any],
        example: tuple[str | None, str | None] = (None, None),
    ) -> tuple[list[ContentBlock], dict[str, Any]]:
        """Edit, and return a tool's content and what it says in a structured way. Raises ToolError."""
        instruction, caller = str(values["prompt"][0]), _caller(context)
        try:
            pairs = pair_of(*example, lambda each: self._picture(each, caller))
            spec = edit_spec(values, [self._picture(each, caller) for each in images], None, pairs)
            (task,) = await make_tasks(self._service, caller, spec)
            outcome = await self._calls.run(task, context)
        except ServiceError as error:
            raise self._calls.explained(error, instruction) from error
        kind = MEDIA_TYPES[spec.output_format]
        link = _base(context) + self._service.pictures.put(outcome.data, kind)
        words = f"Understood as: {taken_for(outcome, instruction)}. The whole picture, for an hour: {link}"
        name = f"{secrets.token_hex(4)}.{spec.output_format}"
        content: list[ContentBlock] = [
            TextContent(text=words),
            await preview(outcome.data),
            ResourceLink(uri=link, name=name, mime_type=kind, size=len(outcome.data)),
        ]
        return content, _about(outcome, link, task.seed)

    def _picture(self, image: str, caller: Caller) -> bytes:
        """Return an uploaded picture, or the one in a data URL. Raises ServiceError."""
        return picture_of(image, "image") if ":" in image[:8] else self._service.uploads.get(image, caller.tenant)


def _about(outcome: Outcome, link: str, seed: int) -> dict[str, Any]:
    width, height = outcome.size
    notes = list(outcome.notes)
    about = {"url": link, "width": width, "height": height, "edit": outcome.edit, "seed": seed, "notes": notes}
    return about | {"example": None if outcome.example is None else dict(outcome.example)}


def _request(context: Context[None, Any]) -> Request:
    request = context.request_context.request
    if not isinstance(request, Request):
        raise ToolError("expected a call over HTTP")
    return request


def _caller(context: Context[None, Any]) -> Caller:
    caller: Caller = _request(context).state.caller
    return caller


def _base(context: Context[None, Any]) -> str:
    return str(_request(context).base_url).rstrip("/")
