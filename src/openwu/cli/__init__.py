"""Command line: parse the arguments, run one verb, return the exit code.

| exit code | meaning |
|---|---|
| 0 | done, or nothing was left to do |
| 1 | failed; of several photos, at least one |
| 2 | wrong usage, or an instruction or example that the model does not understand: nothing was edited |
| 130, 143, 129 | stopped by Ctrl-C, SIGTERM or a closed terminal: finished files are whole, no partial ones are left |
| 141 | the program that reads the output has closed it |

Only the standard library is imported here, so that `--help` is instant; a verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from openwu.cli.console import USAGE, UsageError, complain, explain, say
from openwu.cli.parser import build_parser
from openwu.cli.stopping import STOPPED, Stopped
from openwu.errors import InstructionError, OpenwuError, RequestError
from openwu.registry import resolve

FAILED, PIPE_CLOSED = 1, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; see the module's table."""
    try:
        arguments = build_parser().parse_args(argv)
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        complain("stopped")
        return stop.code if isinstance(stop, Stopped) else STOPPED
    except BrokenPipeError:
        _drop_stdout()
        return PIPE_CLOSED
    except OpenwuError as error:
        complain(error)
        return USAGE if isinstance(error, UsageError | InstructionError | RequestError) else FAILED
    except (OSError, MemoryError) as error:
        complain(explain(error))
        _drop_stdout()
        return FAILED
    except ModuleNotFoundError as error:
        if (error.name or "openwu").startswith("openwu"):
            raise
        complain(f"the Python package {error.name!r} is not installed; pip install 'openwu[train,evaluate]' has all")
        return FAILED
    return code


def _drop_stdout() -> None:
    """Send what stdout still buffers to nowhere where it cannot be written, or Python complains about it at exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # a stdout that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: argparse.Namespace) -> int:
    verb = resolve(arguments.run)
    if arguments.verb == "train":
        folder = verb(arguments.recipe, arguments.overrides, output=arguments.output, stages=arguments.stages)
        if os.environ.get("RANK", "0") == "0":  # Of several processes that train together, one speaks.
            say(f"{arguments.recipe} -> {folder}")
        return 0
    if hasattr(arguments, "arguments"):
        return int(verb(arguments.arguments))
    return int(verb(arguments))
