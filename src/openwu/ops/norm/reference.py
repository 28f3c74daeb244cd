"""A residual stream and what is added to it enter; the stream and its RMSNorm leave. Plain torch.

Shapes: x and update `[..., d]`, weight `[d]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in `dtype`, computed in the wider of x's and the weight's dtype."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(dtype)


def add_normed(x: Tensor, update: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + update in x's dtype, and its norm; differentiable in x, update and weight."""
    x = x + update.to(x.dtype)
    return x, normed(x, weight, eps, dtype)


def add_normed_(x: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x += update where there is one; its norm, contiguous."""
    if update is not None:
        x += update
    return normed(x, weight, eps, dtype).contiguous()
