"""What an experiment found, written down: numbers with their origin as JSON, a table for the terminal, a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openwu.origin import origin


def write_json(path: Path, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write `found` with version, commit, date, hardware and settings; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {key: value for key, value in settings.items() if key != "output"}  # A folder of the machine's, no setting.
    written = {**origin(), "settings": told, **found}
    lines = [f" {json.dumps(key)}: {_entries(value)}" for key, value in written.items()]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def _entries(value: object) -> str:
    """A line for each entry of a long list: a diff of two runs stays readable."""
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return "[\n  " + ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n ]"
    return json.dumps(value, ensure_ascii=False)


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in plain text, for a terminal."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]]) + "\n"
