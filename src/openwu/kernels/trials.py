"""What a kernel's first use is tried with: inputs of a call go in, both ways on drawn numbers of their kind come out.

Sizes, dtypes and device are those of the call, up to `MOST` numbers; the numbers are drawn by a generator of their
own, so that nobody's random numbers change. Where a call can be differentiated, gradients are part of the results.

Only where Triton is installed: this imports the kernels. Shapes: r rows, else as in `dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from openwu.kernels import low_rank as grouped
from openwu.kernels import low_rank as lora
from openwu.kernels import norm, rotary
from openwu.kernels.attention_choice import Trial
from openwu.kernels.grouped import group_ends

MOST = 2**25
"""Numbers of a trial's largest input: 64 MB in bfloat16, enough for times to be those of large calls."""
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Tolerances: some units in the last place, since both ways round, at places of their own."""
SUMS = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""The same for sums over a thousand products and more; torch may be allowed TF32 for those in float32."""


class Draw:
    """Normally distributed numbers on a device."""

    def __init__(self, device: torch.device) -> None:
        self._random = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, generator=self._random, device=self._random.device)
        return numbers.mul_(size).to(dtype)


def of_sorted(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Trial:
    """Equal groups, but one without rows."""
    from openwu.kernels import low_rank_triton as kernel

    draw, (groups, rank, in_dim), out_dim = Draw(y.device), a.shape, y.shape[1]
    count = max(1, min(len(y), MOST // max(in_dim, out_dim)))
    y, x = draw(count, out_dim, dtype=y.dtype), draw(count, in_dim, dtype=x.dtype)
    a = draw(groups, rank, in_dim, dtype=a.dtype, size=in_dim**-0.5)
    # The update is as large as what it is added to, whatever the scale: one that is wrong shows.
    b = draw(groups, out_dim, rank, dtype=b.dtype, size=1 / (rank**0.5 * abs(scale) or 1))
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


def of_rotate_(x: Tensor) -> Trial:
    """In place: every run turns its own copy once more."""
    from openwu.kernels import rotary_triton as kernel

    heads, turns = _heads(x)
    ours, plain = heads.clone(), heads
    wide = torch.empty(heads.shape, device=heads.device)
    rows = kernel.rows(ours, turns)
    assert rows is not None

    def kernel_run() -> Sequence[Tensor]:
        kernel.rotate_(rows)
        return [ours]

    return Trial(kernel_run, without_gradients(lambda: [rotary.rotate_(plain, turns, lambda: wide)]), ROUNDING[x.dtype])


def of_rotated(x: Tensor) -> Trial:
    """A new tensor, and the gradient."""
    from openwu.kernels import rotary_triton as kernel

    heads, turns = _heads(x)
    heads.requires_grad_()
    came = Draw(x.device)(*heads.shape, dtype=x.dtype)

    def ours() -> Sequence[Tensor]:
        rows = kernel.rows(heads, turns)
        assert rows is not None
        return [kernel.rotated(rows).view(heads.shape)]

    return Trial(
        with_gradients(ours, [heads], [came]),
        with_gradients(lambda: [rotary.rotated(heads, turns)], [heads], [came]),
        ROUNDING[x.dtype],
    )


def of_normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Trial:
    """The norm alone, and its gradients."""
    from openwu.kernels import norm_triton as kernel

    rows, scale = _rows(x, weight)
    inputs = [rows.requires_grad_(), scale.requires_grad_()]
    came = [Draw(x.device)(*rows.shape, dtype=dtype)]
    return Trial(
        with_gradients(lambda: [kernel.normed(rows, scale, eps, dtype)], inputs, came),
        with_gradients(lambda: [norm.normed(rows, scale, eps, dtype)], inputs, came),
        _norm_tolerance(x, weight, dtype),
    )


def of_add_normed(x: Tensor, update: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Trial:
    """Sum and norm, and their gradients."""
    from openwu.kernels import norm_triton as kernel

    rows, scale = _rows(x, weight)
    draw = Draw(x.device)
    added = draw(*rows.shape, dtype=update.dtype)
    inputs = [rows.requires_grad_(), added.requires_grad_(), scale.requires_grad_()]
    came = [draw(*rows.shape, dtype=each) for each in (x.dtype, dtype)]
    return Trial(
        with_gradients(lambda: kernel.add_normed(rows, added, scale, eps, dtype), inputs, came),
        with_gradients(lambda: norm.add_normed(rows, added, scale, eps, dtype), inputs, came),
        _norm_tolerance(x, weight, dtype),
    )


def of_add_normed_(x: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Trial:
    """In place: every run adds to its own copy once more."""
    from openwu.kernels import norm_triton as kernel

    plain, scale = _rows(x, weight)
    ours = plain.clone()
    added = None if update is None else Draw(x.device)(*plain.shape, dtype=update.dtype)
    return Trial(
        lambda: [kernel.add_normed_(ours, added, scale, eps, dtype), ours],
        without_gradients(lambda: [norm.add_normed_(plain, added, scale, eps, dtype), plain]),
        _norm_tolerance(x, weight, dtype),
    )


def without_gradients(run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """The same in a scope of no gradients, as in the call."""

    def plain() -> Sequence[Tensor]:
        with torch.no_grad():
            return run()

    return plain


def with_gradients(
    run: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], came: Sequence[Tensor]
) -> Callable[[], Sequence[Tensor]]:
    """The results and, for gradients `came` of them, those of the inputs."""

    def both() -> Sequence[Tensor]:
        results = run()
        return [*results, *torch.autograd.grad(list(results), list(inputs), list(came))]

    return both


def _heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Heads `[r, m, e]` beside others that are not turned, as queries beside values, and turns of half of the rows."""
    draw, (heads, width) = Draw(x.device), x.shape[-2:]
    rows = max(1, min(x.numel(), MOST) // (2 * heads * width)) * 2
    angles = draw(rows // 2, 1, width // 2, dtype=torch.float32, size=10.0)
    turns = torch.polar(torch.ones_like(angles), angles)
    drawn = draw(rows, heads, width, dtype=x.dtype).view(2, rows // 2, heads, width)
    return drawn, turns


def _rows(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[r, d]` of a stream and a weight about 1."""
    draw, width = Draw(x.device), x.shape[-1]
    rows = max(1, min(x.numel(), MOST) // width)
    return draw(rows, width, dtype=x.dtype), draw(width, dtype=weight.dtype, size=0.1).add_(1)


def _norm_tolerance(x: Tensor, weight: Tensor, dtype: torch.dtype) -> float:
    """That of the coarsest dtype; the weight's gradient is a sum over all rows."""
    return max(SUMS[each] for each in (x.dtype, weight.dtype, dtype))
