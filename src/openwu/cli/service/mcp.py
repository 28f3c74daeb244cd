"""Run `openwu mcp`: tools for agents over standard input and output."""

from __future__ import annotations

import argparse
from pathlib import Path

from openwu.cli.service.serve import model_source
from openwu.extras import library


def run(arguments: argparse.Namespace) -> int:
    """Serve the tools until the client closes the connection. Standard output carries the protocol alone."""
    library("mcp", "mcp")
    library("fastapi", "mcp")
    from openwu.serving.engines.local import LocalEngine
    from openwu.serving.mcp.files import make_server
    from openwu.serving.state import Service, Settings

    engine = LocalEngine(model_source(arguments))
    make_server(Service(engine, Settings()), [Path(each) for each in arguments.allow]).run("stdio")
    return 0


def add_arguments(mcp: argparse.ArgumentParser) -> None:
    """Add the options that are the tools' own."""
    mcp.add_argument(
        "--allow",
        action="append",
        required=True,
        metavar="FOLDER",
        help="folder in which photographs may be read and results written; may be repeated",
    )
    mcp.add_argument("--model", metavar="M", help="as of `openwu edit` (default: the model inside the package)")
    mcp.set_defaults(run="openwu.cli.service.mcp:run")
