"""The layers of a base that receive adapters: a module and names enter, groups of alike layers leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from openwu.config import LayerGroup, PlainTarget
from openwu.errors import TargetError


def find_groups(model: nn.Module, name: str, layers: Iterable[str], targets: Sequence[str]) -> tuple[LayerGroup, ...]:
    """Groups of alike layers: for every path in `layers`, the linear maps at `targets` below it, and their widths.

    A target may be absent from some layers; raises TargetError when one is nowhere or is no linear map.
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
                raise TargetError(f"{layer}.{target}: expected a linear map, got {type(module).__name__}")
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


def double_and_single(
    denoiser: nn.Module, double_targets: Sequence[str], single_targets: Sequence[str]
) -> tuple[LayerGroup, ...]:
    """The groups of a transformer as Flux has it: blocks with a stream each for text and picture, then joint ones."""
    model: Any = denoiser
    double = [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
    single = [f"single_transformer_blocks.{i}" for i in range(len(model.single_transformer_blocks))]
    return (
        *find_groups(denoiser, "double_blocks", double, double_targets),
        *find_groups(denoiser, "single_blocks", single, single_targets),
    )
