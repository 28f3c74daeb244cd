"""Tools for an agent's notes: a language model that keeps them as adapters, not in its prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from mcp.server.mcpserver.exceptions import ToolError

from openwu.errors import OpenwuError
from openwu.memory.language import LanguageMemory
from openwu.memory.store import MemoryStore

MOST_NAMES = 8
"""Notes that one question may be asked under."""
MOST_LETTERS = 20_000
"""Of a note or question; the memory's own limit, in tokens, is below it."""

Answer = TypeVar("Answer")


class NoteTools:
    """What an agent can call; the docstrings are what it reads. One call computes at a time."""

    def __init__(self, store: MemoryStore, load: Callable[[], LanguageMemory]) -> None:
        """`load`: called when the first note is written or asked for, and once."""
        self._store, self._load = store, load
        self._memory: LanguageMemory | None = None
        self._turn = asyncio.Lock()

    async def remember(self, name: str, text: str) -> dict[str, Any]:
        """Keep a short text (facts about people and things, English) under a name, as weights of a language model.

        The text itself is not kept. Names are letters, digits, "-" and "_"; one that is there is refused: forget it
        first.
        """
        _check("text", text)
        kept = await self._with_memory(lambda memory: memory.remember(text, name=name))
        return {"name": name, "tokens": kept.tokens, "bytes": kept.bytes}

    async def ask(self, question: str, names: list[str], strength: float = 1.0) -> dict[str, Any]:
        """Answer a question with the notes of these names in mind. The model is small: one fact a note is safest."""
        _check("question", question)
        if not 1 <= len(names) <= MOST_NAMES:
            raise ToolError(f"names: expected 1 to {MOST_NAMES} names of notes (list_notes has them), got {len(names)}")
        for name in names:
            await self._run(partial(self._store.load, name))  # before the model, which takes seconds
        answer = await self._with_memory(lambda memory: memory.ask(question, names, strength=strength))
        return {"answer": answer, "names": names}

    async def list_notes(self) -> dict[str, Any]:
        """List the names of all notes."""
        return {"names": await self._run(self._store.names)}

    async def forget(self, name: str) -> dict[str, Any]:
        """Forget a note for good: nothing of it is left in the model."""
        await self._run(partial(self._store.forget, name))
        return {"forgotten": name}

    async def _with_memory(self, work: Callable[[LanguageMemory], Answer]) -> Answer:
        async with self._turn:
            if self._memory is None:
                self._memory = await self._run(self._load)
            return await self._run(partial(work, self._memory))

    async def _run(self, work: Callable[[], Answer]) -> Answer:
        try:
            return await asyncio.to_thread(work)
        except OpenwuError as error:
            raise ToolError(str(error)) from error


def _check(what: str, text: str) -> None:
    if not text.strip() or len(text) > MOST_LETTERS:
        raise ToolError(f"{what}: expected 1 to {MOST_LETTERS} letters, got {len(text)}")
