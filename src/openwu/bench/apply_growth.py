"""How the overhead of applied adapters grows: with the rank, with the number of adapters in a batch, with the experts.

Predicted is the work that counting gives: bytes moved, since a low-rank update moves much and computes little.

Shapes: T tokens, S routed rows, r rank, b adapters, E experts.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from openwu.adapter.inject import attach
from openwu.bench.apply_parts import ExpertsLayer, overhead, random_adapter
from openwu.bench.growth import Growth, Point
from openwu.bench.row import Timing, interleaved
from openwu.types import Target

ITEMSIZE = 4
"""Bytes of a float32 number."""


def moved_bytes(targets: list[Target], rows: int, rank: int, groups: int) -> int:
    """`rows` rows in `groups` groups of equal adapters: A and B once for every group; x read, A x written and read, y
    read and written for every row."""
    of_rows = sum(rows * (t.in_dim + 2 * rank + 2 * t.out_dim) for t in targets)
    of_weights = sum(groups * rank * (t.in_dim + t.out_dim) for t in targets)
    return ITEMSIZE * (of_rows + of_weights)


@torch.no_grad()
def measure_rank(quick: bool) -> Growth:
    """A linear layer, 4 requests with an adapter each."""
    dim, tokens, repeats = _sizes(quick)
    points = [_dense(dim, tokens, rank, 4, repeats, x=rank) for rank in ((4, 8) if quick else (4, 8, 16, 32, 64))]
    return Growth("overhead of a linear layer with 4 adapters, by bytes moved", "rank", tuple(points))


@torch.no_grad()
def measure_adapters(quick: bool) -> Growth:
    """A linear layer on equally many tokens, shared by more and more requests."""
    dim, tokens, repeats = _sizes(quick)
    counts = (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32)
    points = [_dense(dim, tokens, 16, count, repeats, x=count) for count in counts]
    return Growth("overhead of a linear layer at rank 16, by bytes moved", "adapters in the batch", tuple(points))


@torch.no_grad()
def measure_experts(quick: bool) -> Growth:
    """A layer of experts, 4 chosen per token, 4 requests."""
    dim, tokens, repeats = _sizes(quick)
    points = [_experts(dim, tokens, count, repeats) for count in ((4, 8) if quick else (8, 16, 32, 64))]
    return Growth("overhead of a layer of experts with 4 adapters, by bytes moved", "experts", tuple(points))


def _sizes(quick: bool) -> tuple[int, int, int]:
    """Width, tokens, repeats."""
    return (32, 64, 3) if quick else (256, 1024, 11)


def _dense(dim: int, tokens: int, rank: int, batch: int, repeats: int, x: int) -> Point:
    """A linear layer on `tokens` tokens that `batch` requests share equally."""
    torch.manual_seed(0)
    target = Target("0", dim, dim)
    layer = nn.Sequential(nn.Linear(dim, dim))
    inputs = torch.randn(batch, tokens // batch, dim)
    return _point(layer, [target], inputs, rank, repeats, x, moved_bytes([target], tokens, rank, batch))


def _experts(dim: int, tokens: int, experts: int, repeats: int) -> Point:
    torch.manual_seed(0)
    layer = ExpertsLayer(dim, dim // 2, experts, 4).requires_grad_(False)
    inputs = torch.randn(4, tokens // 4, dim)
    moved = moved_bytes(layer.targets(), 4 * tokens, 16, 4 * experts)
    return _point(layer, layer.targets(), inputs, 16, repeats, experts, moved)


def _point(
    layer: nn.Module, targets: list[Target], inputs: Tensor, rank: int, repeats: int, x: int, moved: int
) -> Point:
    adapter = random_adapter(targets, len(inputs), rank=rank, dtype=inputs.dtype, seed=0)
    with attach(layer, targets) as handle:

        def run(adapted: bool) -> None:
            with handle.applied(adapter) if adapted else nullcontext():
                layer(inputs)

        timed = interleaved({"base": lambda: run(False), "adapted": lambda: run(True)}, repeats)
    # An overhead that cannot be told from noise counts as a hundredth of the base.
    cost = max(overhead(timed["adapted"], timed["base"]), 0.01 * timed["base"].median)
    return Point(x, Timing((cost,)), moved)
