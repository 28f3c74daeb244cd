"""What an experiment found, written down: numbers with their origin as JSON, a table for the terminal, a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.files.hashing import add_tensor, of_json
from openwu.files.origin import origin
from openwu.files.writing import whole_set, write_json

CODE = (
    *("lab", "training", "data", "embedded.py", "backbone", "condition", "generator", "adapter", "ops", "evaluation"),
    *("compute", "config.py", "planes.py", "types.py"),
)
"""What the numbers of a part depend on, in the package's folder: source, and the sentences beside it."""


@dataclass(frozen=True)
class Part:
    """What one part found."""

    values: Mapping[str, Any]
    """Plain values for JSON."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Keep(Protocol):
    """Makes a part, or finds it."""

    def __call__(self, name: str, make: Callable[[], Part], /) -> Part: ...


def keep_nothing(_: str, make: Callable[[], Part], /) -> Part:
    """Every part is made."""
    return make()


class ResultCache:
    """Parts in a folder: `NAME.json`, and `NAME.safetensors` beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, make: Callable[[], Part], /) -> Part:
        found = self._read(name)
        if found is None:
            found = make()
            self._write(name, found)
        return found

    def _read(self, name: str) -> Part | None:
        """The part, or None where it is missing or broken: then it is made again."""
        values, tensors = self._files(name)
        try:
            return Part(json.loads(values.read_text(encoding="utf-8")), load_file(tensors))
        except (OSError, ValueError, SafetensorError):
            return None

    def _write(self, name: str, part: Part) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        values, tensors = self._files(name)
        with whole_set(self.folder, last=values.name) as draft:  # A part without its values is missing.
            (draft / values.name).write_text(json.dumps(part.values), encoding="utf-8")
            save_file({key: value.contiguous() for key, value in part.tensors.items()}, draft / tensors.name)

    def _files(self, name: str) -> tuple[Path, Path]:
        plain = "".join(letter if letter.isalnum() else "-" for letter in name)
        return self.folder / f"{plain}.json", self.folder / f"{plain}.safetensors"


def fingerprint(settings: Mapping[str, Any], *frozen: nn.Module) -> str:
    """Sixteen digits that differ where settings, the frozen modules' weights or the code do."""
    digest = of_json(settings, sort_keys=True, default=str)
    for module in frozen:
        for name, value in module.state_dict().items():
            add_tensor(digest, name, value)
    package = Path(__file__).parents[1]
    for part in CODE:
        held = [package / part] if part.endswith(".py") else (package / part).rglob("*")
        for file in sorted(each for each in held if each.suffix in (".py", ".json")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


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
