"""Do a generator and a base belong together? A generator and a backbone enter; hooks leave, or an error.

What they share is names and widths: of the adapted weights, and of the condition's tokens. A fingerprint is a short
hash of the former, so that two people can see at a glance whether they speak of the same base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from openwu.adapters.experts import ExpertRouting
from openwu.adapters.inject import AdapterHandle, attach
from openwu.backbones.protocol import Backbone, ConditionEncoder
from openwu.conditions import describe_encoder, make_encoder
from openwu.config import GeneratorConfig, LayerGroup
from openwu.errors import TargetError
from openwu.files.hashing import of_bytes
from openwu.generator.model import ParameterGenerator
from openwu.kernels.placement import hook_device
from openwu.types import Adapter, Target

CONDITION_KEY = "_condition"
"""Key of a generator's config under which its condition encoder is described; none: the base makes the condition."""

SHOWN = 3
"""How many differing names an error lists."""

TargetWidths = Mapping[str, tuple[int, int, int | None]]
"""Path of an adapted weight -> (A_dim, B_dim, experts)."""


def generator_config(
    backbone: Backbone,
    *,
    encoder: ConditionEncoder | None = None,
    rank: int = 16,
    alpha: float = 16,
    token_dim: int = 1024,
    d_model: int = 1024,
    head_dim: int = 128,
    dim_accumulation: int = 4,
    num_pg_layers: int = 8,
) -> GeneratorConfig:
    """The config of a new generator that adapts all of a base's layer groups and reads its or an encoder's conditions.

    What an encoder needs to be made again is kept in the config, so that an editor finds it there.
    """
    (_, first), *more = (encoder or backbone).condition_widths.items()
    extra = {} if encoder is None else {CONDITION_KEY: describe_encoder(encoder)}
    return GeneratorConfig(
        rank=rank,
        alpha=alpha,
        token_dim=token_dim,
        input_dim=first,
        d_model=d_model,
        head_dim=head_dim,
        dim_accumulation=dim_accumulation,
        num_pg_layers=num_pg_layers,
        groups=backbone.layer_groups(),
        more_inputs=dict(more),
        extra=extra,
    )


def target_widths(groups: Iterable[LayerGroup]) -> TargetWidths:
    """Every adapted weight of some layer groups."""
    return {
        group.layer_path(layer) + name: (in_dim, out_dim, experts)
        for group in groups
        for layer in range(group.num_layers)
        for name, in_dim, out_dim, experts, _ in group.weights()
    }


def fingerprint(targets: TargetWidths) -> str:
    """Twelve hexadecimal digits that depend on the names and widths alone, in whatever order they stand."""
    lines = sorted(f"{name} {in_dim} {out_dim} {experts}" for name, (in_dim, out_dim, experts) in targets.items())
    return of_bytes(["\n".join(lines).encode()]).hexdigest()[:12]


def check_targets(config: GeneratorConfig, backbone: Backbone, name: str) -> None:
    """Raise TargetError unless the base has every weight that the generator adapts.

    A generator may leave weights of the base alone; `name` is the base's, for the message.
    """
    ours, theirs = target_widths(config.groups), target_widths(backbone.layer_groups())
    differing = [
        f"{path} ({_shown(widths)}, here {_shown(theirs[path]) if path in theirs else 'none'})"
        for path, widths in ours.items()
        if theirs.get(path) != widths
    ]
    if differing:
        raise TargetError(
            f"generator: it was made for another base than this {name}: targets {fingerprint(ours)} ({len(ours)}) "
            f"against {fingerprint(theirs)} ({len(theirs)}), {len(differing)} of them not the same, first "
            f"{'; '.join(differing[:SHOWN])}. Load the base that it was trained on, or train one for this base"
        )


def encoder_for(config: GeneratorConfig, backbone: Backbone, name: str) -> ConditionEncoder:
    """What makes the conditions that a generator was trained on: the base itself, or the encoder its config names.

    Raises TargetError where its conditions have other widths than those that the generator reads.
    """
    described = config.extra.get(CONDITION_KEY)
    encoder = backbone if described is None else make_encoder(described, backbone)
    (_, first), *more = encoder.condition_widths.items()
    if config.input_dim != first or dict(config.more_inputs) != dict(more):
        raise TargetError(
            f"generator: it reads conditions of widths {config.input_dim} {dict(config.more_inputs)}, but this {name} "
            f"makes {first} {dict(more)}; load the base that it was trained on, or train one for this base"
        )
    return encoder


def attach_generator(backbone: Backbone, generator: ParameterGenerator, name: str | None = None) -> AdapterHandle:
    """The hooks on a base for what a generator writes, after `check_targets`."""
    check_targets(generator.config, backbone, name or type(backbone).__name__)
    routing = None if backbone.routing is None else ExpertRouting(*backbone.routing)
    return attach(backbone.denoiser, generator.targets, routing=routing)


def placed(adapter: Adapter, backbone: Backbone) -> Adapter:
    """The adapter with all factors on the device where their module computes: a base may be spread over several."""
    modules = dict(backbone.denoiser.named_modules())
    homes = {target.name: _home(modules, target) for target in adapter.targets}
    factors = {
        name: {part: tensor.to(homes[name]) for part, tensor in parts.items()}
        for name, parts in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def _home(modules: Mapping[str, nn.Module], target: Target) -> torch.device | None:
    """Where a target's module runs: offloaded ones say so by accelerate's hook, others have their weights there."""
    path = target.name if target.experts is None else target.name.rpartition(".")[0]
    inside: list[Any] = list(modules[path].modules())
    weighted = next((each for each in inside if getattr(each, "weight", None) is not None), None)
    # Parts may be offloaded one by one or whole, so that the hook is on a module around: the nearest one counts.
    around = [modules[path.rsplit(".", depth)[0]] for depth in range(path.count(".") + 1)]
    for module in (weighted, *around, modules.get("")):
        if module is not None and (device := hook_device(module)) is not None:
            return device
    return None if weighted is None else torch.device(weighted.weight.device)


def _shown(widths: tuple[int, int, int | None]) -> str:
    in_dim, out_dim, experts = widths
    return f"{in_dim} -> {out_dim}" + ("" if experts is None else f" x {experts} experts")
