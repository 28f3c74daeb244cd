"""Scaling curves of the overhead of applied adapters: with the rank, the adapters in a batch, and the experts.

The cost model adds up three measurements: the overhead of a layer of the same form that is too narrow to compute
anything (entering a scope, Python, one call per group), the update's operations at the speed of the layer's own
products, and its bytes at the bandwidth of adding tensors of the output's size.

Shapes: T tokens, S routed rows, r rank, b adapters, E experts.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.types import Target
from openwu_bench.adapters import ExpertsLayer, overhead, random_adapter
from openwu_bench.measurement import Curve, Point, Timing, interleaved

NARROW = 8
"""Width of a layer that computes next to nothing; grouped products of float32 need at least 4."""
COST_MODEL = "by a narrow layer's overhead, operations and bytes"
ITEMSIZE = 4
"""Bytes of a float32 number."""


def operations(targets: list[Target], rows: int, rank: int) -> float:
    """Return the FLOPs of `x A` and `(x A) B` for `rows` rows."""
    return 2.0 * rows * rank * sum(t.in_dim + t.out_dim for t in targets)


def moved_bytes(targets: list[Target], rows: int, rank: int, groups: int) -> int:
    """Return the bytes moved for `rows` rows in `groups` groups that share an adapter.

    A and B once for every group; x read, A x written and read, y read and written for every row.
    """
    row_numbers = sum(rows * (t.in_dim + 2 * rank + 2 * t.out_dim) for t in targets)
    weight_numbers = sum(groups * rank * (t.in_dim + t.out_dim) for t in targets)
    return ITEMSIZE * (row_numbers + weight_numbers)


@torch.no_grad()
def measure_rank(quick: bool) -> Curve:
    """Measure the overhead on a linear layer against the rank, for 4 requests with an adapter each."""
    dim, tokens, repeats = _sizes(quick)
    points = [_dense(dim, tokens, rank, 4, repeats, x=rank) for rank in ((4, 8) if quick else (4, 8, 16, 32, 64))]
    return Curve(f"overhead of a linear layer with 4 adapters, {COST_MODEL}", "rank", tuple(points))


@torch.no_grad()
def measure_adapters(quick: bool) -> Curve:
    """Measure the overhead on a linear layer against the number of requests that share the same tokens."""
    dim, tokens, repeats = _sizes(quick)
    counts = (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32, 64)
    points = [_dense(dim, tokens, 16, count, repeats, x=count) for count in counts]
    return Curve(f"overhead of a linear layer at rank 16, {COST_MODEL}", "adapters in the batch", tuple(points))


@torch.no_grad()
def measure_experts(quick: bool) -> Curve:
    """Measure the overhead on an experts layer against the experts: 4 chosen per token, 4 requests."""
    dim, tokens, repeats = _sizes(quick)
    points = [_experts(dim, tokens, count, repeats) for count in ((4, 8) if quick else (8, 16, 32, 64))]
    return Curve(f"overhead of a layer of experts with 4 adapters, {COST_MODEL}", "experts", tuple(points))


def _sizes(quick: bool) -> tuple[int, int, int]:
    """Return width, tokens and repeats."""
    return (32, 64, 3) if quick else (256, 1024, 31)


def _dense(dim: int, tokens: int, rank: int, batch: int, repeats: int, x: int) -> Point:
    """Measure a linear layer on `tokens` tokens that `batch` requests share equally."""

    def overheads(dim: int, rank: int) -> tuple[Timing, float]:
        torch.manual_seed(0)
        layer, inputs = nn.Sequential(nn.Linear(dim, dim)), torch.randn(batch, tokens // batch, dim)
        return _overhead(layer, [Target("0", dim, dim)], inputs, rank, repeats)

    measured, base = overheads(dim, rank)
    narrow, _ = overheads(NARROW, NARROW)
    return _point(x, measured, narrow, [Target("0", dim, dim)], base, tokens, rank, batch)


def _experts(dim: int, tokens: int, experts: int, repeats: int) -> Point:
    """Measure an experts layer on tokens of 4 requests; rank 16."""

    def overheads(dim: int, rank: int) -> tuple[Timing, float, list[Target]]:
        torch.manual_seed(0)
        layer = ExpertsLayer(dim, dim // 2, experts, 4)
        targets = layer.targets()
        return *_overhead(layer, targets, torch.randn(4, tokens // 4, dim), rank, repeats), targets

    measured, base, targets = overheads(dim, 16)
    narrow, _, _ = overheads(NARROW, NARROW)
    return _point(experts, measured, narrow, targets, base, 4 * tokens, 16, 4 * experts)


def _point(
    x: int, measured: Timing, narrow: Timing, targets: list[Target], base: float, rows: int, rank: int, groups: int
) -> Point:
    """Predict the overhead in seconds; `base`: seconds of the layer's own products for as many rows."""
    speed = 2.0 * rows * sum(t.in_dim * t.out_dim for t in targets) / base
    y = torch.zeros(rows, max(t.out_dim for t in targets))
    adding = interleaved({"add": lambda: torch.add(y, y, out=y)}, 31, warmup=5)["add"].median
    bandwidth = 2 * y.nbytes / adding
    predicted = operations(targets, rows, rank) / speed + moved_bytes(targets, rows, rank, groups) / bandwidth
    return Point(x, measured, narrow.median + predicted)


def _overhead(layer: nn.Module, targets: list[Target], inputs: Tensor, rank: int, repeats: int) -> tuple[Timing, float]:
    """Return the seconds that adapters cost, and the seconds of the layer without them."""
    adapter = random_adapter(targets, len(inputs), rank=rank, dtype=inputs.dtype, seed=0)
    with attach(layer, targets) as handle:

        def run(adapted: bool) -> None:
            with handle.applied(adapter) if adapted else nullcontext():
                layer(inputs)

        timed = interleaved({"base": lambda: run(False), "adapted": lambda: run(True)}, repeats)
    # An overhead within noise counts as a hundredth of the base.
    cost = max(overhead(timed["adapted"], timed["base"]), 0.01 * timed["base"].median)
    return Timing((cost,)), timed["base"].median
