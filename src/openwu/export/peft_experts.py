"""Experts in PEFT's folder. How they are stored depends on how the model holds them:

- as one parameter `[E, out, in]` of their container (transformers' mixtures): PEFT's `target_parameters`. A is
  `[E * r, in]`, all rows of expert 0 first; B is `[out, r * E]`, all experts of column 0 first. Further parameters of a
  container nest: the one that the container registered last has the container's own key, each one before it one more
  `.base_layer`.
- as E modules with linear layers (HunyuanImage-3): every layer is a target of its own. A layer that stacks n adapted
  weights has rank `n * r`: their A above one another, their B in a block diagonal.

The file's metadata say which is which, so that reading gives back the same targets; PEFT ignores them, and drops them
when it writes the folder anew.

Shapes: E experts, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.experts import ExpertSite
from openwu.adapters.inject import resolve
from openwu.errors import CheckpointError, OpenwuError
from openwu.export.files import METADATA
from openwu.export.fit import Update, expert_parameter
from openwu.types import LORA_A, LORA_B, Adapter, Target

NESTED = ".base_layer"

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Path of a module in PEFT's model -> (A, B)"""


@dataclass
class Places:
    """Where an adapter's experts go."""

    modules: Pairs = field(default_factory=dict)
    """Linear layers of single experts."""
    parameters: Pairs = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    """The names of the parameters, in the order in which PEFT wraps them."""
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Target -> `stem` of its parameter, or `pieces` of modules, for each expert: stem, first row of A, first of B."""

    def metadata(self, adapter: Adapter) -> dict[str, str]:
        """For the file, so that `read_experts` finds the way back."""
        order = [target.name for target in adapter.targets]
        return {METADATA: json.dumps({"targets": order, "experts": self.experts})} if self.experts else {}


def place_experts(adapter: Adapter, model: nn.Module | None) -> Places:
    """The experts of one sample, as the model holds them; without a model as parameters, one to a container."""
    places = Places()
    containers: dict[str, list[Target]] = {}
    modules: list[Target] = []
    for target in adapter.targets:
        if target.experts is None:
            continue
        if model is None or expert_parameter(model, target) is not None:
            containers.setdefault(target.name.rpartition(".")[0], []).append(target)
        else:
            modules.append(target)
    for container, targets in containers.items():
        _place_parameters(places, adapter, container, targets, model)
    if modules:
        assert model is not None
        _place_modules(places, adapter, modules, model)
    return places


def _place_parameters(
    places: Places, adapter: Adapter, container: str, targets: Sequence[Target], model: nn.Module | None
) -> None:
    names = [target.name.rpartition(".")[2] for target in targets]
    if model is None and len(targets) > 1:
        raise OpenwuError(
            f"peft: {container}: how PEFT names {', '.join(names)} depends on the model's order of them; "
            "pass model=... (--base FOLDER)"
        )
    if not container:
        raise OpenwuError(f"peft: {names[0]}: PEFT cannot adapt a parameter of the model itself, only of its modules")
    if model is not None:
        names.sort(key=list(model.get_submodule(container)._parameters).index)
    pairs = _pairs(adapter)
    for depth, name in enumerate(reversed(names)):
        stem, target = container + NESTED * depth, f"{container}.{name}"
        a, b = (part[0] for part in pairs[target])
        places.parameters[stem] = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        places.experts[target] = {"experts": len(a), "stem": stem}
    places.names += [f"{container}.{name}" for name in names]


def _place_modules(places: Places, adapter: Adapter, targets: Sequence[Target], model: nn.Module) -> None:
    rank, pairs = adapter.rank, _pairs(adapter)
    places.experts |= {
        t.name: {"experts": t.experts, "out_dim": t.out_dim, "rank": rank, "pieces": []} for t in targets
    }
    sites = [site for site in resolve(model, targets) if isinstance(site, ExpertSite)]
    for site in sorted(sites, key=lambda site: next(site.placed())[1]):
        held = list(site.placed())
        a, b = pairs[held[0][0].name]
        stacked_a = a.new_zeros(rank * len(held), a.shape[-1])
        stacked_b = b.new_zeros(site.module.out_features, rank * len(held))
        for index, (target, expert, rows) in enumerate(held):
            a, b = pairs[target.name]
            columns = slice(index * rank, (index + 1) * rank)
            stacked_a[columns], stacked_b[rows, columns] = a[0, expert], b[0, expert]
            places.experts[target.name]["pieces"].append([site.path, columns.start, rows.start])
        places.modules[site.path] = stacked_a, stacked_b


def read_experts(
    text: str, pairs: Mapping[str, tuple[Tensor, Tensor]], scale: Callable[[str, int], float]
) -> tuple[dict[str, Update], list[str]]:
    """The experts of a file with our metadata, and the order of all targets. `scale`: of a module's name and rank."""
    updates: dict[str, Update] = {}
    used: set[str] = set()
    try:
        held = json.loads(text)
        order, experts = [str(name) for name in held["targets"]], held["experts"]
        for name, place in experts.items():
            count = int(place["experts"])
            if "stem" in place:
                used.add(place["stem"])
                a, b = unstacked(*pairs[place["stem"]], count)
                updates[name] = Update(a, b, scale(name, a.shape[1]))
                continue
            stems = [stem for stem, _, _ in place["pieces"]]
            used |= set(stems)
            if len(stems) != count:
                raise ValueError(f"{name}: {len(stems)} pieces for {count} experts")
            updates[name] = Update(*_pieces(place, pairs), scale(stems[0], len(pairs[stems[0]][0])))
        if sorted(order) != sorted([*experts, *(stem for stem in pairs if stem not in used)]):
            raise ValueError(f"targets {order} for {sorted(pairs)}")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"metadata {METADATA!r} do not fit the tensors: {error!r}") from error
    return updates, order


def _pieces(place: Mapping[str, Any], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A `[E, r, in]` and B `[E, out, r]` from the modules of single experts."""
    parts_a, parts_b = [], []
    rank = int(place["rank"])
    for stem, column, row in place["pieces"]:
        a, b = pairs[stem]
        parts_a.append(a[column : column + rank])
        parts_b.append(b[row : row + int(place["out_dim"]), column : column + rank])
    return torch.stack(parts_a), torch.stack(parts_b)


def read_parameters(
    listed: Sequence[str], pairs: Mapping[str, tuple[Tensor, Tensor]], model: nn.Module | None
) -> tuple[Pairs, Pairs]:
    """The pairs of modules, and those of the parameters in `target_parameters`, under the parameters' names."""
    plain: Pairs = dict(pairs)
    stacked: Pairs = {}
    for container in dict.fromkeys(_container(stem) for stem in pairs):
        ends = {name.rpartition(".")[2]: name for name in listed if _means(name, container)}
        if not ends:
            continue
        names, stems = list(ends), [stem for stem in pairs if _container(stem) == container]
        if len(names) > 1:
            if model is None:
                raise CheckpointError(
                    f"{container}: PEFT's file does not say which of its tensors are whose of {', '.join(names)}; "
                    "pass model=... (--base FOLDER)"
                )
            held = list(dict(model.named_modules()).get(container, nn.Module())._parameters)
            names = [name for name in held if name in ends]
        expected = [container + NESTED * depth for depth in range(len(names))]
        if sorted(expected) != sorted(stems):
            raise CheckpointError(f"{container}: expected tensors of {expected} for {list(ends)}, got those of {stems}")
        for stem, name in zip(expected, reversed(names), strict=True):
            stacked[f"{container}.{name}"] = plain.pop(stem)
    return plain, stacked


def unstacked(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's A `[E * r, in]` and B `[out, r * E]` -> A `[E, r, in]`, B `[E, out, r]`."""
    return a.reshape(experts, -1, a.shape[-1]), b.reshape(len(b), -1, experts).permute(2, 0, 1)


def _pairs(adapter: Adapter) -> Pairs:
    """A and B of all experts, with their batch axis."""
    held = {target.name: adapter.factors[target.name] for target in adapter.targets if target.experts is not None}
    return {name: (parts[LORA_A], parts[LORA_B]) for name, parts in held.items()}


def _container(stem: str) -> str:
    while stem.endswith(NESTED):
        stem = stem.removesuffix(NESTED)
    return stem


def _means(listed: str, container: str) -> bool:
    """Whether an entry of `target_parameters` is a parameter of a container; PEFT takes entries for ends of names."""
    parent = listed.rpartition(".")[0]
    return bool(parent) and f".{container}".endswith(f".{parent}")
