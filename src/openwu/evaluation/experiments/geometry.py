"""Geometry of adapters by their updates scale * B A: cosines, means, random updates of equal size, coordinates.

B A stays the same when B and A are rotated against one another, so factors of equal updates may look unlike: every
quantity here is one of the updates themselves, computed without ever forming them. Bootstrap intervals of means are
here too.

Shapes: b samples, E experts, r LoRA rank, in / out widths of a target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openwu.adapters.updates import inner_products
from openwu.types import Adapter

DRAWS = 2000
"""Bootstrap samples of an interval."""
SMALL = 0.1
"""Numbers below it, such as losses, are shown with more than two decimals."""


@dataclass(frozen=True)
class Mean:
    """A mean with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        decimals = decimals_for(self.value, self.low, self.high)
        value, low, high = (f"{each:.{decimals}f}" for each in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    @property
    def positive(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0

    def to_json(self) -> dict[str, float]:
        """Return value, low and high."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def named(self, name: str) -> dict[str, float]:
        """Return the numbers under a name, with `_low` and `_high` behind it."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def decimals_for(*values: float) -> int:
    """Return with how many decimals to show numbers: two, or as many as the largest needs for two digits."""
    largest = max(abs(value) for value in values)
    if not 0 < largest < SMALL:
        return 2
    return 1 - math.floor(math.log10(largest))


def mean_over(values: Sequence[float], groups: Sequence[str], seed: int = 0) -> Mean:
    """Return the mean of the groups' means, with a bootstrap interval over groups and over the values inside them.

    Cases of one task are alike: drawing cases alone would promise too narrow an interval (cluster bootstrap, Davison
    and Hinkley 1997, section 3.8).
    """
    table = _by_group(values, groups)
    random = np.random.default_rng(seed)
    chosen = random.integers(len(table), size=(DRAWS, len(table)))
    means = np.empty(chosen.shape)
    for k, group in enumerate(table):
        places = chosen == k
        means[places] = random.choice(group, size=(int(places.sum()), len(group))).mean(axis=1)
    low, high = np.percentile(means.mean(axis=1), (2.5, 97.5))
    return Mean(float(np.mean([group.mean() for group in table])), float(low), float(high))


def _by_group(values: Sequence[float], groups: Sequence[str]) -> list[NDArray[np.float64]]:
    if not values or len(values) != len(groups):
        raise ValueError(f"values: expected some, one for each of {len(groups)} groups' names, got {len(values)}")
    array, names = np.asarray(values, dtype=np.float64), np.asarray(groups)
    return [array[names == name] for name in dict.fromkeys(groups)]


def cosines(adapter: Adapter) -> Tensor:
    """Return the cosine similarity of the updates of all samples `[b, b]`."""
    products = inner_products(adapter)
    sizes = products.diagonal().clamp(min=1e-30).sqrt()
    return products / sizes[:, None] / sizes[None, :]


def coordinates(products: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """Return principal components from inner products: coordinates `[b, dimensions]`, and each one's variance share.

    Equal to PCA of the flattened updates, which would have millions of columns.
    """
    centred = products - products.mean(0, keepdim=True) - products.mean(1, keepdim=True) + products.mean()
    values, vectors = torch.linalg.eigh(centred)
    order = values.argsort(descending=True)[:dimensions]
    kept = values[order].clamp(min=0)
    return vectors[:, order] * kept.sqrt(), kept / values.clamp(min=0).sum().clamp(min=1e-30)


def mean_update(adapter: Adapter) -> Adapter:
    """Return one adapter (b = 1) whose update is exactly the mean of all samples' updates; its rank grows as needed."""
    rank = max(min(target.in_dim, target.out_dim, adapter.batch * adapter.rank) for target in adapter.targets)
    weights = {}
    for name, (a, b) in adapter.pairs.items():
        mean = torch.einsum("b...or,b...ri->...oi", b.float(), a.float()) / adapter.batch
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        kept = min(rank, s.shape[-1])
        root = s[..., :kept].sqrt()
        own_a = torch.zeros(*a.shape[1:-2], rank, a.shape[-1])
        own_b = torch.zeros(*b.shape[1:-1], rank)
        own_a[..., :kept, :] = root[..., :, None] * v[..., :kept, :]
        own_b[..., :kept] = u[..., :kept] * root[..., None, :]
        weights[name] = (own_a[None], own_b[None])
    return Adapter.from_pairs(adapter.targets, weights, adapter.scale)


def random_like(adapter: Adapter, generator: torch.Generator) -> Adapter:
    """Draw normal factors, scaled so that every sample's update of every target is as large as the adapter's own."""
    weights = {}
    for name, (a, b) in adapter.pairs.items():
        drawn_a, drawn_b = (torch.randn(each.shape, generator=generator) for each in (a, b))
        ratio = (_sizes(a, b) / _sizes(drawn_a, drawn_b).clamp(min=1e-30)).float()
        weights[name] = (drawn_a, drawn_b * ratio[..., None, None])
    return Adapter.from_pairs(adapter.targets, weights, adapter.scale)


def _sizes(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of B A: a `[b, (E,) r, in]`, b `[b, (E,) out, r]` -> `[b, (E)]`"""
    a, b = a.double(), b.double()
    return ((a @ a.transpose(-1, -2)) * (b.transpose(-1, -2) @ b)).sum((-1, -2)).clamp(min=0).sqrt()


def nearest_same_task(similarity: Tensor, tasks: Sequence[str], groups: Sequence[str] | None = None) -> list[bool]:
    """Tell for every sample whether the most similar other one has its task.

    `groups`: samples of one group (say, of one photograph) are not compared with one another.
    """
    allowed = ~torch.eye(len(tasks), dtype=torch.bool)
    if groups is not None:
        allowed &= torch.tensor([[one != other for other in groups] for one in groups])
    nearest = similarity.masked_fill(~allowed, -torch.inf).argmax(dim=1)
    return [tasks[i] == tasks[int(j)] for i, j in enumerate(nearest)]


def update_distances(adapter: Adapter, stored: Adapter) -> Tensor:
    """Return |update - stored|^2 / |stored|^2 of every sample `[b]`, differentiable in the adapter's factors."""
    square, own = torch.zeros(adapter.batch), torch.zeros(adapter.batch)
    for name, (a, b) in adapter.pairs.items():
        a, b = a.float(), b.float() * adapter.scale
        other_a, other_b = (part.float() for part in stored.pairs[name])
        other_b = other_b * stored.scale
        own = own + _pairwise(other_a, other_b, other_a, other_b)
        square = square + _pairwise(a, b, a, b) - 2 * _pairwise(a, b, other_a, other_b)
    return (square + own) / own.clamp(min=1e-12)


def _pairwise(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """<B1 A1, B2 A2> of every sample `[b]`."""
    products = (b1.transpose(-1, -2) @ b2) * (a1 @ a2.transpose(-1, -2))
    return products.flatten(1).sum(1)
