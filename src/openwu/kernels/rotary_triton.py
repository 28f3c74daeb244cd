"""Rotary position embedding as one Triton kernel: reads and writes every element once, in float32 registers.

Same result as `rotary`, to the rounding of float32. The gradient is the inverse rotation of the gradient.

Shapes: r rows (all leading axes of x), m heads, e head width, t rows of the table; x `[..., m, e]`, rotations
`[..., 1, e / 2]` complex64.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096
"""Elements per program."""


class Rows(NamedTuple):
    """x as rows of heads, and the table of rotations: row i uses table row (i // inner) % period."""

    x_rme: Tensor
    rotations_te2: Tensor
    """`[period, e / 2, 2]` float32: cosine and sine interleaved."""
    inner: int
    period: int


def rows(x: Tensor, rotations: Tensor) -> Rows | None:
    """View x as rows; None where they have no common stride, or where the table does not repeat over them."""
    *leading, heads, width = x.shape
    table = [1] * (x.ndim - rotations.ndim) + list(rotations.shape[:-2])
    if width % 2 or x.stride(-1) != 1 or not x.numel():
        return None
    if rotations.dtype != torch.complex64 or rotations.shape[-2] != 1 or len(table) != len(leading):
        return None
    varying = [i for i, size in enumerate(table) if size > 1]
    first, last = (varying[0], varying[-1] + 1) if varying else (0, 0)
    if table[first:last] != leading[first:last] or not rotations.is_contiguous():
        return None
    try:
        x_rme = x.view(-1, heads, width)
    except RuntimeError:
        return None
    period = prod(table)
    return Rows(x_rme, torch.view_as_real(rotations).view(period, width // 2, 2), prod(leading[last:]), period)


def apply_rotary_(x: Rows) -> None:
    """Rotate x in place."""
    rotate_into(x.x_rme, x, inverse=False)


def apply_rotary(x: Rows) -> Tensor:
    """Return x rotated `[r, m, e]`, new and contiguous; differentiable in x."""
    out: Tensor = _Rotated.apply(x.x_rme, x.rotations_te2, x.inner)  # type: ignore[no-untyped-call]
    return out


def rotate_into(out_rme: Tensor, x: Rows, *, inverse: bool) -> None:
    """Write x's rotated rows to out, which may be x itself. `inverse`: rotate back."""
    count, heads, width = x.x_rme.shape
    block_width = triton.next_power_of_2(width)
    block_heads = min(triton.next_power_of_2(heads), max(1, TILE // block_width))
    with torch.cuda.device_of(x.x_rme):  # type: ignore[no-untyped-call]
        _rotate_kernel[count, triton.cdiv(heads, block_heads)](
            x.x_rme,
            out_rme,
            x.rotations_te2,
            x.x_rme.stride(0),
            x.x_rme.stride(1),
            out_rme.stride(0),
            out_rme.stride(1),
            heads,
            width,
            x.inner,
            x.period,
            inverse=inverse,
            block_heads=block_heads,
            block_width=block_width,
        )


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_rme: Tensor, rotations_te2: Tensor, inner: int) -> Tensor:
        ctx.save_for_backward(rotations_te2)
        ctx.inner = inner
        out = torch.empty(x_rme.shape, dtype=x_rme.dtype, device=x_rme.device)
        rotate_into(out, Rows(x_rme, rotations_te2, inner, len(rotations_te2)), inverse=False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rme: Tensor) -> tuple[Tensor, None, None]:
        (rotations_te2,) = ctx.saved_tensors
        grad_rme = grad_rme.contiguous()
        out = torch.empty_like(grad_rme)
        rotate_into(out, Rows(grad_rme, rotations_te2, ctx.inner, len(rotations_te2)), inverse=True)
        return out, None, None


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    rotations,
    x_row,
    x_head,
    out_row,
    out_head,
    heads,
    width,
    inner,
    period,
    inverse: tl.constexpr,
    block_heads: tl.constexpr,
    block_width: tl.constexpr,
):
    # 64 bits: a chunk of the released generator's stream has more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    column = tl.arange(0, block_width)
    table = (row // inner) % period
    factors = tl.load(rotations + table * width + column, mask=column < width, other=0.0)
    cos, sin = tl.split(tl.reshape(factors, (block_width // 2, 2)))
    if inverse:
        sin = -sin
    inside = (head[:, None] < heads) & (column[None, :] < width)
    pairs = tl.load(x + row * x_row + head[:, None] * x_head + column[None, :], mask=inside, other=0.0)
    real, imaginary = tl.split(tl.reshape(pairs.to(tl.float32), (block_heads, block_width // 2, 2)))
    rotated_pairs = tl.join(
        real * cos[None, :] - imaginary * sin[None, :],
        real * sin[None, :] + imaginary * cos[None, :],
    )
    result = tl.reshape(rotated_pairs, (block_heads, block_width)).to(out.dtype.element_ty)
    tl.store(out + row * out_row + head[:, None] * out_head + column[None, :], result, mask=inside)
