"""The only place that chooses an implementation of the low-rank update; callers import the functions from here.

`lora.reference` defines the results. `lora.grouped` replaces it for sorted rows where torch has grouped products: on a
CPU for float32, bfloat16 and float16, on CUDA for bfloat16, for widths of whole multiples of 16 bytes.
"""

from __future__ import annotations

from torch import Tensor

from openwu.ops.lora import grouped
from openwu.ops.lora.reference import add_conv, add_linear, add_routed

__all__ = ["add_conv", "add_linear", "add_routed", "add_sorted"]


def add_sorted(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, group_t: Tensor, ends: Tensor, *, in_place: bool = False
) -> Tensor:
    """Rows sorted by group: y `[t, out]`, x `[t, in]`, a `[g, r, in]`, b `[g, out, r]`, group_t `[t]` ascending.

    `ends` `[g]` int32: where each group's rows end, the last at t. `in_place`: y may be written over, since nobody else
    holds it; whether it is, is left open.
    """
    if grouped.fits(y, x, a):
        return grouped.add_grouped(y, x, a, b, scale, ends, in_place=in_place)
    return add_routed(y, x, a, b, scale, group_t)
