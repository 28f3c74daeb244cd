"""The only place that chooses an implementation; callers import the functions from here.

The `reference` of every operation defines its results. `lora.grouped` replaces it for sorted rows where torch has
grouped products: on a CPU for float32, bfloat16 and float16, on CUDA for bfloat16, for widths of whole multiples of 16
bytes. Triton kernels replace either on a GPU, where a first use finds them equal and faster (`autotune`).

Shapes: t sorted rows, g groups, r LoRA rank; m heads, e head width; d width of a residual stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openwu.kernels import autotune as kernels
from openwu.kernels import low_rank as grouped
from openwu.kernels import low_rank as lora
from openwu.kernels import norm, rotary, trials
from openwu.kernels.autotune import CHOICES, bucket
from openwu.kernels.low_rank import add_conv, add_linear, add_routed, contained

__all__ = [
    "add_conv",
    "add_linear",
    "add_rms_norm",
    "add_rms_norm_",
    "add_routed",
    "add_sorted",
    "apply_rotary",
    "apply_rotary_",
    "rms_norm",
]


def add_sorted(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    group_t: Tensor,
    ends: Tensor,
    *,
    in_place: bool = False,
) -> Tensor:
    """Rows sorted by group: y `[t, out]`, x `[t, in]`, a `[g, r, in]`, b `[g, out, r]`, group_t `[t]` ascending.

    `ends` `[g]` int32: where each group's rows end, the last at t. `in_place`: y may be written over, since nobody else
    holds it; whether it is, is left open.
    """

    def plain() -> Tensor:
        if grouped.fits(y, x, a):
            return grouped.add_grouped(y, x, a, b, scale, ends, in_place=in_place)
        return lora.add_routed(y, x, *contained(a, b.to(y.dtype)), scale, group_t)

    # Gradients are plain torch's: the kernel has none.
    if not kernels.usable(y, x, a, b, ends) or _differentiated(y, x, a, b):
        return plain()
    from openwu.kernels import low_rank_triton as kernel

    if not kernel.fits(y, x, a):
        return plain()
    key = (bucket(len(y)), *a.shape, y.shape[1], y.dtype, a.dtype, b.dtype)
    return CHOICES.run(
        "low-rank update of sorted rows",
        key,
        y.device,
        lambda: trials.of_sorted(y, x, a, b, float(scale)),
        lambda: kernel.add_sorted(y, x, a, b, float(scale), ends),
        plain,
    )


def apply_rotary(x: Tensor, turns: Tensor) -> Tensor:
    """Heads x `[..., m, e]` turned by `turns` `[..., 1, e / 2]`, a new tensor; differentiable in x."""
    if kernels.usable(x, turns):
        from openwu.kernels import rotary_triton as kernel

        rows = kernel.rows(x, turns)
        if rows is not None:
            return CHOICES.run(
                "rotary embedding",
                _rotary_key(x),
                x.device,
                lambda: trials.of_apply_rotary(x),
                lambda: kernel.apply_rotary(rows).view(x.shape),
                lambda: rotary.apply_rotary(x, turns),
            )
    return rotary.apply_rotary(x, turns)


def apply_rotary_(x: Tensor, turns: Tensor, scratch: Callable[[], Tensor]) -> Tensor:
    """The same in place, without gradients; `scratch` as for `rotary.apply_rotary_`."""

    def plain() -> Tensor:
        return rotary.apply_rotary_(x, turns, scratch)

    if not kernels.usable(x, turns):
        return plain()
    from openwu.kernels import rotary_triton as kernel

    rows = kernel.rows(x, turns)
    if rows is None:
        return plain()

    def turned() -> Tensor:
        kernel.apply_rotary_(rows)
        return x

    return CHOICES.run(
        "rotary embedding in place", _rotary_key(x), x.device, lambda: trials.of_apply_rotary_(x), turned, plain
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm of x `[..., d]` in `dtype`; differentiable in x and weight."""
    if kernels.usable(x, weight):
        from openwu.kernels import norm_triton as kernel

        if kernel.fits(x, weight):
            return CHOICES.run(
                "RMSNorm",
                _norm_key(x, None, weight, dtype),
                x.device,
                lambda: trials.of_rms_norm(x, weight, eps, dtype),
                lambda: kernel.rms_norm(x, weight, eps, dtype),
                lambda: norm.rms_norm(x, weight, eps, dtype),
            )
    return norm.rms_norm(x, weight, eps, dtype)


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + update in x's dtype, and its RMSNorm in `dtype`; differentiable in x, update and weight."""
    if kernels.usable(x, update, weight):
        from openwu.kernels import norm_triton as kernel

        if kernel.fits(x, weight):
            return CHOICES.run(
                "residual addition and RMSNorm",
                _norm_key(x, update, weight, dtype),
                x.device,
                lambda: trials.of_add_rms_norm(x, update, weight, eps, dtype),
                lambda: kernel.add_rms_norm(x, update, weight, eps, dtype),
                lambda: norm.add_rms_norm(x, update, weight, eps, dtype),
            )
    return norm.add_rms_norm(x, update, weight, eps, dtype)


def add_rms_norm_(x: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x += update where there is one; its RMSNorm, contiguous. Without gradients."""
    if kernels.usable(x, weight) and (update is None or kernels.usable(x, update)):
        from openwu.kernels import norm_triton as kernel

        if kernel.fits(x, weight):
            return CHOICES.run(
                "residual addition and RMSNorm in place",
                _norm_key(x, update, weight, dtype),
                x.device,
                lambda: trials.of_add_rms_norm_(x, update, weight, eps, dtype),
                lambda: kernel.add_rms_norm_(x, update, weight, eps, dtype),
                lambda: norm.add_rms_norm_(x, update, weight, eps, dtype),
            )
    return norm.add_rms_norm_(x, update, weight, eps, dtype)


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _rotary_key(x: Tensor) -> tuple[object, ...]:
    return bucket(x.numel() // (x.shape[-1] * x.shape[-2])), *x.shape[-2:], x.dtype


def _norm_key(x: Tensor, update: Tensor | None, weight: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    added = None if update is None else update.dtype
    return bucket(x.numel() // x.shape[-1]), x.shape[-1], x.is_contiguous(), x.dtype, added, weight.dtype, dtype
