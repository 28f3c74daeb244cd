"""Results of experiments: a cache of finished trials, JSON with its origin, and tables in plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openwu.files.origin import origin
from openwu.files.writing import atomic_set, file_name, write_json


@dataclass(frozen=True)
class TrialResult:
    """The result of one trial of an experiment, such as one method with one seed."""

    values: Mapping[str, Any]
    """Plain values for JSON."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ResultCache:
    """Results of finished trials in a folder: `NAME.json`, and `NAME.safetensors` beside it.

    The folder's name should hold a `files.fingerprint.fingerprint` of everything that results depend on.
    """

    folder: Path | None = None
    """None: nothing is kept, and every trial is run."""

    def get(self, name: str, run: Callable[[], TrialResult]) -> TrialResult:
        """Read the result of a trial, or run the trial and keep it."""
        found = self._read(name)
        if found is None:
            found = run()
            self._write(name, found)
        return found

    def _read(self, name: str) -> TrialResult | None:
        """The result, or None where it is missing or broken: then the trial is run again."""
        if self.folder is None:
            return None
        values, tensors = _files(self.folder, name)
        try:
            return TrialResult(json.loads(values.read_text(encoding="utf-8")), load_file(tensors))
        except (OSError, ValueError, SafetensorError):
            return None

    def _write(self, name: str, result: TrialResult) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        values, tensors = _files(self.folder, name)
        with atomic_set(self.folder, last=values.name) as draft:  # A result without its values is missing.
            (draft / values.name).write_text(json.dumps(result.values), encoding="utf-8")
            save_file({key: value.contiguous() for key, value in result.tensors.items()}, draft / tensors.name)


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    plain = file_name(name)
    return folder / f"{plain}.json", folder / f"{plain}.safetensors"


UNCACHED = ResultCache()
"""Runs every trial."""


def write_findings(path: Path, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write `found` with version, commit, date, hardware and settings; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    reported = {key: value for key, value in settings.items() if key != "output"}  # A folder of this machine.
    write_json(path, {**origin(), "settings": reported, **found})


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in plain text, for a terminal."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]]) + "\n"
