"""Check that a generator and a base belong together, and attach the generator's targets to the base.

What they share is names and widths: of the adapted weights, and of the condition's tokens. A fingerprint is a short
hash of the former, so that two people can see at a glance whether they speak of the same base.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from openwu.adapters.experts import ExpertRouting
from openwu.adapters.inject import AdapterHandle, attach
from openwu.adapters.merge import merged_copy, merging_pays
from openwu.backbones.protocol import Backbone
from openwu.conditions import Encoder, describe_encoder, make_encoder
from openwu.config import LORA, GeneratorConfig, LayerGroup
from openwu.errors import TargetError
from openwu.files.hashing import of_bytes
from openwu.generator.model import ParameterGenerator
from openwu.kernels.modules import hook_device
from openwu.types import Adapter, ConditionEncoder, Target

SHOWN = 3
"""How many differing names an error lists."""

TargetWidths = Mapping[str, tuple[int, int, int | None]]
"""Path of an adapted weight -> (A_dim, B_dim, experts)."""


def generator_config(
    backbone: Backbone,
    *,
    encoder: Encoder | None = None,
    rank: int = 16,
    alpha: float = 16,
    token_dim: int = 1024,
    d_model: int = 1024,
    head_dim: int = 128,
    dim_accumulation: int = 4,
    num_pg_layers: int = 8,
    operator: str = LORA,
) -> GeneratorConfig:
    """The config of a new generator that adapts all of a base's layer groups and reads its or an encoder's conditions.

    `operator`: what it writes for every target but those of experts, see `openwu.adapters.operators`.

    What an encoder needs to be made again is kept in the config, so that an editor finds it there.
    """
    (_, first), *more = (encoder or backbone).condition_widths.items()
    return GeneratorConfig(
        rank=rank,
        alpha=alpha,
        token_dim=token_dim,
        input_dim=first,
        d_model=d_model,
        head_dim=head_dim,
        dim_accumulation=dim_accumulation,
        num_pg_layers=num_pg_layers,
        groups=tuple(group.with_operator(operator) for group in backbone.layer_groups()),
        more_inputs=dict(more),
        condition_encoder=None if encoder is None else describe_encoder(encoder),
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
    described = config.condition_encoder
    encoder: ConditionEncoder = backbone if described is None else make_encoder(described, backbone)
    (_, first), *more = encoder.condition_widths.items()
    if config.input_dim != first or dict(config.more_inputs) != dict(more):
        raise TargetError(
            f"generator: it reads conditions of widths {config.input_dim} {dict(config.more_inputs)}, but this {name} "
            f"makes {first} {dict(more)}; load the base that it was trained on, or train one for this base"
        )
    return encoder


def check_generator(config: GeneratorConfig, backbone: Backbone, name: str) -> None:
    """Raise TargetError where a generator does not fit a base, which may be on the meta device.

    An encoder that takes the place of the base's conditions is checked when it is made: it may have weights.
    """
    check_targets(config, backbone, name)
    if config.condition_encoder is None:
        encoder_for(config, backbone, name)


def attach_generator(backbone: Backbone, generator: ParameterGenerator, name: str | None = None) -> AdapterHandle:
    """The hooks on a base for what a generator writes, after `check_targets`."""
    check_targets(generator.config, backbone, name or type(backbone).__name__)
    routing = None if backbone.routing is None else ExpertRouting(*backbone.routing)
    return attach(backbone.denoiser, generator.targets, routing=routing)


class AdapterScope:
    """A `RequestScope` in which every request has its adapter (b = 1), all of one rank."""

    def __init__(
        self,
        backbone: Backbone,
        handle: AdapterHandle,
        adapters: Sequence[Adapter],
        lock: AbstractContextManager[object],
    ) -> None:
        """`lock`: held while the hooks apply what one thread asked for.

        Raises TargetError for adapters of other targets than those attached.
        """
        for adapter in adapters:
            handle.check_targets(adapter)
        self.backbone, self.handle, self.adapters, self.lock = backbone, handle, adapters, lock

    @contextmanager
    def rows(self, owners: Sequence[int]) -> Iterator[None]:
        """Apply each row's adapter through hooks; see `RequestScope`."""
        present = sorted({owner for owner in owners if owner >= 0})
        stacked = Adapter.stack([self.adapters[owner] for owner in present])
        samples = [present.index(owner) if owner >= 0 else -1 for owner in owners]
        # All rows of one request: however many a pass has, each is that request's.
        alone = set(samples) == {0}
        with self.lock, self.handle.applied(placed(stacked, self.backbone), rows=None if alone else samples):
            yield

    def prefers_module(self, rows: Mapping[str, int]) -> bool:
        """Return whether merging one adapter costs less than applying it to so many rows; see `RequestScope`."""
        adapter = self.adapters[0]
        return merging_pays(self.backbone.denoiser, adapter.targets, adapter.rank, rows)

    def module_for(self, owner: int) -> nn.Module:
        """Merge one request's adapter into a copy of the denoiser; see `RequestScope`."""
        return merged_copy(self.backbone.denoiser, self.adapters[owner])


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
    inside = list(modules[path].modules())
    weighted = next((each for each in inside if _weight(each) is not None), None)
    # Parts may be offloaded one by one or whole, so that the hook is on a module around: the nearest one counts.
    around = [modules[path.rsplit(".", depth)[0]] for depth in range(path.count(".") + 1)]
    for module in (weighted, *around, modules.get("")):
        if module is not None and (device := hook_device(module)) is not None:
            return device
    weight = None if weighted is None else _weight(weighted)
    return None if weight is None else weight.device


def _weight(module: nn.Module) -> Tensor | None:
    """A module's own weight, a buffer where it is quantised."""
    return dict(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))).get("weight")


def _shown(widths: tuple[int, int, int | None]) -> str:
    in_dim, out_dim, experts = widths
    return f"{in_dim} -> {out_dim}" + ("" if experts is None else f" x {experts} experts")
