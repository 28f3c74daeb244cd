"""The low-rank update of rows that lie sorted by group, each group with its own A and B, as grouped matrix products.

Groups are the requests of a packed sequence, or (expert, request) in a mixture of experts. Same result as
`reference.add_routed`, which multiplies every row with every group's A.

Shapes: t rows, g groups, r LoRA rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openwu.compute.grouped import ALIGNMENT, grouped_product, has_grouped_mm

ROWS = 32
"""Rows of a group, on average, from which on writing its update into the output by a product of its own is quicker."""


def add_grouped(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, ends: Tensor, *, in_place: bool = False
) -> Tensor:
    """y `[t, out]`, x `[t, in]`, a `[g, r, in]`, b `[g, out, r]`, ends `[g]` int32: where each group's rows end.

    `in_place`: y may be written over. It is where nothing has gradients, which saves a tensor of its size, and on a CPU
    for groups of many rows one more.
    """
    a, b = _padded(a.to(x.dtype), b.to(y.dtype))
    down = grouped_product(x, a, ends).to(y.dtype)
    in_place = in_place and not (torch.is_grad_enabled() and (y.requires_grad or down.requires_grad or b.requires_grad))
    # Only for plain tensors: of those that stand for others (fake, traced) nobody knows the groups' rows yet.
    if in_place and y.device.type == "cpu" and type(y) is Tensor and len(y) >= ROWS * len(ends):
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        groups = y.split_with_sizes(sizes), down.split_with_sizes(sizes), b.transpose(1, 2).unbind()
        for own, own_down, up in zip(*groups, strict=True):
            own.addmm_(own_down, up, alpha=scale)
        return y
    up = grouped_product(down, b, ends)
    return torch.add(y, up, alpha=scale, out=y if in_place else None)


def fits(y: Tensor, x: Tensor, a: Tensor) -> bool:
    """Whether torch has grouped products for both factors; the rank is padded to what they need."""
    rank = a.shape[-2] + _missing(a.shape[-2], min(x.element_size(), y.element_size()))
    return has_grouped_mm(x, x.new_empty(0, rank, x.shape[-1])) and has_grouped_mm(y, y.new_empty(0, y.shape[-1], rank))


def _padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with zeros up to a rank that fills whole multiples of ALIGNMENT bytes in either dtype."""
    missing = _missing(a.shape[1], min(a.element_size(), b.element_size()))
    return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))) if missing else (a, b)


def _missing(rank: int, itemsize: int) -> int:
    return -rank % (ALIGNMENT // itemsize)
