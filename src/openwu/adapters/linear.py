"""Convolutions: y `[n, out, h', w']` of an `nn.Conv2d` enters, `y + scale * B (A x)` leaves.

A convolves as the module does, B is a 1x1 convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwu.adapters.site import Active, PairSite
from openwu.errors import TargetError
from openwu.kernels import dispatch
from openwu.types import Target


class LinearSite(PairSite):
    """x `[n, ..., in]`, A `[n or 1, r, in]`, B `[n or 1, out, r]`."""

    module: nn.Linear

    def __init__(self, target: Target, module: nn.Linear) -> None:
        check_widths(target.name, module, target.in_dim, target.out_dim)
        super().__init__(module, target)
        self.makes_output = type(module) is nn.Linear

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        # Offloading moves a module's input inside its forward, after the hooks have seen it: follow the output.
        if x.device != y.device:
            x = x.to(y.device)
        a, b = self.pair(y, x)
        if self._run_t is None:
            return dispatch.add_linear(y, x, a, b, self.scale, in_place=self.may_write(y))
        assert self._ends is not None
        flat_x = x.reshape(-1, x.shape[-1])
        if len(flat_x) != len(self._run_t):
            raise TargetError(
                f"{self.path}: the segments hold {len(self._run_t)} tokens, but the module's input has shape "
                f"{tuple(x.shape)}"
            )
        flat_y = y.reshape(-1, y.shape[-1])
        if len(a) == 1:  # all segments have the same adapter
            return dispatch.add_linear(flat_y, flat_x, a, b, self.scale).view(y.shape)
        return dispatch.add_sorted(flat_y, flat_x, a, b, self.scale, self._run_t, self._ends).view(y.shape)

    def weight_delta(self, active: Active) -> Tensor:
        a, b = active.pair(self.path)
        return product(a, b, active.scale, self.module.weight.dtype)


def check_widths(path: str, module: nn.Linear, in_dim: int, out_dim: int) -> None:
    """Refuse a module of other widths than the target's."""
    if (module.in_features, module.out_features) != (in_dim, out_dim):
        raise TargetError(
            f"{path}: expected a linear module {in_dim} -> {out_dim}, got {module.in_features} -> {module.out_features}"
        )


def product(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * B A `[out, in]` of A `[1, r, in]` and B `[1, out, r]`, in `dtype`, A's dtype or float32, the widest."""
    wide = torch.promote_types(torch.promote_types(a.dtype, dtype), torch.float32)
    return scale * (b[0].to(wide) @ a[0].to(wide))


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
