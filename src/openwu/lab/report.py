"""What an experiment found, written down: numbers with their origin as JSON, a table for the terminal, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openwu.files.origin import origin
from openwu.files.writing import write_json


def write_findings(path: Path, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write `found` with version, commit, date, hardware and settings; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {key: value for key, value in settings.items() if key != "output"}  # A folder of the machine's, no setting.
    write_json(path, {**origin(), "settings": told, **found})


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in plain text, for a terminal."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]]) + "\n"
