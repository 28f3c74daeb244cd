"""PEFT's adapter folder: writes and reads one sample's adapter.

`adapter_config.json` is a `LoraConfig`; `adapter_model.safetensors` has `base_model.model.{module}.lora_A.weight`
`[r, in]` and `.lora_B.weight` `[out, r]`, of convolutions `[r, in, kh, kw]` and `[out, r, 1, 1]`. Experts: see
`peft_experts`. Which operators PEFT can hold:

| operators of an adapter | folder |
|---|---|
| `lora` | LoRA |
| `offset`, also beside `lora` on other modules | LoRA with `lora_bias`: the offset is the bias of B, A and B are zero |
| `scale` | (IA)^3, see `peft_ia3` |
| others, or `scale` beside others | refused: PEFT has no such tuner |

Shapes: r rank, E experts, kh and kw height and width of a convolution's kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openwu.errors import CheckpointError, OpenwuError
from openwu.export.files import CONFIG, METADATA, PREFIX, WEIGHTS, write
from openwu.export.fit import Update, combine, exact, folded, in_file_shape, single
from openwu.export.native import tensors_of
from openwu.export.peft_experts import place_experts, read_experts, read_parameters, unstacked
from openwu.export.peft_ia3 import save_ia3
from openwu.types import LORA, Adapter

BIAS = ".lora_B.bias"
SCALE, OFFSET = "scale", "offset"
REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
"""Options of PEFT under which the folder's A and B would mean something else than `W x + scale * B (A x)`."""


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
    if operators == {SCALE}:
        save_ia3(adapter, folder, model)
        return
    biased = OFFSET in operators
    if not operators <= {LORA, OFFSET} or (biased and any(target.experts for target in adapter.targets)):
        raise OpenwuError(
            f"peft: expected {LORA} targets, {OFFSET} targets (also beside LoRA without experts), or {SCALE} targets "
            f"alone, got {', '.join(sorted(operators))}; PEFT cannot hold these in one folder: save with "
            "format='openwu', or merge the adapter into the weights"
        )
    experts = place_experts(adapter, model)
    plain, biases = _plain_modules(adapter)
    pairs = plain | experts.modules
    modules, rank = list(pairs), adapter.rank or 1
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
    if experts.parameters:
        config["target_parameters"] = list(experts.names)
    tensors: dict[str, Tensor] = {}
    for stem, (a, b) in pairs.items():
        tensors[f"{PREFIX}{stem}.lora_A.weight"], tensors[f"{PREFIX}{stem}.lora_B.weight"] = a, b
    if biased:
        tensors |= {PREFIX + name + BIAS: bias for name, bias in biases.items()}
    write(folder, WEIGHTS, tensors, config, experts.metadata(adapter))


def _plain_modules(adapter: Adapter) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """A and B of every target without experts, and the bias beside its B. Of an offset A and B are zeros of rank 1."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for target in adapter.targets:
        if target.operator == LORA and target.experts is None:
            pairs[target.name] = in_file_shape(adapter, target)
            biases[target.name] = pairs[target.name][1].new_zeros(target.out_dim)
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
    """What `save_peft` or PEFT wrote. `model` is needed where experts have several parameters in one container."""
    refused = [key for key in REFUSED if config.get(key)]
    if refused or config.get("bias", "none") != "none":
        raise CheckpointError(f"{CONFIG}: expected a plain LoRA, got one with {', '.join(refused) or 'bias'}")
    end = ".lora_A.weight"
    stems = [key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end)]
    listed = config.get("target_modules")
    if isinstance(listed, list) and set(listed) == set(stems):
        stems = listed
    biases = {stem: tensors[PREFIX + stem + BIAS] for stem in stems if PREFIX + stem + BIAS in tensors}
    if config.get("lora_bias"):
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(BIAS)}
    keys = {stem: {part: f"{PREFIX}{stem}.lora_{part}.weight" for part in "AB"} for stem in stems}
    pairs = {stem: (parts["A"], parts["B"]) for stem, parts in tensors_of(tensors, keys).items()}
    updates: dict[str, Update] = {}
    if METADATA in metadata:
        updates, order = read_experts(metadata[METADATA], pairs, lambda name: _scale(config, name)[1])
        plain = {stem: pair for stem, pair in pairs.items() if stem in order}
    else:
        parameters = config.get("target_parameters") or []
        plain, held = read_parameters(parameters, pairs, model)
        for name, (a, b) in held.items():
            rank, scale = _scale(config, name)
            if len(a) % rank or a.ndim != 2 or b.ndim != 2 or b.shape[1] != len(a):
                raise CheckpointError(
                    f"{name}: expected A [E * {rank}, in] and B [out, {rank} * E], "
                    f"got {tuple(a.shape)} and {tuple(b.shape)}"
                )
            updates[name] = Update(*unstacked(a, b, len(a) // rank), scale)
        order = [*plain, *held]
    for name, (a, b) in plain.items():
        rank, scale = _scale(config, name)
        updates[name] = Update.of(name, a, b, scale)
        if updates[name].rank != rank:
            raise CheckpointError(f"{name}: expected rank {rank}, got tensors of rank {updates[name].rank}")
    if config.get("lora_bias"):
        return _with_offsets({name: updates[name] for name in order}, biases)
    return combine({name: updates[name] for name in order})


def _with_offsets(updates: Mapping[str, Update], biases: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a folder with `lora_bias`: a module has a LoRA or an offset, whichever is not zero."""
    both = [name for name, each in updates.items() if name not in biases or (each.b.any() and biases[name].any())]
    if both:
        raise CheckpointError(
            f"expected modules with a LoRA or with a bias beside it, got both for {', '.join(both)}; an adapter has "
            "one operator for a module"
        )
    offsets = {name: each for name, each in updates.items() if not each.a.any() and not each.b.any()}
    plain = {name: each for name, each in updates.items() if name not in offsets}
    lora = combine(plain) if plain else None
    scale = next(iter(updates.values())).scale if lora is None else lora.scale
    targets, factors = [], {}
    for name, each in updates.items():
        if lora is not None and name in plain:
            targets.append(next(target for target in lora.targets if target.name == name))
            factors[name] = lora.factors[name]
        else:
            targets.append(replace(each.target(name), operator=OFFSET))
            factors[name] = {OFFSET: folded(biases[name], each.scale / scale)[None]}
    return Adapter(tuple(targets), factors, scale)


def _scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and scale of one module, as PEFT finds them: patterns fit whole names or their ends."""
    rank = _pattern(config, "rank_pattern", name, config.get("r"))
    alpha = _pattern(config, "alpha_pattern", name, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not isfinite(alpha):
        raise CheckpointError(f"{CONFIG}: expected numbers r and lora_alpha, got {rank!r} and {alpha!r}")
    return rank, alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(config: Mapping[str, Any], field: str, name: str, default: Any) -> Any:
    patterns = config.get(field) or {}
    try:
        return next((v for key, v in patterns.items() if re.match(rf"(?:.*\.)?(?:{key})$", name)), default)
    except (AttributeError, re.error) as error:
        raise CheckpointError(f"{CONFIG}: {field}: expected pattern -> number, got {patterns!r}") from error


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
