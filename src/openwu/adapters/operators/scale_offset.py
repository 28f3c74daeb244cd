"""Output scale and offset: `y (1 + s g) + s o`, a gain and an offset for each channel of a module's output.

The gain alone (`scale`) is what (IA)^3 learns (Liu et al. 2022, arXiv 2205.05638, its multiplier l is 1 + s g); the
offset alone (`offset`) is a change of the bias, or a steering vector. Both are relative to the base's output, so zeros
change nothing, and in a sum gains add up as offsets do: the order of the adapters does not matter.

Works on linear modules and on convolutions, not on experts. Merging scales the rows of the weight and changes the bias,
which a module without one receives.

Shapes: b samples, n rows of a module's input, g and o `[b, out]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from openwu.adapters.active import Active
from openwu.adapters.operators import Operator
from openwu.adapters.site import PlainSite, Slot, check_widths
from openwu.errors import TargetError
from openwu.types import Factor, Target

GAIN, OFFSET = "gain", "offset"


class ScaleOffset(Operator):
    """`y (1 + s g) + s o`."""

    linear: ClassVar[tuple[str, ...]] = (GAIN, OFFSET)

    def factors(self, target: Target, _: int, /) -> tuple[Factor, ...]:
        return tuple(Factor(name, (target.out_dim,), "vector") for name in self.linear)

    def summed(self, parts: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]) -> dict[str, Tensor]:
        """1 + s (g1 + g2), not the product (1 + s g1) (1 + s g2) of one gain after another."""
        return {
            name: torch.stack([part[name] * ratio for part, ratio in zip(parts, ratios, strict=True)]).sum(0)
            for name in self.linear
        }

    def site(self, target: Target, module: nn.Module) -> PlainSite:
        return ScaleOffsetSite(target, module, self.linear)

    def inner_products(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        """Of gains and offsets as vectors: a gain counts as the change of an output of ones."""
        return torch.stack([one[name].double() @ other[name].double().T for name in self.linear]).sum(0)


class Scale(ScaleOffset):
    """`y (1 + s g)`, the gain alone."""

    linear = (GAIN,)


class Offset(ScaleOffset):
    """`y + s o`, the offset alone."""

    linear = (OFFSET,)


class ScaleOffsetSite(PlainSite):
    """y `[n, ..., out]` of a linear module or `[n, out, h, w]` of a convolution, factors `[n or 1, out]`."""

    module: nn.Linear | nn.Conv2d

    def __init__(self, target: Target, module: nn.Module, names: tuple[str, ...]) -> None:
        check_widths(target, module)
        super().__init__(module, target)
        self._names = names

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        factors = self.factors(y, x)
        tokens, factors = self._aligned(y, x, factors)
        changed = tokens
        for name, part in zip(self._names, factors, strict=True):
            # Scaled in the factor's precision; 1 + s g is never formed, in which 16 bits would lose a small gain.
            scaled = (self.scale * part).to(y.dtype)
            changed = torch.addcmul(changed, tokens, scaled) if name == GAIN else changed + scaled
        return changed.reshape(y.shape)

    def _aligned(self, y: Tensor, x: Tensor, factors: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and the factors in shapes that broadcast: `[n, m, out]` and `[n or 1, 1, out]`, for example."""
        if isinstance(self.module, nn.Conv2d):
            if self._run_t is not None:
                raise TargetError(f"{self.path}: segments are runs of tokens, a convolution has none; use rows")
            if x.ndim != 4:
                raise TargetError(f"{self.path}: expected an input [n, c, h, w], got shape {tuple(x.shape)}")
            return y, tuple(part[:, :, None, None] for part in factors)
        rows = len(factors[0])
        if self._run_t is not None:
            tokens = y.reshape(-1, y.shape[-1])
            self.check_runs(len(tokens), x)
            return tokens, factors if rows == 1 else tuple(part.index_select(0, self._run_t) for part in factors)
        if rows == 1:
            return y, tuple(part[0] for part in factors)
        return y.reshape(rows, -1, y.shape[-1]), tuple(part[:, None] for part in factors)

    @property
    def slots(self) -> tuple[Slot, ...]:
        weight = super().slots
        if self.module.bias is None and OFFSET not in self._names:
            return weight
        return *weight, Slot(f"{self.path}.bias", self.module, "bias")

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        weight, bias = self.module.weight, self.module.bias
        parts = {name: part[0] for name, part in active.factors[self.path].items()}
        first = next(iter(parts.values()))
        wide = torch.promote_types(torch.promote_types(first.dtype, weight.dtype), torch.float32)
        none = torch.zeros(weight.shape[0], dtype=wide, device=first.device)
        gain, offset = (active.scale * parts[name].to(wide) if name in parts else none for name in (GAIN, OFFSET))
        rows = gain.view(-1, *[1] * (weight.ndim - 1))
        return (rows * weight, offset if bias is None else gain * bias + offset)[: len(self.slots)]
