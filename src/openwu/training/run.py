"""Run a recipe: load it, check the stages, and call the function that its config class names."""

from __future__ import annotations

import importlib
from pathlib import Path

from openwu.errors import OpenwuError
from openwu.training.config import load_recipe
from openwu.training.distributed import process_group_scope


def run_recipe(
    path: Path, overrides: list[str], *, output: Path | None = None, stages: list[str] | None = None
) -> Path:
    """Train a recipe's stages in order; return the run's folder. Finished stages are skipped, interrupted ones resume.

    overrides: `key=value`, dots for nesting. output: the run's folder; None: `runs/` and the recipe's name. stages:
    None for those of the recipe. Raises OpenwuError for a stage that the recipe does not have.
    """
    recipe = load_recipe(path, overrides)
    folder = output or Path("runs") / recipe.name
    known = recipe.known_stages
    unknown = sorted(set(stages or ()) - set(known))
    if unknown:
        raise OpenwuError(f"stages: expected some of {list(known)}, got {unknown}")
    chosen = None if stages is None else tuple(stage for stage in known if stage in stages)
    module, _, function = recipe.runner.partition(":")
    with process_group_scope():
        getattr(importlib.import_module(module), function)(recipe, folder, chosen)
    return folder
