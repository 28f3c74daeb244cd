"""(IA)^3 in PEFT's adapter folder: write and read one sample's adapter of `scale` targets.

`adapter_config.json` is an `IA3Config` without feed-forward modules (PEFT multiplies the input of those, the output of
all others); `adapter_model.safetensors` has `base_model.model.{module}.ia3_l`, the multiplier 1 + scale * gain in
float32, `[out, 1]` of a linear module and `[1, out, 1, 1]` of a convolution. The file's metadata say how wide the
modules' inputs are, which PEFT's format leaves out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwu.errors import CheckpointError
from openwu.export.files import CONFIG, METADATA, PREFIX, WEIGHTS, write
from openwu.export.fit import exact
from openwu.export.native import tensors_of
from openwu.export.peft_config import in_listed_order
from openwu.types import Adapter, Target

IA3 = ".ia3_l"
GAIN, SCALE = "gain", "scale"


def save_ia3(adapter: Adapter, folder: Path, model: nn.Module | None) -> None:
    """Write one sample of `scale` targets. A convolution needs its `kernel`, which `model` tells."""
    names = [target.name for target in adapter.targets]
    config: dict[str, Any] = {
        "peft_type": "IA3",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": names if model is None else exact(names, model),
        "feedforward_modules": [],
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        multiplier = 1 + adapter.scale * adapter.factors[target.name][GAIN][0].to(torch.float32)
        shape = (-1, 1) if target.kernel is None else (1, -1, 1, 1)
        tensors[PREFIX + target.name + IA3] = multiplier.view(shape)
    inputs = {target.name: target.in_dim for target in adapter.targets}
    kernels = {target.name: target.kernel for target in adapter.targets if target.kernel is not None}
    write(folder, WEIGHTS, tensors, config, {METADATA: json.dumps({"in_dims": inputs, "kernels": kernels})})


def read_ia3(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: nn.Module | None
) -> Adapter:
    """Read what `save_ia3` or PEFT wrote, at scale 1. `model` is needed for files without our metadata."""
    stems = [key.removeprefix(PREFIX).removesuffix(IA3) for key in tensors if key.endswith(IA3)]
    stems = in_listed_order(stems, config)
    if inputs := [stem for stem in stems if _scales_input(config, stem)]:
        raise CheckpointError(
            f"{CONFIG}: expected multipliers of outputs, got feedforward_modules, whose inputs are scaled: "
            f"{', '.join(inputs)}"
        )
    found = tensors_of(tensors, {stem: {GAIN: PREFIX + stem + IA3} for stem in stems})
    held = input_widths(metadata, stems, model, "(IA)^3")
    targets = []
    factors: dict[str, dict[str, Tensor]] = {}
    for stem in stems:
        multiplier = found[stem][GAIN].flatten()
        if multiplier.element_size() == 1:  # float8 knows no differences
            multiplier = multiplier.to(torch.float32)
        in_dim, kernel = held[stem]
        targets.append(Target(stem, in_dim, len(multiplier), kernel=kernel, operator=SCALE))
        factors[stem] = {GAIN: (multiplier - 1)[None]}
    return Adapter(tuple(targets), factors, 1.0)


def _scales_input(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT takes a module for a feed-forward one: by a regular expression, or by the end of its name."""
    modules = config.get("feedforward_modules") or []
    try:
        if isinstance(modules, str):
            return re.fullmatch(modules, name) is not None
        return any(f".{name}".endswith(f".{each}") for each in modules)
    except (TypeError, re.error) as error:
        raise CheckpointError(f"{CONFIG}: feedforward_modules: expected names or a pattern, got {modules!r}") from error


def input_widths(
    metadata: Mapping[str, str], names: list[str], model: nn.Module | None, kind: str
) -> dict[str, tuple[int, tuple[int, int] | None]]:
    """Width of every module's input, and its kernel where it is a convolution.

    kind: what the file holds, for the error where neither the model nor our metadata say it.
    """
    if model is not None:
        modules = dict(model.named_modules())
        found: dict[str, tuple[int, tuple[int, int] | None]] = {}
        for name in names:
            module = modules.get(name)
            if isinstance(module, nn.Conv2d):
                height, width = module.kernel_size
                found[name] = module.in_channels * height * width, (height, width)
            elif isinstance(module, nn.Linear):
                found[name] = module.in_features, None
            else:
                raise CheckpointError(f"{name}: expected a linear module or convolution of that name in the model")
        return found
    if METADATA not in metadata:
        raise CheckpointError(
            f"{kind} files do not say how wide the modules' inputs are; pass model=... (--base FOLDER)"
        )
    try:
        stored = json.loads(metadata[METADATA])
        kernels = {name: (int(kernel[0]), int(kernel[1])) for name, kernel in stored["kernels"].items()}
        if sorted(stored["in_dims"]) != sorted(names):
            raise ValueError(f"widths of {sorted(stored['in_dims'])} for {sorted(names)}")
        return {name: (int(stored["in_dims"][name]), kernels.get(name)) for name in names}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"metadata {METADATA!r} do not fit the tensors: {error!r}") from error
