"""Convolutions: y `[n, out, h', w']` of an `nn.Conv2d` enters, `y + scale * B (A x)` leaves.

A convolves as the module does, B is a 1x1 convolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from openwu.adapter.linear import product
from openwu.adapter.site import Active, PairSite
from openwu.errors import TargetError
from openwu.ops import dispatch
from openwu.types import Target


class ConvSite(PairSite):
    """x `[n, in, h, w]`, A `[n or 1, r, in * kh * kw]` (in the order of the module's weight), B `[n or 1, out, r]`."""

    module: nn.Conv2d

    def __init__(self, target: Target, module: nn.Conv2d) -> None:
        if module.groups != 1:
            raise TargetError(f"{target.name}: expected an ungrouped convolution, got one of {module.groups} groups")
        height, width = module.kernel_size
        in_dim = module.in_channels * height * width
        if (in_dim, module.out_channels) != (target.in_dim, target.out_dim):
            raise TargetError(
                f"{target.name}: expected a convolution {target.in_dim} -> {target.out_dim}, got {module.in_channels} "
                f"channels * {height} * {width} = {in_dim} -> {module.out_channels}"
            )
        super().__init__(module, target)

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        x = x.to(y.device)
        a, b = self.pair(y, x)
        conv = self.module
        if self._run_t is not None:
            raise TargetError(f"{self.path}: segments are runs of tokens, a convolution has none; use rows")
        if x.ndim != 4:
            raise TargetError(f"{self.path}: expected an input [n, c, h, w], got shape {tuple(x.shape)}")
        padding: tuple[int, ...] | str = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)
        a = a.view(*a.shape[:2], conv.in_channels, *conv.kernel_size)
        return dispatch.add_conv(y, x, a, b, self.scale, conv.stride, padding, conv.dilation)

    def weight_delta(self, active: Active) -> Tensor:
        a, b = active.pair(self.path)
        return product(a, b, active.scale, self.module.weight.dtype).view(self.module.weight.shape)
