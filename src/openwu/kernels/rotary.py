"""Rotary position embedding in plain torch: the reference of `rotary_triton`.

A pair (x[2k], x[2k+1]), read as the complex number x[2k] + i x[2k+1], is rotated by one complex product: one temporary
instead of seven.

Shapes: m heads, e head width; x `[..., m, e]`, rotations `[..., 1, e / 2]` complex of modulus 1, whose leading axes
broadcast to x's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def apply_rotary(x: Tensor, rotations: Tensor) -> Tensor:
    """Return x rotated, a new tensor in x's dtype, computed in the precision of the rotations; differentiable in x."""
    pairs = torch.view_as_complex(x.to(rotations.dtype.to_real()).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def apply_rotary_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Do as `apply_rotary` without complex numbers, which exporters do not know: cos, sin `[..., 1, e / 2]`, real."""
    real, imaginary = x.to(cos.dtype).reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def apply_rotary_(x: Tensor, rotations: Tensor, scratch: Callable[[], Tensor]) -> Tensor:
    """Rotate x in place. `scratch` returns a buffer of x's shape in the rotations' real dtype, if x has another."""
    if x.dtype == rotations.dtype.to_real():
        torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(rotations)
        return x
    wide = scratch().copy_(x)
    torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2)).mul_(rotations)
    return x.copy_(wide)
