"""PEFT's adapter folder: write and read one sample's adapter.

`adapter_config.json` is a `LoraConfig`; `adapter_model.safetensors` has `base_model.model.{module}.lora_A.weight`
`[r, in]` and `.lora_B.weight` `[out, r]`, of convolutions `[r, in, kh, kw]` and `[out, r, 1, 1]`. Experts: see
`peft_experts`. Which operators PEFT can hold:

| operators of an adapter | folder |
|---|---|
| `lora` | LoRA |
| basis LoRA | multiplied out: LoRA |
| `offset`, `lora+offset`, also beside `lora` | LoRA with `lora_bias`: the offset is the bias of B, maybe of zeros |
| `dora` | LoRA with `use_dora`, see `peft_operators`; both ways need the base |
| `scale` | (IA)^3, see `peft_ia3` |
| `rotation` on linear modules | RoAd, see `peft_operators` |
| `scale`, `offset`, `scale_offset` on norms | norm tuning, see `peft_operators`; both ways need the base |
| others, or these beside one another | refused: PEFT has no such tuner |

Shapes: r rank, E experts, kh and kw height and width of a convolution's kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openwu.errors import CheckpointError, OpenwuError
from openwu.export.files import CONFIG, METADATA, PREFIX, WEIGHTS, plain_keys, write
from openwu.export.fit import LORA_OFFSET, OFFSET, Bias, Update, combine, exact, in_file_shape, single
from openwu.export.native import tensors_of
from openwu.export.peft_config import LoraSettings, in_listed_order
from openwu.export.peft_experts import place_experts, read_experts, read_parameters, unstacked
from openwu.export.peft_ia3 import save_ia3
from openwu.export.peft_operators import (
    DORA,
    ROTATION,
    magnitudes,
    on_norms,
    save_norms,
    save_rotations,
    with_magnitudes,
)
from openwu.types import LORA, Adapter

BIAS = ".lora_B.bias"
VECTOR = ".lora_magnitude_vector"
SCALE = "scale"
EXPERT_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Last names of modules that PEFT's conversion from transformers 4 to 5 takes for routers and experts."""


def save_peft(adapter: Adapter, folder: Path, model: nn.Module | None, component: str | None) -> None:
    """Write one sample as PEFT reads it.

    A convolution needs its `kernel` (`model` tells it where the target does not), or it is written like a linear
    module's and PEFT refuses the shape. PEFT's own convolutions ignore dilation and padding mode. Experts are laid out
    as `model` holds them; without it as three-dimensional parameters, one to a container.
    """
    if component is not None:
        raise OpenwuError(f"component: a PEFT folder is for one model, got {component!r}; leave it out")
    adapter = single(adapter, "peft", model)
    operators = {target.operator for target in adapter.targets}
    if model is not None and on_norms(adapter, model):
        save_norms(adapter, folder, model)
        return
    if operators == {ROTATION}:
        save_rotations(adapter, folder, model)
        return
    if operators == {SCALE}:
        save_ia3(adapter, folder, model)
        return
    biased = bool({OFFSET, LORA_OFFSET} & operators)
    known = operators <= {LORA, OFFSET, LORA_OFFSET} or operators == {DORA}
    if not known or (biased and any(target.experts for target in adapter.targets)):
        raise OpenwuError(
            f"peft: expected {LORA} targets, {OFFSET} targets (also beside LoRA without experts), or {SCALE}, "
            f"{ROTATION} or {DORA} targets alone, got {', '.join(sorted(operators))}; PEFT cannot hold these in one "
            "folder: save with format='openwu', or merge the adapter into the weights"
        )
    vectors = magnitudes(adapter, model) if operators == {DORA} else {}
    if model is not None:
        _check_convolutions(adapter, model)
    experts = place_experts(adapter, model)
    plain, biases = _plain_modules(adapter)
    pairs = plain | experts.modules
    taken = [] if model is None else _taken_for_experts(list(plain), model)
    if taken and biased:
        raise OpenwuError(f"peft: PEFT takes {', '.join(taken)} for experts, which have no lora_bias; use 'openwu'")
    modules, rank = [name for name in pairs if name not in taken], adapter.rank or 1
    other = {name: len(a) for name, (a, _) in pairs.items() if len(a) != rank}
    pairs |= experts.parameters
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(adapter.scale * rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": modules if model is None else exact(modules, model),
    }
    if other:
        config["rank_pattern"] = {f"^{re.escape(name)}": own for name, own in other.items()}
        config["alpha_pattern"] = {f"^{re.escape(name)}": _number(adapter.scale * own) for name, own in other.items()}
    if biased:
        config["lora_bias"] = True
    if vectors:
        config["use_dora"] = True
    if experts.parameters or taken:
        config["target_parameters"] = [*experts.names, *(f"{name}.weight" for name in taken)]
    tensors: dict[str, Tensor] = {}
    for stem, (a, b) in pairs.items():
        tensors[f"{PREFIX}{stem}.lora_A.weight"], tensors[f"{PREFIX}{stem}.lora_B.weight"] = a, b
    if biased:
        tensors |= {PREFIX + name + BIAS: bias for name, bias in biases.items()}
    tensors |= {PREFIX + name + VECTOR: vector for name, vector in vectors.items()}
    write(folder, WEIGHTS, tensors, config, experts.metadata(adapter))


def _check_convolutions(adapter: Adapter, model: nn.Module) -> None:
    """PEFT's LoRA convolves with zeros as padding and without dilation, whatever the module does."""
    modules = dict(model.named_modules())
    held = {target.name: modules.get(target.name) for target in adapter.targets}
    wrong = [
        f"{name} (dilation {module.dilation}, padding mode {module.padding_mode})"
        for name, module in held.items()
        if isinstance(module, nn.Conv2d) and (module.dilation != (1, 1) or module.padding_mode != "zeros")
    ]
    if wrong:
        raise OpenwuError(
            f"peft: PEFT's convolutions know no dilation and pad with zeros alone, got {', '.join(wrong)}; save with "
            "format='openwu', or merge the adapter into the weights"
        )


def _taken_for_experts(names: list[str], model: nn.Module) -> list[str]:
    """The linear modules that PEFT would take for experts when it loads the folder.

    For transformers' models with stacked experts PEFT rewrites `target_modules` of these last names to the experts'
    parameters, also those of dense and shared MLPs. Named as parameters, they stay what they are.
    """
    if not hasattr(model, "config") or all("gate_up_proj" not in module._parameters for module in model.modules()):
        return []
    return [name for name in names if name.rpartition(".")[2] in EXPERT_NAMES]


def _plain_modules(adapter: Adapter) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """A and B of every target without experts, and the bias beside its B. Of an offset A and B are zeros of rank 1."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for target in adapter.targets:
        if target.operator in (LORA, LORA_OFFSET, DORA) and target.experts is None:
            pairs[target.name] = in_file_shape(adapter, target)
            biases[target.name] = pairs[target.name][1].new_zeros(target.out_dim)
            if target.operator == LORA_OFFSET:
                biases[target.name] = adapter.factors[target.name][OFFSET][0]
        elif target.operator == OFFSET:
            biases[target.name] = offset = adapter.factors[target.name][OFFSET][0]
            a, b = offset.new_zeros(1, target.in_dim), offset.new_zeros(target.out_dim, 1)
            if target.kernel is not None:
                a, b = a.view(1, -1, *target.kernel), b[:, :, None, None]
            pairs[target.name] = a, b
    return pairs, biases


def read_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: nn.Module | None
) -> Adapter:
    """What `save_peft` or PEFT wrote. `model` is needed where experts have several parameters in one container, and for
    DoRA."""
    if config.get("use_dora"):
        return _read_dora(config, plain_keys(tensors, model), metadata, model)
    settings = LoraSettings.of(config, CONFIG, complete=True)
    tensors = plain_keys(tensors, model)
    end = ".lora_A.weight"
    stems = [key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end)]
    stems = in_listed_order(stems, config)
    biases: dict[str, Bias] = {}
    if config.get("lora_bias"):
        held = {stem: tensors.get(PREFIX + stem + BIAS) for stem in stems}
        if missing := [stem for stem, bias in held.items() if bias is None]:
            raise CheckpointError(f"{CONFIG}: lora_bias: expected a bias for every module, missing for {missing}")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(BIAS)}
    keys = {stem: {part: f"{PREFIX}{stem}.lora_{part}.weight" for part in "AB"} for stem in stems}
    pairs = {stem: (parts["A"], parts["B"]) for stem, parts in tensors_of(tensors, keys).items()}
    updates: dict[str, Update] = {}
    if METADATA in metadata:
        updates, order = read_experts(metadata[METADATA], pairs, lambda name, rank: settings.scale(name, rank))
        plain = {stem: pair for stem, pair in pairs.items() if stem in order}
    else:
        plain, stacked = read_parameters(_names(config, "target_parameters"), pairs, model)
        for name, (a, b) in stacked.items():
            rank = settings.rank_of(name) or 0
            if not rank or a.ndim != 2 or b.ndim != 2 or len(a) % rank or b.shape[1] != len(a):
                raise CheckpointError(
                    f"{name}: expected A [E * {rank}, in] and B [out, {rank} * E], "
                    f"got {tuple(a.shape)} and {tuple(b.shape)}"
                )
            module, _, parameter = name.rpartition(".")
            if parameter == "weight" and len(a) == rank:
                plain[module] = a, b
            else:
                updates[name] = Update(*unstacked(a, b, len(a) // rank), settings.scale(name, rank))
        order = [*plain, *updates]
    for name, (a, b) in plain.items():
        update = Update.of(name, a, b, 1.0)
        updates[name] = replace(update, scale=settings.scale(name, update.rank))
    if config.get("lora_bias"):
        biases = {name: Bias(bias, updates[name].scale) for name, bias in held.items() if bias is not None}
    return combine({name: updates[name] for name in order}, biases)


def _read_dora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: nn.Module | None
) -> Adapter:
    """Read DoRA: the folder's LoRA, and its magnitudes beside the base's row norms."""
    if also := [key for key in ("lora_bias", "target_parameters") if config.get(key)]:
        raise CheckpointError(f"{CONFIG}: use_dora: expected DoRA alone, got it with {', '.join(also)}")
    vectors = {key.removeprefix(PREFIX).removesuffix(VECTOR): each for key, each in tensors.items() if VECTOR in key}
    low_rank = {key: each for key, each in tensors.items() if VECTOR not in key}
    plain = {key: value for key, value in config.items() if key != "use_dora"}
    return with_magnitudes(read_peft(plain, low_rank, metadata, model), vectors, model)


def _names(config: Mapping[str, Any], field: str) -> list[str]:
    names = config.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{CONFIG}: {field}: expected a list of names, got {names!r}")
    return names


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
