"""Residual addition and RMSNorm as one Triton kernel, forward and backward, with float32 statistics.

Same results as `norm`; where that computes a norm in half precision, the kernel rounds less often. The residual stream
keeps its dtype: the sum is rounded to it before the norm reads it, as two separate steps would do.

Shapes: r rows, d width; x and update `[..., d]`, weight `[d]`. One program handles a row, so d is at most `MAX_WIDTH`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_WIDTH = 16384
PARTS = 512
"""Programs of the backward pass; each sums the weight's gradient over its rows, in a fixed order."""
LEADING = 3
"""Leading axes whose strides the kernel takes."""


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel accepts this x: contiguous rows along at most three axes."""
    strided = x.ndim <= LEADING + 1 or x.is_contiguous()
    return strided and x.stride(-1) == 1 and x.numel() > 0 and x.shape[-1] <= MAX_WIDTH and weight.is_contiguous()


def add_rms_norm_(x: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Add an update to x in place, if any; return the norm, new and contiguous."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    forward_into(x, out, None, x, None if update is None else update.contiguous(), weight, eps)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the norm of x; differentiable in x and weight."""
    out: Tensor = _AddNormed.apply(x, None, weight, eps, dtype)[1]  # type: ignore[no-untyped-call]
    return out


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x + update in x's dtype, and its norm; differentiable in x, update and weight."""
    out: tuple[Tensor, Tensor] = _AddNormed.apply(x, update, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return out


def forward_into(
    total: Tensor, out: Tensor, inverse_r: Tensor | None, x: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> None:
    """Run the forward kernel, which writes three results.

    x + update to `total` (with x's strides; not written without an update), its norm to `out` (contiguous) and
    1 / sqrt(mean square + eps) of every row to `inverse_r` (float32).
    """
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    if x.is_contiguous():
        x = x.view(1, 1, -1, width)
    while x.ndim < LEADING + 1:
        x = x[None]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _forward[(x.numel() // width,)](
            x,
            x if update is None else update,
            weight,
            total,
            out,
            x if inverse_r is None else inverse_r,
            x.shape[1],
            x.shape[2],
            *x.stride()[:LEADING],
            width,
            eps,
            adds=update is not None,
            keeps=inverse_r is not None,
            block=block,
            num_warps=_warps(block),
        )


def backward_into(
    grad_x: Tensor,
    grad_weight_pd: Tensor,
    total: Tensor,
    inverse_r: Tensor,
    weight: Tensor,
    grad_out: Tensor,
    grad_total: Tensor | None,
) -> None:
    """Write x's gradient `[..., d]`, and partial sums `[p, d]` float32 of the weight's gradient. All are contiguous.

    `grad_total`: the gradient of the residual stream itself.
    """
    width = total.shape[-1]
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(total):  # type: ignore[no-untyped-call]
        _backward[(len(grad_weight_pd),)](
            total,
            inverse_r,
            weight,
            grad_out,
            grad_out if grad_total is None else grad_total,
            grad_x,
            grad_weight_pd,
            total.numel() // width,
            width,
            adds=grad_total is not None,
            block=block,
            num_warps=_warps(block),
        )


class _AddNormed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        total = x if update is None else torch.empty_like(x)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        inverse_r = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)
        forward_into(total, out, inverse_r, x, None if update is None else update.contiguous(), weight, eps)
        ctx.save_for_backward(total, inverse_r, weight)
        ctx.update_dtype = None if update is None else update.dtype
        return (None if update is None else total), out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_out: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        total, inverse_r, weight = ctx.saved_tensors
        grad_x, grad_weight = grad_total, None
        if grad_out is not None:
            grad_x = torch.empty_like(total)
            parts = torch.empty(min(PARTS, len(inverse_r)), total.shape[-1], dtype=torch.float32, device=total.device)
            along = None if grad_total is None else grad_total.contiguous()
            backward_into(grad_x, parts, total, inverse_r, weight, grad_out.contiguous(), along)
            grad_weight = parts.sum(0).to(weight.dtype)
        grad_update = None if ctx.update_dtype is None or grad_x is None else grad_x.to(ctx.update_dtype)
        return grad_x, grad_update, grad_weight, None, None


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x,
    update,
    weight,
    total,
    out,
    inverse,
    second,
    third,
    first_stride,
    second_stride,
    third_stride,
    width,
    eps,
    adds: tl.constexpr,
    keeps: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = row // (second * third) * first_stride + row // third % second * second_stride + row % third * third_stride
    column = tl.arange(0, block)
    inside = column < width
    numbers = tl.load(x + at + column, mask=inside, other=0.0)
    if adds:
        # Rounded to the stream's dtype, so that the norm reads what the stream stores.
        added = tl.load(update + row * width + column, mask=inside, other=0.0).to(numbers.dtype)
        numbers = (numbers.to(tl.float32) + added.to(tl.float32)).to(numbers.dtype)
        tl.store(total + at + column, numbers, mask=inside)
    wide = numbers.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    if keeps:
        tl.store(inverse + row, factor)
    scaled = wide * factor * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    total,
    inverse,
    weight,
    grad_out,
    grad_total,
    grad_x,
    grad_weight,
    rows,
    width,
    adds: tl.constexpr,
    block: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, block)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    partial = tl.zeros((block,), tl.float32)
    programs = tl.num_programs(0)
    start = program.to(tl.int64) * width
    for row in range(program, rows, programs):
        at = start + column
        factor = tl.load(inverse + row)
        unit = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * factor
        upstream = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
        partial += upstream * unit
        upstream = upstream * scale
        grad = factor * (upstream - unit * (tl.sum(upstream * unit, axis=0) / width))
        if adds:
            grad += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        start += programs.to(tl.int64) * width
    tl.store(grad_weight + program * width + column, partial, mask=inside)
