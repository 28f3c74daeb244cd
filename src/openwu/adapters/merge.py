"""Add one sample's adapter to the weights: a model and an adapter (b = 1) enter, a model with other weights leaves.

Cheaper than hooks when many rows go through few weights (`merging_pays`), and the form that other tools take.
Gradients do not reach A and B, and a weight is rounded to its dtype once more. `merged_copy` leaves the model alone, so
that other threads may run it; `merged` and `merge_` change it in place and keep what was there, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from openwu.adapters.inject import resolve
from openwu.adapters.site import Active, Caller, Site, check_device
from openwu.errors import TargetError
from openwu.types import Adapter, Target

MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that an update can be added to; others are quantised formats."""

Model = TypeVar("Model", bound=nn.Module)


def merging_pays(
    model: nn.Module, targets: Sequence[Target], rank: int, rows: int | Mapping[str, int], forwards: int = 1
) -> bool:
    """Whether merging one adapter costs less than hooks that apply it in `forwards` passes of the model.

    `rows`: input rows of every target in one pass (tokens; pixels of a convolution's output; of experts, tokens times
    experts per token), one number for all or one per target name. On a CPU arithmetic decides: merging is in * out
    multiplications per rank, a row in + out of them. On an accelerator memory traffic does: merging reads and writes
    the weight, a row reads its input, writes and reads A x, and reads and writes its output. False where a weight is
    quantised or cannot be merged for another reason.
    """
    sites = [site for site in resolve(model, targets) if site.targets]
    if not sites or _problems(model, sites):
        return False
    weights = [site.weight[1] for site in sites]
    on_cpu = weights[0].device.type == "cpu"
    size = weights[0].element_size()
    merge = apply = 0
    for target in targets:
        passed = forwards * (rows if isinstance(rows, int) else rows[target.name])
        parameters = (target.experts or 1) * target.in_dim * target.out_dim
        merge += parameters if on_cpu else 2 * size * parameters
        row = target.in_dim + target.out_dim if on_cpu else size * (target.in_dim + 2 * rank + 2 * target.out_dim)
        apply += passed * row
    return apply > merge


@torch.no_grad()
def merged_copy(model: Model, adapter: Adapter) -> Model:
    """A model with the adapter in the weights of its targets; `model` stays as it is, and shares everything else.

    Hooks of other origin stay on the copy. Modules that are kept outside of `named_modules` (in a list, say) are not
    copied.
    """
    replaced: dict[int, nn.Parameter] = {}
    for site, delta in _updates(model, adapter):
        weight = site.weight[1]
        # As the weight lies in memory: a convolution's channels-last weight stays so.
        new = torch.empty_like(weight, requires_grad=False).copy_(delta.add_(weight))
        replaced[id(weight)] = nn.Parameter(new, requires_grad=False)
    return _copy(model, replaced, {})


@contextmanager
def merged(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """The model with the adapter in its weights; on exit, after an exception too, every weight has its former bits."""
    originals = merge_(model, adapter)
    try:
        yield
    finally:
        unmerge_(model, originals)


@torch.no_grad()
def merge_(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Merge for good. Returns the original weights by their state-dict names: for `unmerge_`, or to be dropped."""
    originals: dict[str, Tensor] = {}
    try:
        for site, delta in _updates(model, adapter):
            name, weight = site.weight
            originals[name] = weight.detach().clone()
            weight.copy_(delta.add_(weight))
    except BaseException:
        unmerge_(model, originals)
        raise
    return originals


@torch.no_grad()
def unmerge_(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Put back the weights that `merge_` returned."""
    for name, original in originals.items():
        model.get_parameter(name).copy_(original)


def _updates(model: nn.Module, adapter: Adapter) -> Iterator[tuple[Site, Tensor]]:
    """Each site with what is to be added to its weight, after checking that all of them can be merged."""
    if adapter.batch != 1:
        raise TargetError(f"merge: weights hold one sample's adapter, got {adapter.batch}; pass adapter.select([i])")
    sites = [site for site in resolve(model, adapter.targets) if site.targets]
    problems = _problems(model, sites)
    if problems:
        raise TargetError.listing("merge: use attach(...).applied(...) instead:", problems)
    active = Active.of(adapter, None, Caller())
    for site in sites:
        delta = site.weight_delta(active)
        check_device(site.path, delta, site.weight[1])
        yield site, delta


def _problems(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Why weights cannot be merged, a line for each."""
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    problems = []
    for site in sites:
        try:
            weight = site.weight[1]
        except AttributeError:
            problems.append(f"{site.path}: it has no parameter `weight` (quantised, or computed from others)")
            continue
        if type(weight.data) is not Tensor or weight.dtype not in MERGEABLE:
            problems.append(f"{site.path}: a weight of {weight.dtype} ({type(weight.data).__name__}) is quantised")
        elif weight.is_meta:
            problems.append(f"{site.path}: its weight is not loaded (device meta)")
        elif shared[id(weight)] > 1:
            problems.append(f"{site.path}: another module has the same weight")
    return problems


def _copy(module: Model, replaced: Mapping[int, nn.Parameter], copies: dict[int, nn.Module]) -> Model:
    """The tree of modules under `module` with some parameters (by id) replaced, and without adapter hooks."""
    if id(module) in copies:
        known = copies[id(module)]
        assert isinstance(known, type(module))
        return known
    twin = module.__new__(type(module))
    copies[id(module)] = twin
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {
        name: parameter if parameter is None else replaced.get(id(parameter), parameter)
        for name, parameter in module._parameters.items()
    }
    twin._buffers = dict(module._buffers)
    twin._forward_hooks = type(module._forward_hooks)(
        (number, hook) for number, hook in module._forward_hooks.items() if not isinstance(hook, Site)
    )
    twin._modules = {
        name: child if child is None else _copy(child, replaced, copies) for name, child in module._modules.items()
    }
    return twin
