"""Trials of the Triton kernels for `autotune`: kernel and reference on random inputs like those of a call.

Sizes, dtypes and device are those of the call, up to `MAX_ELEMENTS`; the random numbers come from a generator of their
own, so that the global seed is untouched. For differentiable calls the gradients are compared too.

Imports the kernels: only where Triton is installed. Shapes: r rows, else as in `dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from openwu.kernels import low_rank as grouped
from openwu.kernels import low_rank as lora
from openwu.kernels import norm, rotary
from openwu.kernels.autotune import Trial
from openwu.kernels.grouped import group_ends

MAX_ELEMENTS = 2**25
"""Elements of a trial's largest input: 64 MB in bfloat16, enough for the timing of large calls."""
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Tolerances: some units in the last place, since both sides round, at different points."""
SUMS = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Tolerances for sums over a thousand products and more; torch may use TF32 for those in float32."""


class RandomNormal:
    """Normally distributed tensors on a device, with a fixed seed."""

    def __init__(self, device: torch.device) -> None:
        self._random = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, generator=self._random, device=self._random.device)
        return numbers.mul_(size).to(dtype)


def of_sorted(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Trial:
    """Low-rank update of sorted rows: groups of equal size, one of them empty."""
    from openwu.kernels import low_rank_triton as kernel

    normal, (groups, rank, in_dim), out_dim = RandomNormal(y.device), a.shape, y.shape[1]
    count = max(1, min(len(y), MAX_ELEMENTS // max(in_dim, out_dim)))
    y, x = normal(count, out_dim, dtype=y.dtype), normal(count, in_dim, dtype=x.dtype)
    a = normal(groups, rank, in_dim, dtype=a.dtype, size=in_dim**-0.5)
    # The update is as large as what it is added to, whatever the scale, so that a wrong one shows.
    b = normal(groups, out_dim, rank, dtype=b.dtype, size=1 / (rank**0.5 * abs(scale) or 1))
    group_t = torch.arange(count, device=y.device) * groups // count
    if groups > 1:
        group_t = group_t.clamp(min=1)
    ends = group_ends(group_t, groups)

    def plain() -> Tensor:
        if grouped.fits(y, x, a):
            return grouped.add_grouped(y, x, a, b, scale, ends)
        return lora.add_routed(y, x, a, b, scale, group_t)

    return Trial(
        lambda: [kernel.add_sorted(y, x, a, b, scale, ends)], without_gradients(lambda: [plain()]), SUMS[y.dtype]
    )


def of_apply_rotary_(x: Tensor) -> Trial:
    """Rotary embedding in place: every run rotates its own copy once more."""
    from openwu.kernels import rotary_triton as kernel

    heads, rotations = _heads(x)
    ours, plain = heads.clone(), heads
    wide = torch.empty(heads.shape, device=heads.device)
    rows = kernel.rows(ours, rotations)
    assert rows is not None

    def kernel_run() -> Sequence[Tensor]:
        kernel.apply_rotary_(rows)
        return [ours]

    return Trial(
        kernel_run, without_gradients(lambda: [rotary.apply_rotary_(plain, rotations, lambda: wide)]), ROUNDING[x.dtype]
    )


def of_apply_rotary(x: Tensor) -> Trial:
    """Rotary embedding as a new tensor, and its gradient."""
    from openwu.kernels import rotary_triton as kernel

    heads, rotations = _heads(x)
    heads.requires_grad_()
    grads = RandomNormal(x.device)(*heads.shape, dtype=x.dtype)

    def ours() -> Sequence[Tensor]:
        rows = kernel.rows(heads, rotations)
        assert rows is not None
        return [kernel.apply_rotary(rows).view(heads.shape)]

    return Trial(
        with_gradients(ours, [heads], [grads]),
        with_gradients(lambda: [rotary.apply_rotary(heads, rotations)], [heads], [grads]),
        ROUNDING[x.dtype],
    )


def of_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Trial:
    """RMSNorm and its gradients."""
    from openwu.kernels import norm_triton as kernel

    rows, scale = _rows(x, weight)
    inputs = [rows.requires_grad_(), scale.requires_grad_()]
    grads = [RandomNormal(x.device)(*rows.shape, dtype=dtype)]
    return Trial(
        with_gradients(lambda: [kernel.rms_norm(rows, scale, eps, dtype)], inputs, grads),
        with_gradients(lambda: [norm.rms_norm(rows, scale, eps, dtype)], inputs, grads),
        _norm_tolerance(x, weight, dtype),
    )


def of_add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Trial:
    """Residual addition and RMSNorm, and their gradients."""
    from openwu.kernels import norm_triton as kernel

    rows, scale = _rows(x, weight)
    normal = RandomNormal(x.device)
    added = normal(*rows.shape, dtype=update.dtype)
    inputs = [rows.requires_grad_(), added.requires_grad_(), scale.requires_grad_()]
    grads = [normal(*rows.shape, dtype=each) for each in (x.dtype, dtype)]
    return Trial(
        with_gradients(lambda: kernel.add_rms_norm(rows, added, scale, eps, dtype), inputs, grads),
        with_gradients(lambda: norm.add_rms_norm(rows, added, scale, eps, dtype), inputs, grads),
        _norm_tolerance(x, weight, dtype),
    )


def of_add_rms_norm_(x: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Trial:
    """Residual addition in place and RMSNorm: every run adds to its own copy once more."""
    from openwu.kernels import norm_triton as kernel

    plain, scale = _rows(x, weight)
    ours = plain.clone()
    added = None if update is None else RandomNormal(x.device)(*plain.shape, dtype=update.dtype)
    return Trial(
        lambda: [kernel.add_rms_norm_(ours, added, scale, eps, dtype), ours],
        without_gradients(lambda: [norm.add_rms_norm_(plain, added, scale, eps, dtype), plain]),
        _norm_tolerance(x, weight, dtype),
    )


def without_gradients(run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """Return `run` without gradients, as in the call."""

    def plain() -> Sequence[Tensor]:
        with torch.no_grad():
            return run()

    return plain


def with_gradients(
    run: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Callable[[], Sequence[Tensor]]:
    """Return a function for the results and the gradients of the inputs, given those of the results."""

    def both() -> Sequence[Tensor]:
        results = run()
        return [*results, *torch.autograd.grad(list(results), list(inputs), list(grads))]

    return both


def _heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return heads `[2, r / 2, m, e]`, strided as queries beside keys, and rotations of their rows."""
    normal, (heads, width) = RandomNormal(x.device), x.shape[-2:]
    rows = max(1, min(x.numel(), MAX_ELEMENTS) // (2 * heads * width)) * 2
    angles = normal(rows // 2, 1, width // 2, dtype=torch.float32, size=10.0)
    rotations = torch.polar(torch.ones_like(angles), angles)
    heads_2rme = normal(rows, heads, width, dtype=x.dtype).view(2, rows // 2, heads, width)
    return heads_2rme, rotations


def _rows(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows `[r, d]` of a residual stream and a weight around 1."""
    normal, width = RandomNormal(x.device), x.shape[-1]
    rows = max(1, min(x.numel(), MAX_ELEMENTS) // width)
    return normal(rows, width, dtype=x.dtype), normal(width, dtype=weight.dtype, size=0.1).add_(1)


def _norm_tolerance(x: Tensor, weight: Tensor, dtype: torch.dtype) -> float:
    """Return the tolerance of the coarsest dtype; the weight's gradient is a sum over all rows."""
    return max(SUMS[each] for each in (x.dtype, weight.dtype, dtype))
