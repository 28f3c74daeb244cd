"""PEFT's adapter folder: one sample's adapter enters or leaves.

`adapter_config.json` is a `LoraConfig`; `adapter_model.safetensors` has `base_model.model.{module}.lora_A.weight`
`[r, in]` and `.lora_B.weight` `[out, r]`, of convolutions `[r, in, kh, kw]` and `[out, r, 1, 1]`. Experts: see
`peft_experts`.

Shapes: r rank, E experts, kh and kw height and width of a convolution's kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openwu.errors import CheckpointError, OpenwuError
from openwu.export.files import CONFIG, WEIGHTS, write
from openwu.export.fit import Update, combine, in_file_shape, single
from openwu.export.native import pairs_of
from openwu.export.peft_experts import METADATA, place_experts, read_experts, read_parameters, unstacked
from openwu.types import Adapter

PREFIX = "base_model.model."
REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "lora_bias",
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
    experts = place_experts(adapter, model)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for target in adapter.targets:
        if target.experts is None:
            pairs[target.name] = in_file_shape(adapter, target)
    modules = [*pairs, *experts.modules]
    wide = {name: len(a) for name, (a, _) in experts.modules.items() if len(a) != adapter.rank}
    pairs |= experts.modules | experts.parameters
    alpha = adapter.scale * adapter.rank
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": modules if model is None else exact(modules, model),
    }
    if wide:
        config["rank_pattern"] = {f"^{re.escape(name)}": rank for name, rank in wide.items()}
        config["alpha_pattern"] = {f"^{re.escape(name)}": _number(adapter.scale * rank) for name, rank in wide.items()}
    if experts.parameters:
        config["target_parameters"] = list(experts.names)
    tensors: dict[str, Tensor] = {}
    for stem, (a, b) in pairs.items():
        tensors[f"{PREFIX}{stem}.lora_A.weight"], tensors[f"{PREFIX}{stem}.lora_B.weight"] = a, b
    write(folder, WEIGHTS, tensors, config, experts.metadata(adapter))


def exact(modules: Sequence[str], model: nn.Module) -> list[str] | str:
    """`target_modules` that mean these modules of the model and no others.

    PEFT takes a list's entries for the ends of names, too: `proj_out` is also `blocks.0.proj_out`. Where that would
    adapt more modules than are meant, a regular expression stands for the list.
    """
    ends = tuple(f".{name}" for name in modules)
    more = [name for name, _ in model.named_modules() if name.endswith(ends) and name not in set(modules)]
    return "|".join(re.escape(name) for name in modules) if more else list(modules)


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
    pairs = pairs_of(tensors, stems, PREFIX + "{name}.lora_{part}.weight")
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
    return combine({name: updates[name] for name in order})


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
