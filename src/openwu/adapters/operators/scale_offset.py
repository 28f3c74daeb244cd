"""Output scale and offset: `y (1 + s g) + s o`, a gain and an offset for each channel of a module's output.

The gain alone (`scale`) is what (IA)^3 learns (Liu et al. 2022, arXiv 2205.05638, its multiplier l is 1 + s g); the
offset alone (`offset`) is a change of the bias, or a steering vector. Both are relative to the base's output, so zeros
change nothing, and in a sum gains add up as offsets do: the order of the adapters does not matter.

`scale_offset` is FiLM (Perez et al. 2017, arXiv 1709.07871). An offset on the map that computes AdaLN's
modulation is an offset of shift, scale and gate at every time step.

Works on linear modules, on convolutions and on norms (`norms`), not on experts. Merging scales the rows of the weight
and changes the bias, which a module without one receives.

Shapes: b samples, n rows of a module's input, g and o `[b, out]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from openwu.adapters.active import Active
from openwu.adapters.operators import Operator
from openwu.adapters.operators.channels import ChannelSite, summed_vectors
from openwu.adapters.operators.norms import check_multiplies, check_norm, is_norm
from openwu.adapters.site import Slot, check_widths
from openwu.types import Factor, Target

GAIN, OFFSET = "gain", "offset"


class ScaleOffset(Operator):
    """`y (1 + s g) + s o`."""

    linear: tuple[str, ...] = (GAIN, OFFSET)

    def factors(self, target: Target, _: int, /) -> tuple[Factor, ...]:
        return tuple(Factor(name, (target.out_dim,), "vector") for name in self.linear)

    def summed(self, parts: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]) -> dict[str, Tensor]:
        """1 + s (g1 + g2), not the product (1 + s g1) (1 + s g2) of one gain after another."""
        return summed_vectors(self.linear, parts, ratios)

    def site(self, target: Target, module: nn.Module) -> ScaleOffsetSite:
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


class ScaleOffsetSite(ChannelSite):
    """y `[n, ..., out]`, or `[n, out, h, w]` of a convolution or group norm; factors `[n or 1, out]`."""

    def __init__(self, target: Target, module: nn.Module, names: tuple[str, ...]) -> None:
        norm = is_norm(module)
        if norm:
            check_norm(target, module, offset=OFFSET in names)
        else:
            check_widths(target, module)
        super().__init__(module, target)
        self._names = names
        self._norm = norm
        if norm:  # what is checked of other modules is whether W x is linear in W
            self._own_forward = False

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        tokens, factors = self.aligned(y, x, self.factors(y, x))
        changed = tokens
        for name, part in zip(self._names, factors, strict=True):
            # Scaled in the factor's precision; 1 + s g is never formed, in which 16 bits would lose a small gain.
            scaled = (self.scale * part).to(y.dtype)
            changed = torch.addcmul(changed, tokens, scaled) if name == GAIN else changed + scaled
        return changed.reshape(y.shape)

    @property
    def slots(self) -> tuple[Slot, ...]:
        bias = self.bias_slot
        return self.weight_slots if bias.parameter is None and OFFSET not in self._names else (*self.weight_slots, bias)

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        weight, bias = self.module.get_parameter("weight"), self.bias_slot.parameter
        if self._norm and GAIN in self._names:
            check_multiplies(self.path, self.module)
        parts = {name: part[0] for name, part in active.factors[self.path].items()}
        first = next(iter(parts.values()))
        wide = torch.promote_types(torch.promote_types(first.dtype, weight.dtype), torch.float32)
        none = torch.zeros(weight.shape[0], dtype=wide, device=first.device)
        gain, offset = (active.scale * parts[name].to(wide) if name in parts else none for name in (GAIN, OFFSET))
        rows = gain.view(-1, *[1] * (weight.ndim - 1))
        return (rows * weight, offset if bias is None else gain * bias + offset)[: len(self.slots)]
