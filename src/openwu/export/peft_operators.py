"""RoAd and norm tuning in PEFT's adapter folder, and DoRA's magnitudes: write one sample's adapter.

| targets | folder | tensors |
|---|---|---|
| `rotation` on linear modules | `RoadConfig`, road_1, groups of 2 | `road_theta`, `road_alpha` `[out / 2]` |
| `scale`, `offset`, `scale_offset` on norms | `LNTuningConfig` | the norm's weight and bias, so a model is needed |
| `dora` | `LoraConfig` with `use_dora` | `lora_magnitude_vector` |W| (1 + s g), so a model is needed |

PEFT's files hold no neutral zeros but values beside the base's own, hence what only the base knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.merge import merged_weights
from openwu.adapters.operators.norms import is_norm
from openwu.errors import OpenwuError
from openwu.export.files import PREFIX, WEIGHTS, write
from openwu.export.fit import exact
from openwu.types import Adapter

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
    write(folder, WEIGHTS, tensors, config)


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


def _config(adapter: Adapter, kind: str, model: nn.Module | None) -> dict[str, Any]:
    names = [target.name for target in adapter.targets]
    return {
        "peft_type": kind,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": names if model is None else exact(names, model),
    }
