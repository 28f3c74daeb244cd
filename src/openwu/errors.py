"""The errors that openwu raises on purpose; the command line prints them without a traceback, a line for each problem.

Every message says what was expected, what came, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self


class OpenwuError(Exception):
    """Base of every error that a user can cause and can mend."""

    lines: tuple[str, ...] = ()
    """What is shown line by line, where several problems were found; empty for a message of one line."""

    @classmethod
    def listing(cls, head: str, problems: Iterable[str]) -> Self:
        """An error of several problems: `head` says what they are problems of, and each has a line of its own."""
        lines = (head, *problems)
        error = cls("\n  ".join(lines))
        error.lines = lines
        return error


class PictureError(OpenwuError):
    """A picture that cannot be read, is of a kind that is not supported, or cannot be written."""


class RequestError(OpenwuError):
    """A field of a request that has no possible value, or one that the base does not serve."""


class InstructionError(OpenwuError):
    """An instruction that is empty, too long, or not text."""


class UnclearError(InstructionError):
    """An instruction that may ask for one of several edits, or for all of them."""

    def __init__(self, message: str, edits: tuple[str, ...] = ()) -> None:
        """`edits`: those that it may ask for."""
        super().__init__(message)
        self.edits = edits


class ExampleError(InstructionError):
    """An example of an edit whose pairs show none (too small, two scenes, no change), or one that is not reproduced."""


class CheckpointError(OpenwuError):
    """A folder of weights whose files, keys, shapes or config fields are not as specified."""


class TargetError(OpenwuError):
    """An adapter's targets and a model's modules do not fit: missing, unexpected, unreached or of another shape."""


class ExportError(OpenwuError):
    """An exported adapter that its library does not read, or does not compute the same with."""


class DatasetError(OpenwuError):
    """Training data with a broken line, a missing picture or a target of another size."""
