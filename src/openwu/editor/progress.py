"""Join the progress of several parts of some work: one total in all calls, parts done that never fall and end at it."""

from __future__ import annotations

from openwu.editor.requests import Progress

PART = 1000
"""What each of several parts counts as, however many steps or pieces it has."""


class JointProgress:
    """The progress of passes over photographs, as one."""

    def __init__(self, progress: Progress | None, count: int, *, uneven: bool = False) -> None:
        """`count`: of equal parts. `uneven`: one of them reports several totals; else one alone is passed on as is."""
        self._progress = progress
        self._scaled = uneven or count > 1
        self._done, self._total = 0, count * PART if self._scaled else 1

    def of(self, number: int) -> Progress | None:
        """Return what is called in the part of this number, from 0."""

        def report(done: int, total: int) -> None:
            if self._scaled:
                self._tell(number * PART + PART * done // max(total, 1), self._total)
            else:
                self._tell(done, total)

        return None if self._progress is None else report

    def end(self) -> None:
        """Report that all is done, unless the last part did."""
        if self._done < self._total:
            self._tell(self._total, self._total)

    def _tell(self, done: int, total: int) -> None:
        self._done, self._total = max(done, self._done), total
        if self._progress is not None:
            self._progress(self._done, total)


def halves(progress: Progress | None) -> tuple[Progress | None, Progress | None]:
    """Return what is called in the first half and in the rest of some work; the rest is all if nothing comes first."""
    if progress is None:
        return None, None
    begun = False

    def first(done: int, total: int) -> None:
        nonlocal begun
        begun = True
        progress(done, 2 * total)

    def rest(done: int, total: int) -> None:
        progress(total + done if begun else done, 2 * total if begun else total)

    return first, rest
