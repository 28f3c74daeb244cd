"""What is written of a training beside its weights: the recipe as JSON, and the model's provenance.

Enters: a recipe, and the folder of its run. Leaves: plain values, and `provenance.json` in the folders of the model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from openwu.embedded import EmbeddedConfig
from openwu.training.loop import SECONDS
from openwu.training.processes import is_main
from openwu.training.recipe import Recipe, StageConfig

PROVENANCE = "provenance.json"


def describe(recipe: Recipe) -> dict[str, Any]:
    """Every number of a recipe, as JSON."""
    plain: dict[str, Any] = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    described_by_itself = (StageConfig, EmbeddedConfig)
    plain = {key: value.to_dict() if isinstance(value, described_by_itself) else value for key, value in plain.items()}
    described: dict[str, Any] = json.loads(json.dumps(plain))
    return described


def export_folders(recipe: Recipe, folder: Path) -> list[Path]:
    """None where another process writes."""
    if not is_main():
        return []
    return [folder / "model", *([Path(recipe.export)] if recipe.export else [])]


def write_provenance(target: Path, found: dict[str, Any]) -> None:
    (target / PROVENANCE).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def seconds_of(stage: Path) -> int:
    """How long a stage has been trained."""
    return round(sum(float(line) for line in (stage / SECONDS).read_text(encoding="utf-8").split()))
