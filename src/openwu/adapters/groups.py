"""List what a generator can write adapters for in any module, as the groups of its config."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from openwu.config import LayerGroup, PlainTarget
from openwu.errors import TargetError


def groups_of(model: nn.Module, only: Iterable[str] | None = None) -> tuple[LayerGroup, ...]:
    """List the linear layers and ungrouped 2d convolutions of a module as groups for a generator's config.

    Items of module lists and sequences that have the same targets with the same widths form a group; what stands
    outside of lists has a group each. `only`: paths of modules or last names, such as `("q_proj", "layers.3")`, of
    which a layer's path must contain one as whole parts; None: all. Raises TargetError for a name that fits nothing,
    and for a module without such layers. For a language model, `CausalLM.layer_groups` also finds experts.
    """
    names = None if only is None else list(only)
    found = {path: target for path, target in _layers(model) if names is None or any(_fits(n, path) for n in names)}
    unfit = [name for name in names or () if not any(_fits(name, path) for path in found)]
    if unfit or not found:
        known = sorted({path.rpartition(".")[2] for path, _ in _layers(model)})
        raise TargetError(f"only: expected names of linear layers or convolutions, such as {known}, got {unfit}")
    by_item: dict[tuple[str, str], list[PlainTarget]] = {}
    for path, target in found.items():
        item = _item(model, path)
        inside = PlainTarget(path[len(item) :].lstrip("."), target.in_dim, target.out_dim)
        by_item.setdefault((item, "" if item else path), []).append(inside)
    members: dict[tuple[PlainTarget, ...], list[str]] = {}
    for (item, _), targets in by_item.items():
        members.setdefault(tuple(targets), []).append(item)
    return tuple(_group(number, targets, items) for number, (targets, items) in enumerate(members.items()))


def _group(number: int, targets: tuple[PlainTarget, ...], items: list[str]) -> LayerGroup:
    name = f"group{number}"
    if items == [""]:
        return LayerGroup("", 1, targets, name=name, indexed=False)
    return LayerGroup("", len(items), targets, name=name, paths=tuple(items))


def _layers(model: nn.Module) -> list[tuple[str, PlainTarget]]:
    """Return path and widths of every layer that LoRA adapts."""
    found = []
    for path, module in model.named_modules():
        if not path:  # A path names every target, and the module itself has none.
            continue
        if isinstance(module, nn.Linear):
            found.append((path, PlainTarget(path, module.in_features, module.out_features)))
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            height, width = module.kernel_size
            found.append((path, PlainTarget(path, module.in_channels * height * width, module.out_channels)))
    return found


def _item(model: nn.Module, path: str) -> str:
    """Return the path of the outermost item of a list or sequence that a layer is inside of, and is not itself."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[: depth - 1])), nn.ModuleList | nn.Sequential):
            return ".".join(parts[:depth])
    return ""


def _fits(name: str, path: str) -> bool:
    """Tell whether a path contains a name as whole parts."""
    return f".{name}." in f".{path}."
