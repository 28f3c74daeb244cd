"""The tools of a language model's memory, through the official client, on a tiny random model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from language_cases import language_model
from memory_cases import written_for
from openwu.editor.editor import Editor
from openwu.memory.language import LanguageMemory
from openwu.memory.store import MemoryStore
from openwu.serving.engines.local import LocalEngine
from openwu.serving.state import Service, Settings

mcp = pytest.importorskip("mcp")


def test_an_agent_remembers_asks_and_forgets(editor: Editor, tmp_path: Path) -> None:
    from openwu.serving.mcp.files import make_server
    from openwu.serving.mcp.notes import NoteTools

    loads = []

    def load() -> LanguageMemory:
        loads.append(1)
        base = language_model()
        return LanguageMemory(base, written_for(base), store=tmp_path / "store")

    async def work(client: Any) -> None:
        async def call(tool: str, **arguments: Any) -> Any:
            return await client.call_tool(tool, arguments)

        assert {"remember", "ask", "list_notes", "forget"} <= {tool.name for tool in (await client.list_tools()).tools}
        assert (await call("list_notes")).structured_content == {"names": []}
        missing = await call("ask", question="where?", names=["trip"])
        assert missing.is_error
        assert "trip" in missing.content[0].text
        assert loads == []
        assert (await call("remember", name="trip", text="  ")).is_error
        kept = await call("remember", name="trip", text="anna visits paris .")
        assert not kept.is_error, kept.content
        assert kept.structured_content["tokens"] > 0
        assert (await call("list_notes")).structured_content == {"names": ["trip"]}
        answer = await call("ask", question="anna visits", names=["trip"])
        assert not answer.is_error, answer.content
        assert isinstance(answer.structured_content["answer"], str)
        assert (await call("ask", question="anna", names=[])).is_error
        outside = await call("remember", name="../trip", text="anna visits tea .")
        assert outside.is_error
        assert (await call("forget", name="trip")).structured_content == {"forgotten": "trip"}
        assert (await call("forget", name="trip")).is_error
        assert loads == [1]

    async def run() -> None:
        notes = NoteTools(MemoryStore(tmp_path / "store"), load)
        server = make_server(Service(LocalEngine(lambda: editor), Settings()), [tmp_path], notes)
        async with mcp.Client(server) as client:
            await work(client)

    asyncio.run(run())
