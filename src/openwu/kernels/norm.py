"""RMSNorm and residual addition in plain torch: the reference of `norm_triton`. x: `[..., width]`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight in `dtype`, computed in the wider dtype of x and weight."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(dtype)


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x + update in x's dtype, and its norm in `dtype`; differentiable in x, update and weight."""
    x = x + update.to(x.dtype)
    return x, rms_norm(x, weight, eps, dtype)


def add_rms_norm_(x: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Add an update to x in place, if any; return the norm in `dtype`, contiguous."""
    if update is not None:
        x += update
    return rms_norm(x, weight, eps, dtype).contiguous()


class RMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) with weight, eps 1e-6, in the input's dtype.

    The weight is cast to the input's dtype: under autocast a float32 weight would make the result, and with it the
    residual stream, float32.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)
