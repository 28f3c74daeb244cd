"""LoRA: `y + scale * B (A x)`, on linear modules and convolutions; experts are `experts.py`'s and `stacked.py`'s.

Of a convolution, A convolves as the module does, and B is a 1x1 convolution.

Shapes: b samples, n rows of a module's input, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwu.adapters.active import Active
from openwu.adapters.operators import Operator
from openwu.adapters.site import PlainSite, check_widths
from openwu.errors import TargetError
from openwu.kernels import dispatch
from openwu.types import LORA_A, LORA_B, Factor, Target


class Lora(Operator):
    """`y + scale * B (A x)`: A `[b, (E,) r, in]`, B `[b, (E,) out, r]`."""

    linear = (LORA_B,)
    rank_factor = LORA_A
    takes_experts = True

    def factors(self, target: Target, rank: int, /) -> tuple[Factor, ...]:
        lead = () if target.experts is None else (target.experts,)
        a, b = (*lead, rank, target.in_dim), (*lead, target.out_dim, rank)
        return Factor(LORA_A, a, "A"), Factor(LORA_B, b, "B")

    def summed(self, parts: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]) -> dict[str, Tensor]:
        """Side by side: ranks add up."""
        ups = [part[LORA_B] * ratio for part, ratio in zip(parts, ratios, strict=True)]
        return {LORA_A: torch.cat([part[LORA_A] for part in parts], dim=-2), LORA_B: torch.cat(ups, dim=-1)}

    def site(self, target: Target, module: nn.Module) -> PlainSite:
        return ConvSite(target, module) if isinstance(module, nn.Conv2d) else LinearSite(target, module)

    def inner_products(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        """<B1 A1, B2 A2> = sum over ranks of (B1^T B2) * (A1 A2^T), without forming the products."""
        across = _cross(one[LORA_A], other[LORA_A])  # [E, b1, r, b2, s]
        down = _cross(one[LORA_B].transpose(-1, -2), other[LORA_B].transpose(-1, -2))
        return (across * down).sum(dim=(0, 2, 4)).double()


class LinearSite(PlainSite):
    """x `[n, ..., in]`, A `[n or 1, r, in]`, B `[n or 1, out, r]`."""

    module: nn.Linear

    def __init__(self, target: Target, module: nn.Module) -> None:
        check_widths(target, module)
        super().__init__(module, target)
        self.makes_output = type(module) is nn.Linear

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        # Offloading moves a module's input inside its forward, after the hooks have seen it: follow the output.
        if x.device != y.device:
            x = x.to(y.device)
        a, b = self.factors(y, x)
        if self._run_t is None:
            return dispatch.add_linear(y, x, a, b, self.scale, in_place=self.may_write(y))
        assert self._ends is not None
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        self.check_runs(len(flat_x), x)
        if len(a) == 1:  # all segments have the same adapter
            return dispatch.add_linear(flat_y, flat_x, a, b, self.scale).view(y.shape)
        return dispatch.add_sorted(flat_y, flat_x, a, b, self.scale, self._run_t, self._ends).view(y.shape)

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        return (product(*active.pair(self.path), active.scale, self.module.weight.dtype),)


class ConvSite(PlainSite):
    """x `[n, in, h, w]`, A `[n or 1, r, in * kh * kw]` (in the order of the module's weight), B `[n or 1, out, r]`."""

    module: nn.Conv2d

    def __init__(self, target: Target, module: nn.Conv2d) -> None:
        check_widths(target, module)
        super().__init__(module, target)

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        x = x.to(y.device)
        a, b = self.factors(y, x)
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

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        weight = self.module.weight
        return (product(*active.pair(self.path), active.scale, weight.dtype).view(weight.shape),)


def product(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * B A `[out, in]` of A `[1, r, in]` and B `[1, out, r]`, in `dtype`, A's dtype or float32, the widest."""
    wide = torch.promote_types(torch.promote_types(a.dtype, dtype), torch.float32)
    return scale * (b[0].to(wide) @ a[0].to(wide))


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """x `[b1, (E,) r, n]`, y `[b2, (E,) s, n]` -> products of all rows `[E or 1, b1, r, b2, s]`."""
    x, y = (each if each.ndim == 4 else each[:, None] for each in (x.double(), y.double()))
    experts = x.shape[1]
    rows = [each.transpose(0, 1).reshape(experts, -1, each.shape[-1]) for each in (x, y)]
    product = rows[0] @ rows[1].transpose(1, 2)
    return product.view(experts, x.shape[0], x.shape[2], y.shape[0], y.shape[2])
