"""Products of groups of rows, each group with its own matrix; and what a mixture of experts does with them.

A mixture whose experts' weights are stacked in one tensor sorts its tokens by expert (`Routed`), multiplies each
expert's tokens with its weight (`GroupedProduct`, a module, so that hooks can be put on it) and combines what came out.
Nothing here waits for the device, and no shape depends on the routing.

Shapes: T tokens, k experts per token, S = T * k routed rows, E experts, g groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    """One weight of all experts. It has no parameters: the stacked weight stays where the base model keeps it.

    An input made by `gather` or `multiply` has `spare_columns` columns free behind it: there `beside` puts what an
    adapter adds, and copies nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spare_columns = 0
        """Columns that the adapter of the current scope adds to the input."""
        self._made: tuple[Tensor, Tensor] | None = None
        """The next input, and the wider memory that it is the beginning of."""

    def gather(self, x_ti: Tensor, routed: Routed) -> Tensor:
        """The routed rows `[S, in]` of tokens x `[T, in]`; differentiable."""
        out = self._rows(len(routed.token_s), x_ti)
        return x_ti[routed.token_s] if out is None else torch.index_select(x_ti, 0, routed.token_s, out=out)

    def multiply(self, x_si: Tensor, y_si: Tensor) -> Tensor:
        """x * y `[S, in]`, of one dtype; differentiable."""
        return torch.mul(x_si, y_si, out=self._rows(len(x_si), x_si, y_si))

    def _rows(self, count: int, *likes: Tensor) -> Tensor | None:
        """Memory `[count, in]` with room behind it; None where there shall be none, or gradients are wanted."""
        like = likes[0]
        if not self.spare_columns or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and any(each.requires_grad for each in likes):
            return None
        wide = like.new_empty(count, like.shape[1] + self.spare_columns)
        wide[:, like.shape[1] :] = 0  # `alone` reads x where it lies
        self._made = wide[:, : like.shape[1]], wide
        return self._made[0]

    def alone(self, x_si: Tensor, weight_goi: Tensor, routed: Routed) -> Tensor:
        """The product of an input with other matrices `[g, out, in]`, an adapter's A, before `beside`."""
        made = self._made is not None and self._made[0] is x_si
        return grouped_product(x_si, weight_goi, routed.ends, apart=made)

    def reserve_bytes(self, x_si: Tensor, tail_sc: Tensor) -> Tensor:
        """`[x, tail]` `[S, in + spare_columns]`, behind x where x was made for it; differentiable."""
        made = self._made
        if made is None or made[0] is not x_si or tail_sc.requires_grad:
            return torch.cat([x_si, tail_sc], 1)
        wide = made[1]
        wide[:, x_si.shape[1] :] = tail_sc
        return wide

    def forward(self, x_si: Tensor, weight_eoi: Tensor, routed: Routed) -> Tensor:
        """x `[S, in]` sorted by expert, weight `[E, out, in]` -> `[S, out]`"""
        if self._made is not None:
            self._made = None
        return grouped_product(x_si, weight_eoi, routed.ends)


def group_ends(group_s: Tensor, groups: int) -> Tensor:
    """Where each of `groups` groups ends, int32 `[g]`, for rows `[S]` that name their group in ascending order."""
    numbers = torch.arange(groups, device=group_s.device, dtype=group_s.dtype)
    return torch.searchsorted(group_s, numbers, right=True).to(torch.int32)


def grouped_product(x_si: Tensor, weight_goi: Tensor, ends: Tensor, *, apart: bool = False) -> Tensor:
    """Row s of x `[S, in]` times its group's matrix of weight `[g, out, in]`: `[S, out]`. The last end must be S.

    `apart`: rows of x may be read where they lie, although there is memory between them; it must hold numbers, whole
    multiples of ALIGNMENT bytes of them.
    """
    if torch.compiler.is_compiling() and x_si.device.type == "cpu":
        # While tracing torch knows `grouped_mm` in bfloat16 only; compiled code sees one opaque operation instead.
        opaque: Tensor = _opaque_product(x_si, weight_goi, ends)
        return opaque
    if not has_grouped_mm(x_si, weight_goi):
        return looped_product(x_si, weight_goi, ends)
    # In bfloat16 on a CPU (oneDNN) rows are read on beyond their end, times zero: what is no number there spoils them.
    rows = x_si if apart else x_si.contiguous()
    product: Tensor = F.grouped_mm(rows, weight_goi.transpose(1, 2), offs=ends)
    if not product.requires_grad:
        return product
    through: Tensor = _ContiguousGradient.apply(product)  # type: ignore[no-untyped-call]
    return through


def looped_product(x_si: Tensor, weight_goi: Tensor, ends: Tensor) -> Tensor:
    """The same, one group after another: the reference, and the way where torch has no grouped product."""
    parts = zip(_split(x_si, ends), weight_goi.unbind(), strict=True)
    return torch.cat([part @ weight.t() for part, weight in parts])


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


@torch.library.custom_op("openwu::grouped_product", mutates_args=())
def _opaque_product(x_si: Tensor, weight_goi: Tensor, ends: Tensor) -> Tensor:
    if has_grouped_mm(x_si, weight_goi):
        return F.grouped_mm(x_si.contiguous(), weight_goi.transpose(1, 2), offs=ends)
    return looped_product(x_si, weight_goi, ends)


@_opaque_product.register_fake
def _(x_si: Tensor, weight_goi: Tensor, ends: Tensor) -> Tensor:  # noqa: ARG001 (the operation's signature)
    return x_si.new_empty(len(x_si), weight_goi.shape[1])


@torch.library.custom_op("openwu::grouped_outer", mutates_args=())
def _opaque_outer(y_so: Tensor, x_si: Tensor, ends: Tensor) -> Tensor:
    """Sum over each group's rows of y `[S, out]` times x `[S, in]`: `[g, out, in]`"""
    if has_grouped_mm(x_si, x_si.new_empty(0, y_so.shape[1], x_si.shape[1])):
        return F.grouped_mm(y_so.contiguous().t(), x_si.contiguous(), offs=ends)
    return torch.stack([y.t() @ x for y, x in zip(_split(y_so, ends), _split(x_si, ends), strict=True)])


@_opaque_outer.register_fake
def _(y_so: Tensor, x_si: Tensor, ends: Tensor) -> Tensor:
    return x_si.new_empty(len(ends), y_so.shape[1], x_si.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    of_x = _opaque_product(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    of_weight = _opaque_outer(grad, x, ends) if ctx.needs_input_grad[1] else None
    return of_x, of_weight, None


_opaque_product.register_autograd(_gradients, setup_context=_keep)


def _split(x_si: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """Every group's rows."""
    return x_si.split_with_sizes(torch.diff(ends, prepend=ends.new_zeros(1)).tolist())
