"""RoAd, norm tuning and DoRA's magnitudes in PEFT's adapter folder, both ways.

| targets | folder | tensors |
|---|---|---|
| `rotation` on linear modules | `RoadConfig`, road_1, groups of 2 | `road_theta`, `road_alpha` `[out / 2]` |
| `scale`, `offset`, `scale_offset` on norms | `LNTuningConfig` | the norm's weight and bias, so a model is needed |
| `dora` | `LoraConfig` with `use_dora` | `lora_magnitude_vector` |W| (1 + s g), so a model is needed |

PEFT's files hold no neutral zeros but values beside the base's own, hence what only the base knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.merge import merged_weights
from openwu.adapters.operators.norms import is_norm
from openwu.errors import CheckpointError, OpenwuError
from openwu.export.files import CONFIG, METADATA, PREFIX, WEIGHTS, write
from openwu.export.fit import exact, fitted
from openwu.export.native import tensors_of
from openwu.export.peft_config import in_listed_order
from openwu.export.peft_ia3 import GAIN, SCALE, input_widths
from openwu.types import Adapter, Target

OFFSET, SCALE_OFFSET = "offset", "scale_offset"
ROTATION, TURNS = "rotation", "turns"
DORA, MAGNITUDE = "dora", "magnitude"
NORM_LAYERS = ".ln_tuning_layers"


def save_rotations(adapter: Adapter, folder: Path, model: nn.Module | None) -> None:
    """Write one sample of `rotation` targets on linear modules, which alone PEFT's RoAd knows."""
    modules = {} if model is None else dict(model.named_modules())
    pictures = [
        target.name
        for target in adapter.targets
        if target.kernel is not None or isinstance(modules.get(target.name), nn.Conv2d)
    ]
    if pictures:
        raise OpenwuError(
            f"peft: RoAd knows linear modules alone, got convolutions: {', '.join(pictures)}; save with "
            "format='openwu', or merge the adapter into the weights"
        )
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        p, q = (adapter.scale * adapter.factors[target.name][TURNS][0].to(torch.float64)).unbind(-1)
        tensors[f"{PREFIX}{target.name}.road_theta"] = torch.atan2(q, 1 + p).float()
        tensors[f"{PREFIX}{target.name}.road_alpha"] = torch.hypot(1 + p, q).float()
    config = _config(adapter, "ROAD", model) | {"variant": "road_1", "group_size": 2, "init_weights": True}
    inputs = {target.name: target.in_dim for target in adapter.targets}
    write(folder, WEIGHTS, tensors, config, {METADATA: json.dumps({"in_dims": inputs, "kernels": {}})})


def read_rotations(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: nn.Module | None
) -> Adapter:
    """Read what `save_rotations` or PEFT wrote, at scale 1. `model` is needed for files without our metadata.

    Raises CheckpointError for RoAd of other variants or groups, whose pairs are not neighbours.
    """
    if (kind := (config.get("variant", "road_1"), config.get("group_size"))) != ("road_1", 2):
        raise CheckpointError(f"{CONFIG}: expected RoAd of variant 'road_1' and group_size 2, got {kind}")
    end = ".road_theta"
    stems = [key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end)]
    stems = in_listed_order(stems, config)
    keys = {stem: {part: f"{PREFIX}{stem}.road_{part}" for part in ("theta", "alpha")} for stem in stems}
    found = tensors_of(tensors, keys, dims=1)
    widths = input_widths(metadata, stems, model, "RoAd")
    targets: list[Target] = []
    factors: dict[str, dict[str, Tensor]] = {}
    for stem, parts in found.items():
        theta, alpha = (parts[name].double() for name in ("theta", "alpha"))
        if theta.ndim != 1 or theta.shape != alpha.shape:
            raise CheckpointError(
                f"{stem}: expected road_theta and road_alpha [out / 2], got {tuple(theta.shape)} and "
                f"{tuple(alpha.shape)}"
            )
        turns = torch.stack([alpha * theta.cos() - 1, alpha * theta.sin()], dim=-1)
        targets.append(Target(stem, widths[stem][0], 2 * len(theta), operator=ROTATION))
        factors[stem] = {TURNS: turns.float()[None]}
    return Adapter(tuple(targets), factors, 1.0)


def read_norms(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module | None) -> Adapter:
    """Read what `save_norms` or PEFT wrote, as gains and offsets of the model's own norms, at scale 1.

    Raises CheckpointError without a model, and where a weight is zero, which no gain can change.
    """
    if model is None:
        raise CheckpointError("norm tuning holds weights, not changes of them; pass model=... (--base FOLDER)")
    stems = list(
        dict.fromkeys(key.removeprefix(PREFIX).partition(NORM_LAYERS)[0] for key in tensors if NORM_LAYERS in key)
    )
    stems = in_listed_order(stems, config)
    modules = dict(model.named_modules())
    targets: list[Target] = []
    factors: dict[str, dict[str, Tensor]] = {}
    if missing := [stem for stem in stems if stem not in modules or not is_norm(modules[stem])]:
        raise CheckpointError(f"{', '.join(missing)}: expected norms of these names in the model, found none")
    parameters = {stem: dict(modules[stem].named_parameters()) for stem in stems}
    keys = {stem: {name: f"{PREFIX}{stem}{NORM_LAYERS}.{name}" for name in own} for stem, own in parameters.items()}
    for stem, held in tensors_of(tensors, keys, dims=1).items():
        own = parameters[stem]
        if wrong := [name for name, part in held.items() if part.shape != own[name].shape]:
            raise CheckpointError(f"{stem}: expected {', '.join(wrong)} of the shape that the model's has")
        before, after = own["weight"].detach().double(), held["weight"].double()
        if bool(((before == 0) & (after != 0)).any()):
            raise CheckpointError(f"{stem}: the model's weight has zeros, which no gain can change")
        gain = torch.where(before == 0, 0.0, after / before - 1)
        parts = {GAIN: gain.float()[None]}
        if "bias" in own:
            parts[OFFSET] = (held["bias"].double() - own["bias"].detach().double() * (1 + gain)).float()[None]
        operator = SCALE_OFFSET if "bias" in own else SCALE
        targets.append(Target(stem, len(gain), len(gain), operator=operator))
        factors[stem] = parts
    return Adapter(tuple(targets), factors, 1.0)


def on_norms(adapter: Adapter, model: nn.Module | None) -> bool:
    """Return whether all targets are norms of the model; OpenwuError where some are and some are not."""
    if model is None:
        return False
    modules = dict(model.named_modules())  # experts' names are those of parameters or of lists
    norms = [each.name for each in adapter.targets if each.name in modules and is_norm(modules[each.name])]
    if norms and len(norms) < len(adapter.targets):
        raise OpenwuError(
            f"peft: norms ({', '.join(norms)}) and other modules cannot be in one folder of PEFT; save with "
            "format='openwu', or merge the adapter into the weights"
        )
    return bool(norms)


def save_norms(adapter: Adapter, folder: Path, model: nn.Module) -> None:
    """Write one sample of targets that are norms: their parameters as they are with the adapter."""
    changed = merged_weights(model, adapter)
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        for name, parameter in model.get_submodule(target.name).named_parameters():
            tensors[f"{PREFIX}{target.name}{NORM_LAYERS}.{name}"] = changed.get(f"{target.name}.{name}", parameter)
        own = [name for name in ("weight", "bias") if f"{target.name}.{name}" in changed]
        if added := [name for name in own if f"{PREFIX}{target.name}{NORM_LAYERS}.{name}" not in tensors]:
            raise OpenwuError(
                f"peft: {target.name}: the norm has no {' and no '.join(added)} that PEFT could replace; save with "
                "format='openwu'"
            )
    write(folder, WEIGHTS, tensors, _config(adapter, "LN_TUNING", model))


def magnitudes(adapter: Adapter, model: nn.Module | None) -> dict[str, Tensor]:
    """Return `lora_magnitude_vector` of every `dora` target, `[out]` or of a convolution `[1, out, 1, 1]`."""
    if model is None:
        raise OpenwuError(
            "peft: DoRA's magnitudes are absolute, and adapters hold them relative to the base's row norms: pass "
            "model=... (--base FOLDER), or save with format='openwu'"
        )
    found: dict[str, Tensor] = {}
    for target in adapter.targets:
        weight = model.get_submodule(target.name).get_parameter("weight").detach().float()
        gain = adapter.factors[target.name][MAGNITUDE][0].float()
        vector = weight.flatten(1).norm(dim=1) * (1 + adapter.scale * gain)
        found[target.name] = vector if target.kernel is None else vector.view(1, -1, 1, 1)
    return found


def with_magnitudes(adapter: Adapter, vectors: Mapping[str, Tensor], model: nn.Module | None) -> Adapter:
    """Return the `dora` adapter of a low-rank one beside magnitudes, target name -> `[out]` or `[1, out, 1, 1]`.

    Raises CheckpointError without a model, for experts, for other modules or shapes than those of the low-rank
    updates, and where a row of the model's weight is zero, which no gain can change.
    """
    if model is None:
        raise CheckpointError(
            f"{CONFIG}: use_dora: DoRA's magnitudes are absolute, and only the base has the row norms that they stand "
            "beside; pass model=... (--base FOLDER)"
        )
    adapter = fitted(adapter, model)
    names = {target.name for target in adapter.targets}
    if experts := [target.name for target in adapter.targets if target.experts is not None]:
        raise CheckpointError(f"{CONFIG}: use_dora: expected modules without experts, got {', '.join(experts)}")
    if wrong := sorted(names ^ set(vectors)):
        raise CheckpointError(
            f"{CONFIG}: use_dora: expected a lora_magnitude_vector for every module with lora_A, and for no other; "
            f"these do not have both: {', '.join(wrong)}"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    for target in adapter.targets:
        norms = model.get_submodule(target.name).get_parameter("weight").detach().double().flatten(1).norm(dim=1)
        vector = vectors[target.name].double()
        if vector.numel() != len(norms) or vector.shape not in ((len(norms),), (1, len(norms), 1, 1)):
            raise CheckpointError(
                f"{target.name}: expected lora_magnitude_vector [{len(norms)}], got {tuple(vector.shape)}"
            )
        vector = vector.flatten()
        if bool(((norms == 0) & (vector != 0)).any()):
            raise CheckpointError(f"{target.name}: the model's weight has rows of zeros, which no magnitude can change")
        gain = torch.where(norms == 0, 0.0, vector / norms - 1) / adapter.scale
        factors[target.name] = {**adapter.factors[target.name], MAGNITUDE: gain.float()[None]}
    return replace(
        adapter, targets=tuple(replace(target, operator=DORA) for target in adapter.targets), factors=factors
    )


def _config(adapter: Adapter, kind: str, model: nn.Module | None) -> dict[str, Any]:
    names = [target.name for target in adapter.targets]
    return {
        "peft_type": kind,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": names if model is None else exact(names, model),
    }
