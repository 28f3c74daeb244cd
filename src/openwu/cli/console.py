"""Print results on stdout and everything else on stderr: whole lines, with every odd character escaped.

Only an error of several problems has several lines. A line break in a file name or in foreign text is shown escaped, as
is everything that could give a terminal orders.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from contextlib import suppress
from typing import NoReturn, TextIO

from openwu.errors import OpenwuError

USAGE = 2
"""Exit code of wrong usage."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a full disk."""


class UsageError(OpenwuError):
    """A command line that contradicts itself, whatever the files hold: exit code USAGE."""


def say(text: str) -> None:
    """Print a result, for people and for pipes. Raises OSError where stdout cannot be written."""
    _print(text, sys.stdout)


def note(text: str) -> None:
    """Print something to know that is no failure."""
    _print_aside(f"openwu: note: {text}")


def complain(error: str | OpenwuError) -> None:
    """Print an error in one line; one of several problems in a line for each, indented."""
    lines = error.lines if isinstance(error, OpenwuError) else ()
    first, *problems = lines or (str(error),)
    _print_aside(f"openwu: error: {first}")
    for problem in problems:
        _print_aside(f"  {problem}")


def explain(error: BaseException) -> OpenwuError:
    """Return an error that says in a line what a user can do about an exception of Python or a library."""
    if isinstance(error, OpenwuError):
        return error
    if isinstance(error, MemoryError):
        return OpenwuError("not enough memory; close other programs, or edit a smaller picture")
    if isinstance(error, OSError):
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        what = error.strerror or str(error) or type(error).__name__
        todo = "free some space and try again" if error.errno in FULL else "check the place and its permissions"
        return OpenwuError(f"{place}{what}; {todo}")
    return OpenwuError(f"unexpected {type(error).__name__}: {error}; --verbose shows where, please report it")


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    return False


def one_line(text: str) -> str:
    """Escape line breaks, orders to terminals, and bytes of file names that are no text."""
    return "".join(part if part.isprintable() else ascii(part)[1:-1] for part in text)


class Parser(argparse.ArgumentParser):
    """Errors in one line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        self.exit(USAGE)


def _print_aside(text: str) -> None:
    """Print on stderr; where that is closed or full, nobody can be told."""
    with suppress(OSError):
        _print(text, sys.stderr)


def _print(text: str, stream: TextIO | None) -> None:
    """Print a line, with characters that the stream's encoding lacks escaped."""
    if stream is None:  # Python's stand-in for a stream that was closed at the start
        return
    encoding = stream.encoding or "utf-8"
    print(one_line(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
