"""RMS normalisation that keeps its input's dtype. Enters and leaves: `[..., width]`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019), eps 1e-6, with weight.

    Under autocast a float32 weight would make the result, and with it a residual stream, float32: the weight follows
    the input instead.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)
