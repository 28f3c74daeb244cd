"""DoRA: a low-rank update whose rows keep the weight's row norms, times a generated magnitude for each output channel.

`W' = m (W + s B A) / |W + s B A|`, |.| the norm of each row, with magnitudes m = |W| (1 + s g) (Liu et al. 2024, arXiv
2402.09353). The magnitude is generated relative to the weight's own, so that zeros in B and g are the base. Row norms
of the sum need no dense update: |W + s B A|^2 = |W|^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B>, row by row, per sample.

Strength multiplies B and the gain. Works on linear modules and on convolutions whose weights are numbers, not on
quantised weights and not on experts. Changes of two adapters do not add up to a third, so sums are refused.

Shapes: b samples, n rows of a module's input, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from openwu.adapters.active import Active
from openwu.adapters.operators import Operator
from openwu.adapters.operators.channels import ChannelSite
from openwu.adapters.operators.lora import Lora, product
from openwu.adapters.site import DENSE
from openwu.errors import TargetError
from openwu.types import LORA_A, LORA_B, Factor, Target

GAIN = "magnitude"


class Dora(Operator):
    """`m (W + s B A) / |W + s B A| x`: `lora_A` `[b, r, in]`, `lora_B` `[b, out, r]`, `magnitude` g `[b, out]`."""

    linear = (LORA_B, GAIN)
    rank_factor = LORA_A

    def factors(self, target: Target, rank: int, /) -> tuple[Factor, ...]:
        a, b = Factor(LORA_A, (rank, target.in_dim), "A"), Factor(LORA_B, (target.out_dim, rank), "B")
        return a, b, Factor(GAIN, (target.out_dim,), "vector")

    def summed(self, _: Sequence[Mapping[str, Tensor]], __: Sequence[float]) -> dict[str, Tensor]:
        raise TargetError(
            "dora: a sum of DoRA's changes is no DoRA, since each is divided by its own row norms; sum adapters of "
            "operator 'lora', or merge one after another"
        )

    def site(self, target: Target, module: nn.Module) -> DoraSite:
        return DoraSite(target, module)

    def inner_products(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        """Of the low-rank updates, and of gains as vectors: how the row norms turn them is left out."""
        return Lora().inner_products(one, other) + one[GAIN].double() @ other[GAIN].double().T


class DoraSite(ChannelSite):
    """The low-rank site of the same module, and a factor for each channel after it."""

    module: nn.Linear | nn.Conv2d

    def __init__(self, target: Target, module: nn.Module) -> None:
        self._inner = Lora().site(target, module)
        super().__init__(module, target)
        self.makes_output = self._inner.makes_output
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype not in DENSE:
            raise TargetError(
                f"{target.name}: the operator 'dora' reads the weight's row norms, expected a dense weight, got "
                f"{'none' if weight is None else weight.dtype}; use operator='lora' for quantised modules"
            )

    def load(self, active: Active) -> None:
        super().load(active)
        self._inner.flattened, self._inner.tokens_first = self.flattened, self.tokens_first
        self._inner.makes_output = self.makes_output
        self._inner.load(active.only(self.path, (LORA_A, LORA_B)))

    def clear(self) -> None:
        super().clear()
        self._inner.clear()

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        a, b, gain = self.factors(y, x)
        change = (self._ratios(a, b, self.scale) * (1 + self.scale * gain) - 1).to(y.dtype)
        y = self._inner.update(y, x)
        tokens, (change,) = self.aligned(y, x, (change,))
        bias = self.module.bias
        free = tokens if bias is None else tokens - (bias[:, None, None] if self.pictures else bias)
        return torch.addcmul(tokens, change, free).reshape(y.shape)

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        factors, weight = active.factors[self.path], self.module.weight
        a, b, gain = factors[LORA_A], factors[LORA_B], factors[GAIN]
        update = product(a, b, active.scale, weight.dtype)
        ratios = self._ratios(a, b, active.scale)
        change = (ratios * (1 + active.scale * gain.to(ratios.dtype)) - 1)[0].to(update.dtype)
        rows = weight.to(update.dtype).flatten(1)
        return ((update + change[:, None] * (rows + update)).view(weight.shape),)

    def _ratios(self, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
        """|W| / |W + s B A| of every row: `[n or 1, out]`, in float32 or wider; exactly 1 where B is zero."""
        weight = self.module.weight
        if weight.is_meta:
            raise TargetError(f"{self.path}: the operator 'dora' reads the weight, which is offloaded; load it whole")
        wide = torch.promote_types(torch.promote_types(a.dtype, weight.dtype), torch.float32)
        rows, a, b = weight.to(wide).flatten(1), a.to(wide), b.to(wide) * scale
        own = rows.square().sum(1).clamp(min=torch.finfo(wide).tiny)
        across = (a.flatten(0, 1) @ rows.T).view(*a.shape[:2], -1).mT  # [n, out, r]
        square = own + (b * (2 * across + b @ (a @ a.mT))).sum(-1)
        return (own / square.maximum(own * torch.finfo(wide).eps)).sqrt()
