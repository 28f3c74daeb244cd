"""The state of a training: weights, what the optimiser remembers, and the step, in one safetensors file.

Enters and leaves: a module, its optimiser, a step. Written beside the old file and renamed over it, so that a
training killed at any moment finds the last whole checkpoint. Nothing else has to be stored: data depend on the step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.errors import CheckpointError
from openwu.training.optimizer import StageOptimizer

STATE = "state.safetensors"


def save_state(folder: Path, module: nn.Module, optimizer: StageOptimizer, step: int, recipe: str) -> None:
    """`step`: how many updates have been made. `recipe`: a description that a resumed training must match."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {f"weight/{name}": value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state_of(parameter).items()}
    partial = folder / f".{STATE}.partial"
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, {"step": str(step), "recipe": recipe})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(folder / STATE)


def load_state(folder: Path, module: nn.Module, optimizer: StageOptimizer, recipe: str) -> int:
    """Continue where `save_state` stopped: returns the number of updates made, 0 where there is no state."""
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
    tensors = load_file(path)
    module.load_state_dict({k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")})
    remembered: dict[str, dict[str, Tensor]] = {}
    for stored, value in tensors.items():
        kind, _, rest = stored.partition("/")
        if kind == "optimizer":
            key, _, name = rest.partition("/")
            remembered.setdefault(name, {})[key] = value
    for name, parameter in module.named_parameters():
        if name in remembered:
            optimizer.set_state_of(parameter, remembered[name])
    return step


def read_state_header(path: Path) -> tuple[int, str]:
    """(step, recipe) of a state file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        return int(header["step"]), header["recipe"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a training state written by openwu ({error}); delete it to start anew"
        ) from error


def load_weights(folder: Path, module: nn.Module, steps: int) -> None:
    """Only the weights of a stage that is finished after so many steps."""
    path = folder / STATE
    if not path.exists():
        raise CheckpointError(f"{path}: expected the state of an earlier stage; run the recipe's stages in order")
    made, _ = read_state_header(path)
    if made < steps:
        raise CheckpointError(f"{path}: expected a finished stage of {steps} steps, got {made}; train it to the end")
    module.load_state_dict(
        {k.removeprefix("weight/"): v for k, v in load_file(path).items() if k.startswith("weight/")}
    )


def _changed_fields(stored: str, given: str) -> str:
    before, after = json.loads(stored), json.loads(given)
    return ", ".join(sorted(key for key in {*before, *after} if before.get(key) != after.get(key)))
