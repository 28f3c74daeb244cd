"""One LoRA file of diffusers, kohya's scripts, ComfyUI or PEFT's tensors enters, an `Adapter` of one sample leaves.

A key is a prefix, a module's name and a suffix. Names with dots stand for themselves; names whose dots are underscores
(`lora_unet_...`) are looked up in the model. A module's scale is its `.alpha` / r, or 1 where it has none.

Shapes: r rank, kh and kw height and width of a convolution's kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from openwu.errors import CheckpointError
from openwu.export.fit import Update, combine
from openwu.types import Adapter

SUFFIXES = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".lora.down.weight": ".lora.up.weight",
    "_lora.down.weight": "_lora.up.weight",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
    ".lora_A": ".lora_B",
}
"""Suffix of A -> suffix of B."""
ALPHA = ".alpha"

DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
"""Prefixes before names with dots."""
UNDERSCORED = ("lora_unet_", "lora_transformer_")
"""Prefixes before names with underscores for dots."""
TEXT_ENCODER = re.compile(r"(text_encoders?(_\d)?\.|lora_te\d*_|lora_prior_te_|cond_stage_model\.)")
DORA = ("dora_scale", "lora_magnitude_vector")
SHOWN = 5
"""How many names an error lists."""


def read_lora_file(tensors: Mapping[str, Tensor], model: nn.Module | None, skip_text_encoders: bool) -> Adapter:
    """The adapter, with targets in the order of the file. Raises CheckpointError for anything that is not plain LoRA.

    `model`, where given, decides what a key's name means, and is needed for names with underscores.
    """
    if dora := [key for key in tensors if any(mark in key for mark in DORA)]:
        raise CheckpointError(f"expected a plain LoRA, got DoRA, which also scales the base's weights: {listed(dora)}")
    texts = [key for key in tensors if TEXT_ENCODER.match(key)]
    if texts and not skip_text_encoders:
        raise CheckpointError(
            f"{len(texts)} tensors are for text encoders, which adapters here do not reach: {listed(texts)}; "
            "leave them out with skip_text_encoders=True (--skip-text-encoders)"
        )
    stems = _stems({key: tensor for key, tensor in tensors.items() if not TEXT_ENCODER.match(key)})
    if not stems:
        raise CheckpointError(f"expected the LoRA of at least one module, got {listed(list(tensors)) or 'no tensors'}")
    names = _names(list(stems), model)
    updates: dict[str, Update] = {}
    for stem, (a, b, alpha) in stems.items():
        if names[stem] in updates:
            raise CheckpointError(f"{stem}: the file has {names[stem]} twice")
        updates[names[stem]] = Update.of(stem, a, b, 1.0 if alpha is None else alpha / max(len(a), 1))
    return combine(updates)


def listed(keys: Sequence[str]) -> str:
    """The first few keys."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(sorted(keys)[:SHOWN]) + more


def _stems(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float | None]]:
    """Key without its suffix -> (A, B, alpha or None); every tensor must have its place."""
    stems: dict[str, tuple[Tensor, Tensor, float | None]] = {}
    used: set[str] = set()
    for key, a in tensors.items():
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            continue
        stem = key.removesuffix(suffix)
        other, alpha = stem + SUFFIXES[suffix], stem + ALPHA
        if other not in tensors:
            raise CheckpointError(f"{key}: expected {other} with it, which is missing")
        if stem in stems:
            raise CheckpointError(f"{stem}: the file has A and B in two key styles")
        stems[stem] = a, tensors[other], _alpha(alpha, tensors.get(alpha))
        used |= {key, other, alpha}
    if unknown := [key for key in tensors if key not in used]:
        raise CheckpointError(f"expected only LoRA's A, B and alpha, got {len(unknown)} others: {listed(unknown)}")
    return stems


def _alpha(key: str, alpha: Tensor | None) -> float | None:
    if alpha is None:
        return None
    if alpha.numel() != 1 or not bool(alpha.isfinite().all()):
        raise CheckpointError(f"{key}: expected one finite number, got {alpha.dtype} of shape {tuple(alpha.shape)}")
    return float(alpha.item())


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
        raise CheckpointError(f"{len(problems)} of {len(stems)} names do not fit the model: {listed(problems)}")
    return names


def _dotted(stem: str, modules: set[str] | None) -> list[str]:
    """What a name with dots means: itself, or without its prefixes; in diffusers' old style, of its processor."""
    choices = [stem]
    for prefix in DOTTED:
        if choices[-1].startswith(prefix):
            choices.append(choices[-1].removeprefix(prefix))
    if ".processor." in choices[-1]:
        plain = choices[-1].replace(".processor.", ".")
        choices.append(f"{plain}.0" if plain.endswith(".to_out") else plain)
    if modules is None:
        return choices[-1:]
    return [name for name in choices if name in modules][:1]
