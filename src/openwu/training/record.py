"""Descriptions of a training: its recipe as JSON, what its weights depend on, and the model's provenance."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from openwu.files.origin import origin
from openwu.files.writing import write_text
from openwu.training.config import Recipe, set_fields
from openwu.training.distributed import is_main
from openwu.training.loop import SECONDS

PROVENANCE = "provenance.json"


IRRELEVANT = ("name", "export", "checkpoint_every", "evaluate_every", "log_every")
"""Fields of every recipe on which no trained weight depends."""


@runtime_checkable
class DescribesItself(Protocol):
    """A config with a JSON form of its own."""

    def to_dict(self) -> dict[str, Any]: ...


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return every number of a recipe as JSON; fields marked `LATER` only where they are set."""
    plain = {
        name: value.to_dict() if isinstance(value, DescribesItself) else value
        for name, value in set_fields(recipe).items()
    }
    described: dict[str, Any] = json.loads(json.dumps(plain))
    return described


def dependencies(recipe: Recipe, without: Iterable[str] = (), **found: Any) -> dict[str, Any]:
    """Return what trained weights depend on: a recipe's relevant fields, and what was found in its files.

    without: more fields that do not matter. found: values that stand for files, such as hashes of the data. The number
    of micro-batches never matters: it only changes how much is computed at a time.
    """
    left_out = {*IRRELEVANT, *without}
    relevant = {name: value for name, value in describe(recipe).items() if name not in left_out}
    for stage in relevant.keys() & set(recipe.known_stages):
        relevant[stage].pop("accumulate", None)
    return {**relevant, **found}


def export_folders(recipe: Recipe, folder: Path) -> list[Path]:
    """Return the folders that a finished model goes to; none where another process writes."""
    if not is_main():
        return []
    return [folder / "model", *([Path(recipe.export)] if recipe.export else [])]


def stored_provenance(model: str | Path) -> dict[str, Any]:
    """Read the provenance of a model's folder; empty where it has none."""
    stored = Path(model) / PROVENANCE
    found: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    return found


def provenance(recipe: Recipe, run: Path, **found: Any) -> dict[str, Any]:
    """Describe where weights come from: code version, machine, seconds of every stage, recipe, and hashes of the data.

    run: the run's folder, with a folder for each stage. found: hashes of the data, by what they are.
    """
    stages = [name for name in recipe.known_stages if (run / name / SECONDS).exists()]
    seconds = {name: seconds_of(run / name) for name in stages}
    return {**origin(), "seconds": seconds, "recipe": describe(recipe), **found}


def write_provenance(target: Path, made: dict[str, Any], before: dict[str, Any] | None = None) -> None:
    """Write `provenance.json`; `before`: that of the model that a training started from, to which this one is added."""
    found = made if before is None else {**before, "then": [*before.get("then", []), made]}
    write_text(target / PROVENANCE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def seconds_of(stage: Path) -> int:
    """Return the seconds that a stage has been trained for, from its folder."""
    return round(sum(float(line) for line in (stage / SECONDS).read_text(encoding="utf-8").split()))
