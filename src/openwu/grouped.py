"""Products of groups of rows, each group with its own matrix; and what a mixture of experts does with them.

A mixture whose experts' weights are stacked in one tensor sorts its tokens by expert (`Routed`), multiplies each
expert's tokens with its weight (`GroupedProduct`, a module, so that hooks can be put on it) and combines what came out.
Nothing here waits for the device, and no shape depends on the routing.

Shapes: T tokens, k experts per token, S = T * k routed rows, E experts, g groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT = 16
"""Bytes of which `grouped_mm` wants every row's length to be a multiple."""

FAST_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16,),
}
"""Device -> dtypes in which torch has a grouped product."""


class Routed(NamedTuple):
    """The tokens of a mixture's experts: those of the first expert, of the second, ..., each in ascending order."""

    expert_s: Tensor
    """`[S]` expert of every row, ascending"""
    token_s: Tensor
    """`[S]` token of every row"""
    ends: Tensor
    """`[E]` int32: where the rows of each expert end"""
    place_tk: Tensor
    """`[T, k]` row of each token's every expert"""

    @classmethod
    def of(cls, chosen_tk: Tensor, experts: int) -> Routed:
        """`chosen_tk` `[T, k]`: indices of the experts that the router chose for every token."""
        chosen = chosen_tk.flatten()
        order = chosen.argsort(stable=True)
        expert_s = chosen[order]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return cls(expert_s, order // chosen_tk.shape[1], group_ends(expert_s, experts), place.view(chosen_tk.shape))

    def combine(self, y_so: Tensor, weights_tk: Tensor) -> Tensor:
        """Weighted sum of every token's rows `[T, out]`: gathered, not scattered, so that its order is fixed."""
        rows = y_so.index_select(0, self.place_tk.flatten()).view(*self.place_tk.shape, -1)
        return torch.bmm(weights_tk.to(rows.dtype)[:, None], rows)[:, 0]


class GroupedProduct(nn.Module):
    """One weight of all experts. It has no parameters: the stacked weight stays where the base model keeps it."""

    def forward(self, x_si: Tensor, weight_eoi: Tensor, routed: Routed) -> Tensor:
        """x `[S, in]` sorted by expert, weight `[E, out, in]` -> `[S, out]`"""
        return grouped_product(x_si, weight_eoi, routed.ends)


def group_ends(group_s: Tensor, groups: int) -> Tensor:
    """Where each of `groups` groups ends, int32 `[g]`, for rows `[S]` that name their group in ascending order."""
    numbers = torch.arange(groups, device=group_s.device, dtype=group_s.dtype)
    return torch.searchsorted(group_s, numbers, right=True).to(torch.int32)


def grouped_product(x_si: Tensor, weight_goi: Tensor, ends: Tensor) -> Tensor:
    """Row s of x `[S, in]` times its group's matrix of weight `[g, out, in]`: `[S, out]`. The last end must be S."""
    if not has_grouped_mm(x_si, weight_goi):
        return looped_product(x_si, weight_goi, ends)
    product: Tensor = F.grouped_mm(x_si.contiguous(), weight_goi.transpose(1, 2), offs=ends)
    through: Tensor = _ContiguousGradient.apply(product)  # type: ignore[no-untyped-call]
    return through


def looped_product(x_si: Tensor, weight_goi: Tensor, ends: Tensor) -> Tensor:
    """The same, one group after another: the reference, and the way where torch has no grouped product."""
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    parts = x_si.split_with_sizes(lengths)
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weight_goi.unbind(), strict=True)])


def has_grouped_mm(x_si: Tensor, weight_goi: Tensor) -> bool:
    """Whether torch multiplies these two by `grouped_mm`: device, dtype, and rows of 16 bytes or a multiple of it."""
    return (
        hasattr(F, "grouped_mm")
        and x_si.dtype == weight_goi.dtype
        and x_si.dtype in FAST_DTYPES.get(x_si.device.type, ())
        and all(width * x_si.element_size() % ALIGNMENT == 0 for width in weight_goi.shape[1:])
    )


class _ContiguousGradient(torch.autograd.Function):
    """Identity; `grouped_mm`'s backward pass takes contiguous gradients only."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: object, grad: Tensor) -> Tensor:
        return grad.contiguous()
