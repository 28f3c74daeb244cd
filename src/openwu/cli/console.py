"""What the command line prints: results on stdout, everything else on stderr; whole lines, never a crash.

Only an error of several problems has several lines. What a line break in a file name or in foreign text would start
is no line of ours: it is shown escaped, as everything is that could give a terminal orders.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn, TextIO

from openwu.errors import OpenwuError

USAGE = 2
"""Exit code of wrong usage."""


class UsageError(OpenwuError):
    """A command line that contradicts itself, whatever the files hold: exit code USAGE."""


def say(text: str) -> None:
    """A result, for people and for pipes."""
    _print(text, sys.stdout)


def note(text: str) -> None:
    """Something to know that is no failure."""
    _print(f"openwu: note: {text}", sys.stderr)


def complain(error: str | OpenwuError) -> None:
    """An error, in one line; one of several problems in a line for each, indented."""
    first, *problems = getattr(error, "lines", ()) or (str(error),)
    _print(f"openwu: error: {first}", sys.stderr)
    for problem in problems:
        _print(f"  {problem}", sys.stderr)


class Parser(argparse.ArgumentParser):
    """Errors in one line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        self.exit(USAGE)


def _print(text: str, stream: TextIO) -> None:
    """File names may hold line breaks and bytes that are no text; terminals may know little of Unicode."""
    one_line = "".join(part if part.isprintable() else ascii(part)[1:-1] for part in text)
    encoding = stream.encoding or "utf-8"
    print(one_line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
