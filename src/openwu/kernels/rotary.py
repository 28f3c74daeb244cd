"""Rotary embedding in plain torch: heads and factors of modulus 1 enter, the same heads turned leave.

A pair (x[2k], x[2k+1]) read as x[2k] + i x[2k+1] is turned by one complex product: one temporary instead of seven.

Shapes: m heads, e head width; x `[..., m, e]`, turns `[..., 1, e / 2]` complex, whose leading axes broadcast to x's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """A new tensor in x's dtype, computed in the turns' precision; differentiable in x."""
    pairs = torch.view_as_complex(x.to(turns.dtype.to_real()).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def rotate_(x: Tensor, turns: Tensor, scratch: Callable[[], Tensor]) -> Tensor:
    """x, turned in place. `scratch`: gives memory of x's shape in the turns' real dtype, where x has another one."""
    if x.dtype == turns.dtype.to_real():
        torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(turns)
        return x
    wide = scratch().copy_(x)
    torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2)).mul_(turns)
    return x.copy_(wide)
