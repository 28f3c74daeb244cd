"""Run a recipe: load its file, apply overrides, and call the function that its config class names."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openwu.errors import OpenwuError
from openwu.registry import resolve
from openwu.training.config import Recipe
from openwu.training.distributed import process_group_scope
from openwu.training.optimizers import multiplies_bfloat16


def run_recipe(
    path: Path,
    overrides: list[str],
    *,
    output: Path | None = None,
    stages: list[str] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Train a recipe's stages in order; return the run's folder. Finished stages are skipped, interrupted ones resume.

    overrides: `key=value`, dots for nesting. output: the run's folder; None: `runs/` and the recipe's name. stages:
    None for those of the recipe. note: is told which setting makes the training slow on this machine. Raises
    OpenwuError for a stage that the recipe does not have.
    """
    recipe = load_recipe(path, overrides)
    if recipe.bfloat16_on_cpu and not multiplies_bfloat16(torch.device("cpu")):
        note("this processor multiplies bfloat16 many times more slowly than float32; add bf16=false")
    folder = output or Path("runs") / recipe.name
    known = recipe.known_stages
    unknown = sorted(set(stages or ()) - set(known))
    if unknown:
        raise OpenwuError(f"stages: expected some of {list(known)}, got {unknown}")
    chosen = None if stages is None else tuple(stage for stage in known if stage in stages)
    with process_group_scope():
        resolve(recipe.runner)(recipe, folder, chosen)
    return folder


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Call a file's `recipe()` and apply `key=value` overrides. Raises OpenwuError for what is no recipe or field."""
    spec = importlib.util.spec_from_file_location("openwu_recipe", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise OpenwuError(f"recipe: expected a Python file with a function recipe(), found none at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, "recipe", None)
    made = build() if callable(build) else None
    if not isinstance(made, Recipe):
        raise OpenwuError(f"recipe: expected {path} to define recipe() -> Recipe, got {type(made).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise OpenwuError(f"override: expected key=value, got {override!r}")
        try:
            made = _replaced(made, key.split("."), value, key)
        except (TypeError, ValueError) as error:
            raise OpenwuError(f"override {key}: {error}") from error
    return made


def _replaced(config: Any, path: list[str], value: str, whole: str) -> Any:
    names = [each.name for each in dataclasses.fields(config)]
    if path[0] not in names:
        raise OpenwuError(f"override {whole}: expected one of {names}, got {path[0]!r}")
    current = getattr(config, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise OpenwuError(f"override {whole}: {path[0]} has no fields")
        return dataclasses.replace(config, **{path[0]: _replaced(current, path[1:], value, whole)})
    return dataclasses.replace(config, **{path[0]: _parsed(value, current, whole)})


def _parsed(text: str, current: Any, whole: str) -> Any:
    """Read a value of the field's own type."""
    if dataclasses.is_dataclass(current):
        raise OpenwuError(
            f"override {whole}: expected one of its fields, e.g. {whole}.{dataclasses.fields(current)[0].name}"
        )
    if isinstance(current, str) or current is None:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if isinstance(current, bool) else text)
    except (ValueError, SyntaxError):
        value = None
    if isinstance(current, float) and isinstance(value, int):
        value = float(value)
    if type(value) is not type(current):
        raise OpenwuError(f"override {whole}: expected {type(current).__name__} like {current!r}, got {text!r}")
    return value
