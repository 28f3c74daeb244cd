"""`openwu train`: train a model from a recipe."""

from __future__ import annotations

from pathlib import Path

from openwu.cli.console import note
from openwu.training.run import run_recipe


def run(recipe: str, overrides: list[str], *, output: str | None = None, stages: list[str] | None = None) -> Path:
    """Run the command; return the run's folder."""
    folder = Path(output) if output else None
    return run_recipe(Path(recipe), overrides, output=folder, stages=stages, note=note)
