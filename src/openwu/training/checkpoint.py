"""Training checkpoints: weights, optimiser state, EMA weights and the step in one safetensors file.

The file is written beside the old one and renamed over it, so that a training killed at any moment finds the last whole
checkpoint. Data depend on the step alone and need not be stored. Sharded weights are gathered before they are written
and sharded again when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.errors import CheckpointError
from openwu.files.writing import atomic_file
from openwu.training.distributed import full_state, shard_like
from openwu.training.optimizers import EmaWeights, StageOptimizer

STATE = "state.safetensors"


def save_state(
    folder: Path,
    module: nn.Module,
    optimizer: StageOptimizer,
    step: int,
    recipe: str,
    ema: EmaWeights | None = None,
    main: bool = True,
) -> None:
    """Write a checkpoint; every process calls it, since each may hold a shard, and only the `main` one writes.

    step: updates made so far. recipe: a description that a resumed training must match.
    """
    tensors: dict[str, Tensor] = {f"weight/{name}": value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state_of(parameter).items()}
    if ema is not None:
        tensors |= {f"average/{name}": value for name, value in ema.values.items()}
    tensors = full_state(tensors)
    if not main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / STATE) as part:
        save_file(tensors, part, {"step": str(step), "recipe": recipe})


def load_state(
    folder: Path, module: nn.Module, optimizer: StageOptimizer, recipe: str, ema: EmaWeights | None = None
) -> int:
    """Restore a checkpoint that `save_state` wrote; return the updates made, 0 where there is none."""
    path = folder / STATE
    if not path.exists():
        return 0
    step = check_recipe(folder, recipe)
    tensors = load_file(path)
    averages = _under("average/", tensors)
    target = {} if ema is None else ema.values
    if averages.keys() != target.keys():
        raise CheckpointError(
            f"{path}: expected moving averages of {len(target)} parameters, got {len(averages)}; "
            "set ema as it was, or train into another folder"
        )
    _fill(module, _under("weight/", tensors))
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(shard_like(averages[name], value))
    states: dict[str, dict[str, Tensor]] = {}
    for stored, value in _under("optimizer/", tensors).items():
        key, _, name = stored.partition("/")
        states.setdefault(name, {})[key] = value
    for name, parameter in module.named_parameters():
        if name in states:
            optimizer.set_state_of(parameter, {k: shard_like(v, parameter) for k, v in states[name].items()})
    return step


def check_recipe(folder: Path, recipe: str) -> int:
    """Return the updates made by the training in `folder`, 0 for none; raise CheckpointError for another recipe's."""
    path = folder / STATE
    if not path.exists():
        return 0
    step, stored_recipe = read_state_header(path)
    if stored_recipe != recipe:
        changed = _changed_fields(stored_recipe, recipe)
        raise CheckpointError(
            f"{path} was written by another recipe (changed: {changed}); "
            "train into another folder with --output, or delete this one"
        )
    return step


def read_state_header(path: Path) -> tuple[int, str]:
    """Read (step, recipe) of a checkpoint without its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        return int(header["step"]), header["recipe"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a training state written by openwu ({error}); delete it to start anew"
        ) from error


def load_weights(folder: Path, module: nn.Module, steps: int) -> None:
    """Load the weights of a stage that is finished after so many steps: its EMA weights where it kept some."""
    path = folder / STATE
    if not path.exists():
        raise CheckpointError(f"{path}: expected the state of an earlier stage; run the recipe's stages in order")
    made, _ = read_state_header(path)
    if made < steps:
        raise CheckpointError(f"{path}: expected a finished stage of {steps} steps, got {made}; train it to the end")
    tensors = load_file(path)
    _fill(module, _under("weight/", tensors) | _under("average/", tensors))


def _under(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}


def _fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({name: shard_like(v, own[name]) if name in own else v for name, v in weights.items()})


def _changed_fields(stored: str, given: str) -> str:
    before, after = json.loads(stored), json.loads(given)
    return ", ".join(sorted(key for key in {*before, *after} if before.get(key) != after.get(key)))
