"""What the command line prints: results on stdout, everything else on stderr; always one whole line, never a crash."""

from __future__ import annotations

import sys
from typing import TextIO

from openwu.errors import OpenwuError


class UsageError(OpenwuError):
    """A command line that contradicts itself, whatever the files hold: exit code 2."""


def say(text: str) -> None:
    """A result, for people and for pipes."""
    _print(text, sys.stdout)


def note(text: str) -> None:
    """Something to know that is no failure."""
    _print(f"openwu: note: {text}", sys.stderr)


def complain(text: str) -> None:
    """An error, in one line."""
    _print(f"openwu: error: {text}", sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    """File names may hold line breaks and bytes that are no text; terminals may know little of Unicode."""
    one_line = "".join(part if part.isprintable() else ascii(part)[1:-1] for part in text)
    encoding = stream.encoding or "utf-8"
    print(one_line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
