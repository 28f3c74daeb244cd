"""Run `openwu mcp`: tools for agents over standard input and output."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from openwu.cli.service.serve import model_source
from openwu.extras import library

if TYPE_CHECKING:
    from openwu.serving.mcp.notes import NoteTools


def run(arguments: argparse.Namespace) -> int:
    """Serve the tools until the client closes the connection. Standard output carries the protocol alone."""
    library("mcp", "mcp")
    library("fastapi", "mcp")
    from openwu.serving.engines.local import LocalEngine
    from openwu.serving.mcp.files import make_server
    from openwu.serving.state import Service, Settings

    engine = LocalEngine(model_source(arguments))
    notes = None if arguments.memory is None else note_tools(Path(arguments.memory).expanduser())
    make_server(Service(engine, Settings()), [Path(each) for each in arguments.allow], notes).run("stdio")
    return 0


def note_tools(store: Path) -> NoteTools:
    """Return the tools of a memory over a store; OpenwuError where its packages are missing."""
    library("transformers", "memory")
    library("gguf", "memory")
    from openwu.memory.language import LanguageMemory
    from openwu.memory.store import MemoryStore
    from openwu.serving.mcp.notes import NoteTools

    return NoteTools(MemoryStore(store), partial(LanguageMemory.from_pretrained, store=store))


def add_arguments(mcp: argparse.ArgumentParser) -> None:
    """Add the options that are the tools' own."""
    mcp.add_argument(
        "--allow",
        action="append",
        required=True,
        metavar="FOLDER",
        help="folder in which photographs may be read and results written; may be repeated",
    )
    mcp.add_argument(
        "--memory",
        metavar="STORE",
        help="folder of notes: adds tools to remember, ask, list and forget (docs/memory.md)",
    )
    mcp.add_argument("--model", metavar="M", help="as of `openwu edit` (default: the model inside the package)")
    mcp.set_defaults(run="openwu.cli.service.mcp:run")
