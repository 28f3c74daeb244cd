"""Rotation: multiply pairs of neighbouring output channels (u, v) by the complex number 1 + s (p + iq).

`(u, v) -> (u, v) + s (p u - q v, q u + p v)`: a rotation with a scaling for each pair, as in RoAd (Liao and Monz 2024,
arXiv 2409.00119), whose angle is arg(1 + s (p + iq)) and whose scale is its modulus. In p and q the change is linear,
so zeros change nothing, strength multiplies, and in a sum the changes add up.

Works on linear modules and on convolutions of even output width, not on experts. Merging turns the rows of the weight
and the bias.

Shapes: b samples, n rows of a module's input, pairs = out / 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from openwu.adapters.active import Active
from openwu.adapters.operators import Operator
from openwu.adapters.operators.channels import ChannelSite, summed_vectors
from openwu.adapters.site import Slot, check_widths
from openwu.errors import TargetError
from openwu.types import Factor, Target

TURNS = "turns"


class Rotation(Operator):
    """`(1 + s (p + iq)) (u + iv)` for each pair of channels: `turns` `[b, pairs, 2]` holds p and q."""

    linear = (TURNS,)

    def factors(self, target: Target, _: int, /) -> tuple[Factor, ...]:
        if target.out_dim % 2:
            raise TargetError(
                f"{target.name}: the operator 'rotation' turns pairs of channels, expected an even output width, got "
                f"{target.out_dim}; use another operator for this target"
            )
        return (Factor(TURNS, (target.out_dim // 2, 2), "vector"),)

    def summed(self, parts: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]) -> dict[str, Tensor]:
        return summed_vectors(self.linear, parts, ratios)

    def site(self, target: Target, module: nn.Module) -> RotationSite:
        check_widths(target, module)
        self.factors(target, 0)
        return RotationSite(module, target)

    def inner_products(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        """Of the numbers as vectors: the change of an output of ones, in both channels of a pair."""
        return one[TURNS].flatten(1).double() @ other[TURNS].flatten(1).double().T


class RotationSite(ChannelSite):
    """y `[n, ..., out]` of a linear module or `[n, out, h, w]` of a convolution, turns `[n or 1, pairs, 2]`."""

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        (turns,) = self.factors(y, x)
        scaled = (self.scale * turns).to(y.dtype)
        tokens, (p, q) = self.aligned(y, x, scaled.unbind(-1))
        return turned(tokens, p, q, self.axis).reshape(y.shape)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.weight_slots if self.module.bias is None else (*self.weight_slots, self.bias_slot)

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        turns = active.factors[self.path][TURNS][0]
        changes = []
        for slot in self.slots:
            parameter = slot.parameter
            assert parameter is not None
            wide = torch.promote_types(torch.promote_types(turns.dtype, parameter.dtype), torch.float32)
            rows = parameter.to(wide).flatten(1).T if parameter.ndim > 1 else parameter.to(wide)
            p, q = (active.scale * turns.to(wide)).unbind(-1)
            change = turned(rows, p, q, -1) - rows
            changes.append((change.T if parameter.ndim > 1 else change).reshape(parameter.shape))
        return tuple(changes)


def turned(y: Tensor, p: Tensor, q: Tensor, axis: int) -> Tensor:
    """Return (u + p u - q v, v + q u + p v) of the pairs (u, v) along an axis of y; p and q broadcast to u and v."""
    inner = axis if axis < 0 else axis + 1
    u, v = torch.unflatten(y, axis, (-1, 2)).unbind(inner)
    pair = (u + (p * u - q * v), v + (q * u + p * v))
    return torch.stack(pair, inner).reshape(y.shape)
