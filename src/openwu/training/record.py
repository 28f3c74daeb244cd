"""What is written of a training beside its weights: the recipe as JSON, and the model's provenance.

Enters: a recipe, and the folder of its run. Leaves: plain values, and `provenance.json` in the folders of the model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from openwu.files.writing import write_text
from openwu.training.config import Recipe, StageConfig
from openwu.training.distributed import is_main
from openwu.training.embedded.model import EmbeddedConfig
from openwu.training.loop import SECONDS

PROVENANCE = "provenance.json"


def describe(recipe: Recipe) -> dict[str, Any]:
    """Every number of a recipe, as JSON. Fields that came later stand in it only where they are set."""
    fields = {each: getattr(recipe, each.name) for each in dataclasses.fields(recipe)}
    plain: dict[str, Any] = {
        each.name: value for each, value in fields.items() if not each.metadata or value != each.default
    }
    described_by_itself = (StageConfig, EmbeddedConfig)
    plain = {key: value.to_dict() if isinstance(value, described_by_itself) else value for key, value in plain.items()}
    described: dict[str, Any] = json.loads(json.dumps(plain))
    return described


def export_folders(recipe: Recipe, folder: Path) -> list[Path]:
    """None where another process writes."""
    if not is_main():
        return []
    return [folder / "model", *([Path(recipe.export)] if recipe.export else [])]


def stored_provenance(model: str | Path) -> dict[str, Any]:
    """Where the weights of a model's folder come from, as far as it says so."""
    stored = Path(model) / PROVENANCE
    found: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    return found


def write_provenance(target: Path, made: dict[str, Any], before: dict[str, Any] | None = None) -> None:
    """`before`: the provenance of the model that a training went on from; it keeps standing, this training after it."""
    found = made if before is None else {**before, "then": [*before.get("then", []), made]}
    write_text(target / PROVENANCE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def seconds_of(stage: Path) -> int:
    """How long a stage has been trained."""
    return round(sum(float(line) for line in (stage / SECONDS).read_text(encoding="utf-8").split()))
