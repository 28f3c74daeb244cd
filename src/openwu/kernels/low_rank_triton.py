"""The low-rank update of rows that lie sorted by group as one Triton kernel: `y + scale * B (A x)` in one pass.

Same result as `reference.add_routed` and `grouped.add_grouped`. A program takes a tile of one group's rows, keeps A x
in registers and goes along the outputs: x and y are read once, the result is written once, A x and B A x never. Which
rows a program has follows from the ends on the device, so nothing waits for it; every result is one program's alone,
so the order of sums is fixed. Without gradients.

Shapes: t rows, g groups, r LoRA rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_GROUPS = 2048
"""Every program counts the tiles of all groups before its own."""
MOST_RANK = 128
SMALLEST = 16
"""Tensor cores multiply nothing smaller."""
BLOCK = 64
"""Inputs and outputs at a time."""
PROGRAMS = 264
"""Below so many programs the outputs are split among several, which all compute A x: two for each processor of an H200,
not measured."""


def fits(y: Tensor, x: Tensor, a: Tensor) -> bool:
    """Whether the kernel takes these sizes and dtypes."""
    return y.dtype == x.dtype and 0 < len(a) <= MOST_GROUPS and a.shape[1] <= MOST_RANK and 0 not in y.shape + x.shape


def add_sorted(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, ends: Tensor) -> Tensor:
    """y `[t, out]`, x `[t, in]`, a `[g, r, in]`, b `[g, out, r]`, ends `[g]` int32: where each group's rows end.

    Rows behind the last end have no defined result.
    """
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    add_sorted_into(out, y, x, a, b, scale, ends)
    return out


def add_sorted_into(out: Tensor, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, ends: Tensor) -> None:
    """The same, written to out `[t, out]`, contiguous."""
    rows, out_dim = y.shape
    groups, rank, in_dim = a.shape
    y, x = (each if each.stride(1) == 1 else each.contiguous() for each in (y, x))
    # Small groups get small tiles, or most of a tile would be empty.
    block_rows = min(64, max(SMALLEST, triton.next_power_of_2(rows // groups)))
    tiles = triton.cdiv(rows, block_rows) + groups  # at least as many as the groups have, wherever they end
    splits = max(1, min(PROGRAMS // tiles, triton.cdiv(out_dim, BLOCK)))
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        _add_sorted[tiles, splits](
            y,
            x,
            a.contiguous(),
            b.contiguous(),
            ends.contiguous(),
            out,
            float(scale),
            groups,
            in_dim,
            out_dim,
            rank,
            y.stride(0),
            x.stride(0),
            triton.cdiv(triton.cdiv(out_dim, BLOCK), splits) * BLOCK,
            block_groups=triton.next_power_of_2(groups),
            block_rows=block_rows,
            block_rank=max(SMALLEST, triton.next_power_of_2(rank)),
            block=BLOCK,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _add_sorted(  # type: ignore[no-untyped-def]
    y,
    x,
    a,
    b,
    ends,
    out,
    scale,
    groups,
    in_dim,
    out_dim,
    rank,
    y_row,
    x_row,
    outputs,
    block_groups: tl.constexpr,
    block_rows: tl.constexpr,
    block_rank: tl.constexpr,
    block: tl.constexpr,
):
    # Which group's which tile: groups have as many tiles as their rows fill, counted from the first.
    tile = tl.program_id(0)
    number = tl.arange(0, block_groups)
    known = number < groups
    stops = tl.load(ends + number, mask=known, other=0)
    starts = tl.load(ends + number - 1, mask=known & (number > 0), other=0)
    tiles = tl.where(known, (stops - starts + block_rows - 1) // block_rows, 0)
    through = tl.cumsum(tiles, axis=0)
    group = tl.sum((through <= tile).to(tl.int32), axis=0)
    if group >= groups:
        return
    own = number == group
    stop = tl.sum(tl.where(own, stops, 0), axis=0)
    before = tl.sum(tl.where(own, through - tiles, 0), axis=0)
    start = tl.sum(tl.where(own, starts, 0), axis=0) + (tile - before) * block_rows

    row = start + tl.arange(0, block_rows)
    present = row < stop
    wide_row = row.to(tl.int64)
    ranks = tl.arange(0, block_rank)
    ranked = ranks < rank
    a += group.to(tl.int64) * rank * in_dim
    b += group.to(tl.int64) * rank * out_dim
    down = tl.zeros((block_rows, block_rank), tl.float32)
    for first in range(0, in_dim, block):
        column = first + tl.arange(0, block)
        inside = column < in_dim
        x_tile = tl.load(
            x + wide_row[:, None] * x_row + column[None, :], mask=present[:, None] & inside[None, :], other=0.0
        )
        a_tile = tl.load(
            a + ranks[None, :] * in_dim + column[:, None], mask=ranked[None, :] & inside[:, None], other=0.0
        )
        down = tl.dot(x_tile, a_tile.to(x_tile.dtype), down, input_precision="ieee")
    low = down.to(y.dtype.element_ty)
    begin = tl.program_id(1) * outputs
    for first in range(begin, tl.minimum(begin + outputs, out_dim), block):
        column = first + tl.arange(0, block)
        inside = column < out_dim
        b_tile = tl.load(b + column[None, :] * rank + ranks[:, None], mask=ranked[:, None] & inside[None, :], other=0.0)
        up = tl.dot(low, b_tile.to(low.dtype), input_precision="ieee")
        within = present[:, None] & inside[None, :]
        y_tile = tl.load(y + wide_row[:, None] * y_row + column[None, :], mask=within, other=0.0)
        result = y_tile.to(tl.float32) + scale * up
        tl.store(out + wide_row[:, None] * out_dim + column[None, :], result.to(low.dtype), mask=within)
