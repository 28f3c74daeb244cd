"""Add one sample's adapter to the weights: a model and an adapter (b = 1) enter, the weights change in place.

Cheaper than hooks when many rows go through few weights, and the form that other tools take. Gradients do not reach A
and B, and a weight is rounded to its dtype once: in bfloat16 that loses more than applying the adapter does. What
comes back is a copy, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from openwu.adapter.inject import resolve
from openwu.adapter.site import Active, Caller, Site, check_device
from openwu.errors import TargetError
from openwu.types import Adapter

MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that an update can be added to; others are quantised formats."""


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
    if adapter.batch != 1:
        raise TargetError(f"merge: weights hold one sample's adapter, got {adapter.batch}; pass adapter.select([i])")
    sites = [site for site in resolve(model, adapter.targets) if site.targets]
    _check_mergeable(model, sites)
    active = Active.of(adapter, None, Caller())
    originals: dict[str, Tensor] = {}
    try:
        for site in sites:
            weight = _weight(site)
            delta = site.weight_delta(active)
            check_device(site.path, delta, weight)
            originals[f"{site.path}.weight"] = weight.clone()
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


def _check_mergeable(model: nn.Module, sites: Sequence[Site]) -> None:
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    problems = []
    for site in sites:
        weight = _weight(site)
        if type(weight.data) is not Tensor or weight.dtype not in MERGEABLE:
            problems.append(f"{site.path}: a weight of {weight.dtype} ({type(weight.data).__name__}) is quantised")
        elif weight.is_meta:
            problems.append(f"{site.path}: its weight is not loaded (device meta)")
        elif shared[id(weight)] > 1:
            problems.append(f"{site.path}: another module has the same weight")
    if problems:
        raise TargetError("merge: use attach(...).applied(...) instead:\n  " + "\n  ".join(problems))


def _weight(site: Site) -> Tensor:
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    return weight
