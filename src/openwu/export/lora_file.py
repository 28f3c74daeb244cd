"""Read one LoRA file of diffusers, kohya's scripts, ComfyUI, OneTrainer or PEFT as an `Adapter` of one sample.

A key is a prefix, a module's name and a suffix. Names with dots stand for themselves; names whose dots are underscores
(`lora_unet_...`) are looked up in the model. A module's scale is alpha / r: alpha is its `.alpha` tensor, or what the
header states (see `peft_config`), or r.

Shapes: r rank, kh and kw height and width of a convolution's kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose

import torch
from torch import Tensor, nn

from openwu.errors import CheckpointError
from openwu.export.files import check_numbers, listed, plain_keys
from openwu.export.fit import Bias, Update, combine, refuse_expert_modules
from openwu.export.peft_config import KOHYA_ALPHA, LoraSettings, header_settings, kohya_scale
from openwu.types import Adapter

SUFFIXES = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".lora.down.weight": ".lora.up.weight",
    "_lora.down.weight": "_lora.up.weight",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
    ".lora_A": ".lora_B",
}
"""Suffix of A -> suffix of B."""
ALPHA, MID, BIAS, BIAS_CHANGE = ".alpha", ".lora_mid.weight", ".lora_B.bias", ".diff_b"

DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "module.")
"""Prefixes before names with dots, one or several."""
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lora_prior_unet_", "lycoris_")
"""Prefixes before names with underscores for dots."""
TEXT_ENCODER = re.compile(
    r"(base_model\.model\.|module\.)?"
    r"(text_encoders?(_?\d)?\.|te\d?\.|clip_[lgh]\.|t5(xxl)?\.|text_model\.|cond_stage_model\.|conditioner\.|bundle_emb\.|"
    r"lora_te\d*[_.]|lora_prior_te_|lycoris_te\d*_|lycoris_text_encoder)"
)
"""How keys for text encoders begin; `bundle_emb.` are OneTrainer's trained embeddings."""
REFUSED = {
    "DoRA, which also scales the base's weights": ("dora_scale", "lora_magnitude_vector"),
    "LoHa, a product of low-rank matrices, number by number": (".hada_",),
    "LoKr, a Kronecker product": (".lokr_",),
    "OFT, which rotates the base's weights": (".oft_",),
    "whole weights": (".diff", ".set_weight", ".w_norm", ".b_norm", ".reshape_weight"),
    "embeddings of tokens": (".lora_embedding_",),
}
"""What files may hold that is no sum `W + scale * B A` -> parts of its keys."""


@dataclass(frozen=True)
class Parts:
    """What a file holds for one module."""

    a: Tensor
    """[r, in] or [r, in, kh, kw]; of a change of the bias alone [1, in] zeros"""
    b: Tensor
    """[out, r] or [out, r, 1, 1]"""
    alpha: float | None = None
    bias: Tensor | None = None
    """[out], beside B, so times the module's scale."""
    bias_change: Tensor | None = None
    """[out], added as it is."""


def read_lora_file(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: nn.Module | None, skip_text_encoders: bool
) -> Adapter:
    """The adapter, with targets in the order of the file. Raises CheckpointError for anything that is not plain LoRA.

    `model`, where given, decides what a key's name means, and is needed for names with underscores.
    """
    texts = [key for key in tensors if TEXT_ENCODER.match(key)]
    if texts and not skip_text_encoders:
        raise CheckpointError(
            f"{len(texts)} tensors are for text encoders, which adapters here do not reach: {listed(texts)}; "
            "leave them out with skip_text_encoders=True (--skip-text-encoders)"
        )
    tensors = {key: tensor for key, tensor in tensors.items() if not TEXT_ENCODER.match(key)}
    for kind, marks in REFUSED.items():
        if keys := [key for key in tensors if any(_marks(mark, key) for mark in marks)]:
            raise CheckpointError(f"expected a plain LoRA, got {kind}: {listed(keys)}")
    check_numbers(tensors)
    stems = _stems(plain_keys(tensors, model), model)
    if not stems:
        raise CheckpointError(f"expected the LoRA of at least one module, got {listed(list(tensors)) or 'no tensors'}")
    names = _names(list(stems), model)
    settings = header_settings(metadata)
    updates: dict[str, Update] = {}
    biases: dict[str, Bias] = {}
    for stem, parts in stems.items():
        name = names[stem]
        if name in updates:
            raise CheckpointError(f"{stem}: the file has {name} twice")
        update = Update.of(stem, parts.a, parts.b, 1.0)
        scale = _scale(stem, name, update.rank, parts.alpha, _of_component(stem, settings), metadata)
        updates[name] = Update.of(stem, parts.a, parts.b, scale)
        for value, factor in ((parts.bias, scale), (parts.bias_change, 1.0)):
            if value is None:
                continue
            if value.shape != (len(parts.b),) or not value.is_floating_point():
                raise CheckpointError(f"{stem}: expected a bias [{len(parts.b)}], got {tuple(value.shape)}")
            if name in biases:
                raise CheckpointError(f"{stem}: the file has two changes of its bias, {BIAS} and {BIAS_CHANGE}")
            biases[name] = Bias(value, factor)
    return combine(updates, biases)


def _marks(mark: str, key: str) -> bool:
    """Whether a key holds a mark; those of whole weights are its end, as `.diff_b` is another one than `.diff`."""
    return key.endswith(mark) if mark == ".diff" else mark in key


def _stems(tensors: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Parts]:
    """Key without its suffix -> what the file has for it; every tensor must belong to one."""
    stems: dict[str, Parts] = {}
    used: set[str] = set()
    for key, a in tensors.items():
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            continue
        stem = key.removesuffix(suffix)
        other = stem + SUFFIXES[suffix]
        if other not in tensors:
            raise CheckpointError(f"{key}: expected {other} with it, which is missing")
        if stem in stems:
            raise CheckpointError(f"{stem}: the file has A and B in two key styles")
        beside = {part: tensors.get(stem + part) for part in (ALPHA, MID, BIAS, BIAS_CHANGE)}
        if (mid := beside[MID]) is not None:
            a = _without_mid(stem, a, mid)
        alpha = _alpha(stem + ALPHA, beside[ALPHA])
        stems[stem] = Parts(a, tensors[other], alpha, beside[BIAS], beside[BIAS_CHANGE])
        used |= {key, other, *(stem + part for part in beside)}
    for key, change in tensors.items():
        if key.endswith(BIAS_CHANGE) and key not in used:
            stem = key.removesuffix(BIAS_CHANGE)
            used |= {key, stem + ALPHA}
            a = change.new_zeros(1, _width(stem, model))
            stems[stem] = Parts(a, change.new_zeros(change.numel(), 1), bias_change=change)
    if unknown := [key for key in tensors if key not in used]:
        raise CheckpointError(f"expected only LoRA's A, B and alpha, got {len(unknown)} others: {listed(unknown)}")
    return stems


def _without_mid(stem: str, down: Tensor, mid: Tensor) -> Tensor:
    """A `[r, in, kh, kw]`, in float32 or wider, of LoCon's Tucker form: down `[s, in, 1, 1]`, mid `[r, s, kh, kw]`."""
    if down.ndim != 4 or mid.ndim != 4 or down.shape[2:].numel() != 1 or mid.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"{stem}: expected lora_down [s, in, 1, 1] and lora_mid [r, s, kh, kw], "
            f"got {tuple(down.shape)} and {tuple(mid.shape)}"
        )
    if not (down.is_floating_point() and mid.is_floating_point()):
        raise CheckpointError(f"{stem}: expected floating-point numbers, got {down.dtype} and {mid.dtype}")
    wide = torch.float64 if torch.float64 in (down.dtype, mid.dtype) else torch.float32
    return torch.einsum("rskl,si->rikl", mid.to(wide), down.flatten(1).to(wide))


def _width(stem: str, model: nn.Module | None) -> int:
    """Width of the input of a module of which a file only has a change of the bias."""
    if model is None:
        raise CheckpointError(
            f"{stem}{BIAS_CHANGE}: a change of a bias alone does not say how wide the module's input is; "
            "pass model=... (--base FOLDER)"
        )
    module = model.get_submodule(_names([stem], model)[stem])
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise CheckpointError(f"{stem}: expected an nn.Linear or nn.Conv2d, got {type(module).__name__}")
    return module.weight[0].numel()


def _alpha(key: str, alpha: Tensor | None) -> float | None:
    if alpha is None:
        return None
    if alpha.numel() != 1 or alpha.is_complex():
        raise CheckpointError(f"{key}: expected one finite number, got {alpha.dtype} of shape {tuple(alpha.shape)}")
    return float(alpha.to(torch.float64).item())


def _of_component(stem: str, settings: Mapping[str, LoraSettings]) -> LoraSettings | None:
    """The header's settings for a stem: those of the component that it begins with, or of the only denoiser's."""
    for component in sorted(settings, key=len, reverse=True):
        if component and stem.startswith(f"{component}."):
            return settings[component]
    return next(iter(settings.values())) if len(settings) == 1 else settings.get("")


def _scale(
    stem: str, name: str, rank: int, alpha: float | None, stated: LoraSettings | None, metadata: Mapping[str, str]
) -> float:
    """A module's scale by its alpha tensor and by the header; CheckpointError where they differ or leave it open."""
    by_tensor = None if alpha is None else alpha / rank
    if stated is not None and (stated.alpha is not None or stated.alpha_pattern or stated.rslora):
        by_header = stated.scale(name, rank)
        if by_tensor is not None and not isclose(by_tensor, by_header, rel_tol=1e-3):
            raise CheckpointError(
                f"{stem}: its alpha tensor means a scale of {by_tensor:g}, the file's header one of {by_header:g}; "
                "remove the one that is wrong"
            )
        return by_header if by_tensor is None else by_tensor
    if stated is not None and stated.rank_of(name) not in (None, rank):
        raise CheckpointError(f"{stem}: expected rank {stated.rank_of(name)} by the header, got tensors of rank {rank}")
    if by_tensor is not None:
        return by_tensor
    by_training = kohya_scale(metadata, rank)
    if by_training is not None and not isclose(by_training, 1.0, rel_tol=1e-3):
        raise CheckpointError(
            f"{stem}: by the header's {KOHYA_ALPHA} the training's scale was {by_training:g}, but the file has no "
            "alpha tensors, and other tools then take 1: say which one is meant by saving the file with the header "
            f"lora_alpha={metadata[KOHYA_ALPHA]} or lora_alpha={rank}"
        )
    return 1.0


def _names(stems: Sequence[str], model: nn.Module | None) -> dict[str, str]:
    """Stem -> name of its module; without a model prefixes are only cut off."""
    modules = None if model is None else {name for name, _ in model.named_modules() if name}
    flat: dict[str, list[str]] = {}
    for name in modules or ():
        flat.setdefault(name.replace(".", "_"), []).append(name)
    names: dict[str, str] = {}
    problems: list[str] = []
    for stem in stems:
        prefix = next((prefix for prefix in UNDERSCORED if stem.startswith(prefix)), None)
        if prefix is not None and modules is None:
            raise CheckpointError(
                f"{stem}: a name with underscores for dots means nothing without its model; pass model=... "
                "(--base FOLDER)"
            )
        found = flat.get(stem.removeprefix(prefix), []) if prefix is not None else _dotted(stem, modules)
        if len(found) == 1:
            names[stem] = found[0]
        else:
            problems.append(f"{stem} ({' or '.join(found) if found else 'no such module'})")
    if problems:
        assert model is not None
        refuse_expert_modules([_dotted(stem, None)[0] for stem in stems], model)
        raise CheckpointError(f"{len(problems)} of {len(stems)} names do not fit the model: {listed(problems)}")
    return names


def _dotted(stem: str, modules: set[str] | None) -> list[str]:
    """What a name with dots means: itself, or without its prefixes; in diffusers' old style, of its processor."""
    choices = [stem]
    while prefix := next((prefix for prefix in DOTTED if choices[-1].startswith(prefix)), None):
        choices.append(choices[-1].removeprefix(prefix))
    if ".processor." in choices[-1]:
        plain = choices[-1].replace(".processor.", ".")
        choices.append(f"{plain}.0" if plain.endswith(".to_out") else plain)
    if modules is None:
        return choices[-1:]
    return [name for name in choices if name in modules][:1]
