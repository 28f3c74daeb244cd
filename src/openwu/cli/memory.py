"""Run `openwu remember`, `openwu ask` and `openwu memory`: a language model with notes kept as adapters."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from openwu.cli.console import UsageError, note, one_line, say
from openwu.errors import OpenwuError
from openwu.memory.language import LICENCE, LanguageMemory
from openwu.memory.store import MemoryStore

DEFAULT_STORE = "~/.local/share/openwu/memory"
"""Where notes are kept unless --store or OPENWU_MEMORY says otherwise."""
MAX_BYTES = 2**20
"""Size of a file of notes above which it is not read."""


def remember(arguments: argparse.Namespace) -> int:
    """Write a file's text into the store as an adapter."""
    text = _text(arguments.file)
    memory = _memory(arguments)
    kept = memory.remember(text, name=arguments.name)
    say(f"{arguments.name}: {kept.tokens} tokens remembered in {kept.bytes} bytes ({_store(arguments).folder})")
    return 0


def ask(arguments: argparse.Namespace) -> int:
    """Answer a question under the adapters of some notes, as the words come."""
    store = _store(arguments)
    for name in arguments.memory:
        store.load(name)  # before the model, which takes seconds
    memory = _memory(arguments)
    pieces = memory.stream(
        arguments.question, arguments.memory, strength=arguments.strength, max_new_tokens=arguments.tokens
    )
    for piece in pieces:
        sys.stdout.write("".join(letter if letter == "\n" else one_line(letter) for letter in piece))
        sys.stdout.flush()
    say("")
    return 0


def manage(arguments: argparse.Namespace) -> int:
    """List, show, forget or export notes."""
    store = _store(arguments)
    if arguments.action == "list":
        for name in store.names():
            say(name)
        return 0
    if arguments.name is None:
        raise UsageError(f"memory {arguments.action}: expected the name of a note; openwu memory list shows them")
    if arguments.action == "forget":
        store.forget(arguments.name)
        say(f"{arguments.name}: forgotten")
        return 0
    kept = store.load(arguments.name)
    if arguments.action == "export":
        if arguments.output is None:
            raise UsageError("memory export: expected --output FOLDER")
        kept.save_pretrained(arguments.output)
        say(f"{arguments.name} -> {arguments.output}")
        return 0
    facts = {**kept.provenance(), "digest": kept.digest, "rank": kept.adapter.rank, "bytes": kept.bytes}
    for label, value in {**facts, "norm": f"{kept.norm:.1f}"}.items():
        say(f"{label:<12}{value}")
    return 0


def _store(arguments: argparse.Namespace) -> MemoryStore:
    return MemoryStore(arguments.store or os.environ.get("OPENWU_MEMORY") or DEFAULT_STORE)


def _memory(arguments: argparse.Namespace) -> LanguageMemory:
    """Load the model, and say whose it is."""
    if arguments.base is None:
        note(LICENCE)
    return LanguageMemory.from_pretrained(arguments.generator, base=arguments.base, store=_store(arguments).folder)


def _text(file: str) -> str:
    """Read UTF-8 text from a file, or from standard input for "-"."""
    data = sys.stdin.buffer.read(MAX_BYTES + 1) if file == "-" else b""
    if file != "-":
        with Path(file).open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OpenwuError(f"{file}: expected at most {MAX_BYTES} bytes of text; remember it as several notes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OpenwuError(f"{file}: expected text in UTF-8, got other bytes at {error.start}") from error
