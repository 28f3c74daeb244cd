"""The tools over standard input and output: photographs are files in the folders that the agent may use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, TextContent

from openwu.errors import OpenwuError
from openwu.files.writing import atomic_file
from openwu.serving.access import LOCAL
from openwu.serving.errors import ServiceError
from openwu.serving.mcp.calls import Calls, pair_of, preview, taken_for
from openwu.serving.mcp.notes import NoteTools
from openwu.serving.requests.schema import Values, edit_spec
from openwu.serving.routes.adapters import adapter_task, export_task
from openwu.serving.routes.edits import make_tasks
from openwu.serving.state import Service
from openwu.version import __version__

OUTPUTS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
INSTRUCTIONS = (
    "Edits photographs on this machine. Give absolute paths. An edit writes a new file and returns a small preview. "
    "If an instruction is refused, call list_edits or understand, and ask again in the words of a known edit."
)


def make_server(service: Service, folders: Sequence[Path], notes: NoteTools | None = None) -> MCPServer:
    """Make the server over a service, which starts and stops with it.

    `folders`: where files may be read and written; nothing outside, symbolic links resolved. `notes`: the tools of a
    language model's memory, if there is one. Raises OpenwuError for a folder that is none.
    """
    allowed = Folders(folders)

    @asynccontextmanager
    async def life(_: MCPServer) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.engine.stop()

    server = MCPServer("openwu", version=__version__, instructions=INSTRUCTIONS, lifespan=life)
    tools = FileTools(service, allowed)
    for tool in (tools.edit_photo, tools.list_edits, tools.understand, tools.make_adapter):
        server.tool()(tool)
    if notes is not None:
        for note_tool in (notes.remember, notes.ask, notes.list_notes, notes.forget):
            server.tool()(note_tool)
    return server


class Folders:
    """The folders that may be used."""

    def __init__(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise OpenwuError(f"--allow: expected a folder, got {folder}")
        self._folders = [folder.resolve() for folder in folders]

    def existing(self, text: str, most: int) -> Path:
        """Return a file to read. Raises ToolError."""
        path = self._inside(text)
        if not path.is_file():
            raise ToolError(f"{path}: expected a photograph, got no such file; check the path")
        if path.stat().st_size > most:
            raise ToolError(f"{path}: expected a file of at most {most / 2**20:g} MiB; scale the picture down")
        return path

    def new(self, text: str, suffixes: Sequence[str], overwrite: bool) -> Path:
        """Return where to write a file. Raises ToolError."""
        path = self._inside(text)
        if path.suffix.lower() not in suffixes:
            raise ToolError(f"output: expected a name that ends with {', '.join(suffixes)}, got {path.name!r}")
        if not path.parent.is_dir():
            raise ToolError(f"output: expected a folder that exists, got {path.parent}")
        if path.exists() and not (overwrite and path.is_file()):
            raise ToolError(f"output: {path} exists; choose another name, or pass overwrite=true for a file")
        return path

    def _inside(self, text: str) -> Path:
        try:
            path = Path(text).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ToolError(f"expected a path, got {text[:200]!r}: {error}") from error
        if not any(path.is_relative_to(folder) for folder in self._folders):
            names = ", ".join(map(str, self._folders)) or "none"
            raise ToolError(f"{path}: expected a path inside the allowed folders ({names}); use one of those")
        return path


class FileTools:
    """What an agent can call; the docstrings are what it reads."""

    def __init__(self, service: Service, folders: Folders) -> None:
        self._service, self._folders, self._calls = service, folders, Calls(service)

    async def edit_photo(
        self,
        photo: str,
        instruction: str,
        context: Context[None, Any],
        output: str | None = None,
        strength: float = 1.0,
        seed: int | None = None,
        reference: str | None = None,
        example_before: str | None = None,
        example_after: str | None = None,
        try_anyway: bool = False,
        overwrite: bool = False,
    ) -> CallToolResult:
        """Edit a photograph as an instruction says (English or Chinese), write a new file, and return a small preview.

        photo: path of the picture. output: path of the result, .png, .jpg or .webp (default: PHOTO.edited.png beside
        it). strength: share of the change: 1 as asked, 0 no edit, up to 2 more, down to -1 the other way. reference:
        path of a second picture, for edits that need one. example_before and example_after: paths of one picture
        before and after a look of tone and colour that the photograph shall get; instruction may then be "".
        try_anyway: also instructions that the model does not know, and examples that it does not understand.
        """
        sources = [photo] if reference is None else [photo, reference]
        source = self._folders.existing(photo, self._service.settings.body.bytes)
        default = str(source.with_name(f"{source.stem}.edited.png"))
        target = self._folders.new(output or default, tuple(OUTPUTS), overwrite)
        if target == source:
            raise ToolError("output: expected another path than the photograph's, which is kept")
        values: dict[str, Sequence[object]] = {
            "prompt": [instruction],
            "strength": [strength],
            "seed": [seed],
            "allow_out_of_scope": [try_anyway],
            "output_format": [OUTPUTS[target.suffix.lower()]],
        }
        try:
            pairs = pair_of(example_before, example_after, self._read)
            spec = edit_spec(values, [self._read(each) for each in sources], None, pairs)
            (task,) = await make_tasks(self._service, LOCAL, spec)
            outcome = await self._calls.run(task, context)
        except ServiceError as error:
            raise self._calls.explained(error, instruction) from error
        await asyncio.to_thread(_write, target, outcome.data)
        about = {
            "output": str(target),
            "width": outcome.size[0],
            "height": outcome.size[1],
            "edit": outcome.edit,
            "example": None if outcome.example is None else dict(outcome.example),
            "notes": list(outcome.notes),
        }
        text = f"Wrote {target}; understood as: {taken_for(outcome, instruction)}."
        return CallToolResult(content=[TextContent(text=text), await preview(outcome.data)], structured_content=about)

    async def list_edits(self, query: str = "", limit: int = 10) -> dict[str, Any]:
        """List the edits that the model knows, those nearest to the query first, with example sentences."""
        return self._calls.list_edits(query, limit)

    async def understand(self, instruction: str, context: Context[None, Any]) -> dict[str, Any]:
        """Say which edit an instruction would be taken for, without editing anything."""
        return await self._calls.understand(LOCAL, instruction, context)

    async def make_adapter(
        self,
        output: str,
        context: Context[None, Any],
        photo: str | None = None,
        instruction: str = "",
        example_before: str | None = None,
        example_after: str | None = None,
        format: str = "openwu",
        seed: int | None = None,
        try_anyway: bool = False,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Generate the LoRA adapter of a photograph and an instruction, or of an example, and write a zip archive.

        output: path of the archive, .zip. photo: path of the picture; may be left out with an example, whose adapter
        then serves a whole series of pictures. example_before and example_after: paths of one picture before and after
        a look of tone and colour; instruction may then be "". format: openwu, peft, diffusers or comfyui. try_anyway:
        also instructions that the model does not know, and examples that it does not understand.
        """
        target = self._folders.new(output, (".zip",), overwrite)
        values: Values = {"prompt": [instruction], "seed": [seed], "allow_out_of_scope": [try_anyway]}
        try:
            pairs = pair_of(example_before, example_after, self._read)
            images = [] if photo is None else [self._read(photo)]
            task = await adapter_task(self._service, LOCAL, values, images, pairs)
            export = export_task(LOCAL, (task.id, b""), format)  # an unknown format is refused before any work
            made = await self._calls.run(task, context)
            outcome = await self._calls.run(replace(export, adapter=(task.id, made.data)), context)
        except ServiceError as error:
            raise self._calls.explained(error, instruction) from error
        await asyncio.to_thread(_write, target, outcome.data)
        return {
            "output": str(target),
            "format": format,
            "bytes": len(outcome.data),
            "edit": made.edit,
            "example": None if made.example is None else dict(made.example),
            "notes": list(made.notes),
        }

    def _read(self, path: str) -> bytes:
        try:
            return self._folders.existing(path, self._service.settings.body.bytes).read_bytes()
        except OSError as error:
            raise ToolError(f"{path}: cannot be read: {error.strerror or error}") from error


def _write(path: Path, data: bytes) -> None:
    try:
        with atomic_file(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise ToolError(f"{path}: cannot be written: {error.strerror or error}; choose another output") from error
