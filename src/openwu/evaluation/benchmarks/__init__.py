"""Benchmarks: readers that turn a data set's own layout into cases, and check that it is complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from openwu.errors import DatasetError
from openwu.evaluation.cases import Case

RUBRIC_OF = {"gedit": "gedit", "imgedit": "imgedit", "own": "four-dimensions", "cases": "four-dimensions"}
"""The rubric that a benchmark is judged by, unless another one is asked for."""


def check_complete(name: str, cases: Sequence[Case], expected: Mapping[tuple[str, str], int]) -> None:
    """Compare the numbers of cases with the benchmark's. `expected`: (language, task) -> number.

    Raises DatasetError with a line for every difference.
    """
    found = Counter((case.language, case.task) for case in cases)
    problems = [
        f"{language or 'all'}, {task}: expected {expected.get((language, task), 0)} cases, got {found[language, task]}"
        for language, task in sorted(expected.keys() | found.keys())
        if found[language, task] != expected.get((language, task), 0)
    ]
    if problems:
        raise DatasetError.listing(f"{name}: the data set is not complete; --partial takes it as it is", problems)


def without_duplicates(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object. Raises DatasetError for a key that is there twice; `json` would keep the last one."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise DatasetError(f"expected every key once, got {key!r} twice")
        found[key] = value
    return found
