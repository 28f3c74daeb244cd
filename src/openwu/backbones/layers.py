"""Find the linear layers of a base model that receive adapters, and group layers of equal widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from openwu.config import LayerGroup, PlainTarget
from openwu.errors import TargetError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections of a diffusers attention module."""
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""With those of a second (text) stream."""


def below(parents: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Return `parent.name` for every pair, parents outermost."""
    names = tuple(names)
    return tuple(f"{parent}.{name}" for parent in parents for name in names)


def find_groups(model: nn.Module, name: str, layers: Iterable[str], targets: Sequence[str]) -> tuple[LayerGroup, ...]:
    """Group the layers at the paths `layers` by the names and widths of their linear layers among `targets`.

    A target may be missing in some layers. Raises TargetError if one is missing in all of them or is no `nn.Linear`.
    """
    modules = dict(model.named_modules())
    alike: dict[tuple[PlainTarget, ...], list[str]] = {}
    seen: set[str] = set()
    for layer in layers:
        found = []
        for target in targets:
            module = modules.get(f"{layer}.{target}")
            if module is None:
                continue
            if not isinstance(module, nn.Linear):
                raise TargetError(f"{layer}.{target}: expected a linear layer, got {type(module).__name__}")
            found.append(PlainTarget(target, module.in_features, module.out_features))
            seen.add(target)
        if found:
            alike.setdefault(tuple(found), []).append(layer)
    if missing := [target for target in targets if target not in seen]:
        raise TargetError(
            f"{type(model).__name__}: none of its {name} has {', '.join(missing)}; this release of diffusers names or "
            "fuses them differently (pipelines must not have fused projections)"
        )
    groups = []
    for number, (found_targets, paths) in enumerate(alike.items()):
        own = name if len(alike) == 1 else f"{name}_{number}"
        prefix = paths[0].rpartition(".")[0] + "."
        if paths == [f"{prefix}{index}" for index in range(len(paths))]:
            groups.append(LayerGroup(prefix, len(paths), found_targets, own))
        else:
            groups.append(LayerGroup("", len(paths), found_targets, own, paths=tuple(paths)))
    return tuple(groups)


def block_groups(model: nn.Module, name: str, attribute: str, targets: Sequence[str]) -> tuple[LayerGroup, ...]:
    """Group all blocks of one module list of a model."""
    blocks: Any = getattr(model, attribute)
    return find_groups(model, name, below([attribute], map(str, range(len(blocks)))), targets)


def double_and_single(
    denoiser: nn.Module, double_targets: Sequence[str], single_targets: Sequence[str]
) -> tuple[LayerGroup, ...]:
    """Group the blocks of a Flux-like transformer: double-stream (text and image) blocks, then single-stream ones."""
    return (
        *block_groups(denoiser, "double_blocks", "transformer_blocks", double_targets),
        *block_groups(denoiser, "single_blocks", "single_transformer_blocks", single_targets),
    )
