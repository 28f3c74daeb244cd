"""Grouped matrix products, and the routing of a mixture of experts whose weights are stacked in one tensor.

A mixture sorts its tokens by expert (`Routed`), multiplies each expert's tokens with its weight (`GroupedProduct`, a
module, so that hooks can be registered on it) and combines the results. Nothing here synchronises with the device, and
no shape depends on the routing.

Shapes: T tokens, k experts per token, S = T * k routed rows, E experts, g groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT = 16
"""`grouped_mm` requires rows whose length in bytes is a multiple of this."""

FAST_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16,),
}
"""Device type -> dtypes in which torch has a grouped product."""


class Routed(NamedTuple):
    """Tokens sorted by expert: those of the first expert, of the second, ..., each in ascending order."""

    expert_s: Tensor
    """`[S]` expert of every row, ascending."""
    token_s: Tensor
    """`[S]` token of every row."""
    ends: Tensor
    """`[E]` int32: where the rows of each expert end."""
    row_tk: Tensor
    """`[T, k]` routed row of each token and expert."""

    @classmethod
    def of(cls, chosen_tk: Tensor, experts: int) -> Routed:
        """Sort tokens by expert; `chosen_tk` `[T, k]`: the experts that the router chose for every token."""
        chosen = chosen_tk.flatten()
        order = chosen.argsort(stable=True)
        expert_s = chosen[order]
        row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return cls(expert_s, order // chosen_tk.shape[1], group_ends(expert_s, experts), row.view(chosen_tk.shape))

    def combine(self, y_so: Tensor, weights_tk: Tensor) -> Tensor:
        """Sum every token's rows with weights -> `[T, out]`: gathered, not scattered, so that the order is fixed."""
        rows = y_so.index_select(0, self.row_tk.flatten()).view(*self.row_tk.shape, -1)
        return torch.bmm(weights_tk.to(rows.dtype)[:, None], rows)[:, 0]


class GroupedProduct(nn.Module):
    """Grouped product with the stacked weight of all experts. It has no parameters: the base model owns the weight.

    `gather` and `multiply` allocate inputs with `spare_columns` free columns behind them, so that `append_columns` can
    widen the input by an adapter's columns without copying it.
    """

    def __init__(self, *, transposed: bool = False) -> None:
        """`transposed`: the base model stores the weight as `[E, in, out]`."""
        super().__init__()
        self.transposed = transposed
        self.spare_columns = 0
        """Columns that the adapter applied at the moment appends to the input."""
        self._widened: tuple[Tensor, Tensor] | None = None
        """The next input, and the wider buffer whose first columns it is."""

    def gather(self, x_ti: Tensor, routed: Routed) -> Tensor:
        """Gather the routed rows `[S, in]` of tokens x `[T, in]`; differentiable."""
        out = self._buffer(len(routed.token_s), x_ti)
        return x_ti[routed.token_s] if out is None else torch.index_select(x_ti, 0, routed.token_s, out=out)

    def multiply(self, x_si: Tensor, y_si: Tensor) -> Tensor:
        """Multiply x and y `[S, in]` of one dtype; differentiable."""
        return torch.mul(x_si, y_si, out=self._buffer(len(x_si), x_si, y_si))

    def _buffer(self, count: int, *likes: Tensor) -> Tensor | None:
        """Allocate `[count, in]` with spare columns behind it; None without spare columns or with gradients."""
        like = likes[0]
        if not self.spare_columns or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and any(each.requires_grad for each in likes):
            return None
        wide = like.new_empty(count, like.shape[1] + self.spare_columns)
        wide[:, like.shape[1] :] = 0  # `product` reads x with these columns between its rows
        self._widened = wide[:, : like.shape[1]], wide
        return self._widened[0]

    def product(self, x_si: Tensor, weight_goi: Tensor, routed: Routed) -> Tensor:
        """Multiply an input with other matrices `[g, out, in]`, an adapter's A, before `append_columns`."""
        strided = self._widened is not None and self._widened[0] is x_si
        return grouped_product(x_si, weight_goi, routed.ends, strided=strided)

    def append_columns(self, x_si: Tensor, tail_sc: Tensor) -> Tensor:
        """Return `[x, tail]` `[S, in + spare_columns]`, not copying x where its buffer is wide enough."""
        widened = self._widened
        if widened is None or widened[0] is not x_si or tail_sc.requires_grad:
            return torch.cat([x_si, tail_sc], 1)
        buffer = widened[1]
        buffer[:, x_si.shape[1] :] = tail_sc
        return buffer

    def forward(self, x_si: Tensor, weight_eoi: Tensor, routed: Routed) -> Tensor:
        """Multiply x `[S, in]`, sorted by expert, with weight `[E, out, in]`, or as it is stored -> `[S, out]`."""
        if self._widened is not None:
            self._widened = None
        return grouped_product(x_si, weight_eoi.mT if self.transposed else weight_eoi, routed.ends)


def group_ends(group_s: Tensor, groups: int) -> Tensor:
    """Return where each group ends, int32 `[g]`, for the ascending group numbers `[S]` of rows."""
    numbers = torch.arange(groups, device=group_s.device, dtype=group_s.dtype)
    return torch.searchsorted(group_s, numbers, right=True).to(torch.int32)


def grouped_product(x_si: Tensor, weight_goi: Tensor, ends: Tensor, *, strided: bool = False) -> Tensor:
    """Multiply every row of x `[S, in]` with its group's matrix of weight `[g, out, in]` -> `[S, out]`.

    The last end must be S. `strided`: x need not be made contiguous, although there is memory between its rows; it must
    hold finite numbers, a multiple of ALIGNMENT bytes per row.
    """
    if torch.compiler.is_compiling() and x_si.device.type == "cpu":
        # While tracing, torch supports `grouped_mm` in bfloat16 only; compiled code calls one opaque operation instead.
        opaque: Tensor = _opaque_product(x_si, weight_goi, ends)
        return opaque
    if not has_grouped_mm(x_si, weight_goi):
        return looped_product(x_si, weight_goi, ends)
    # In bfloat16 on a CPU (oneDNN) reads beyond a row's end and multiplies by zero: NaN there would spoil the result.
    rows = x_si if strided else x_si.contiguous()
    product: Tensor = F.grouped_mm(rows, weight_goi.transpose(1, 2), offs=ends)
    if not product.requires_grad:
        return product
    through: Tensor = _ContiguousGradient.apply(product)  # type: ignore[no-untyped-call]
    return through


def looped_product(x_si: Tensor, weight_goi: Tensor, ends: Tensor) -> Tensor:
    """Compute `grouped_product` as a loop over groups: the reference, and where torch has no grouped product."""
    parts = zip(_split(x_si, ends), weight_goi.unbind(), strict=True)
    return torch.cat([part @ weight.t() for part, weight in parts])


def has_grouped_mm(x_si: Tensor, weight_goi: Tensor) -> bool:
    """Whether torch has `grouped_mm` for these two: device, dtype, and rows of a multiple of 16 bytes."""
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
    """Sum the outer products of each group's rows of y `[S, out]` and x `[S, in]` -> `[g, out, in]`."""
    if has_grouped_mm(x_si, x_si.new_empty(0, y_so.shape[1], x_si.shape[1])):
        return F.grouped_mm(y_so.contiguous().t(), x_si.contiguous(), offs=ends)
    return torch.stack([y.t() @ x for y, x in zip(_split(y_so, ends), _split(x_si, ends), strict=True)])


@_opaque_outer.register_fake
def _(y_so: Tensor, x_si: Tensor, ends: Tensor) -> Tensor:
    return x_si.new_empty(len(ends), y_so.shape[1], x_si.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    grad_x = _opaque_product(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    grad_weight = _opaque_outer(grad, x, ends) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


_opaque_product.register_autograd(_gradients, setup_context=_save_inputs)


def _split(x_si: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """Split x into the rows of each group."""
    return x_si.split_with_sizes(torch.diff(ends, prepend=ends.new_zeros(1)).tolist())
