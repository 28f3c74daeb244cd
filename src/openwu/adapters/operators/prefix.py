"""Prefix: keys and values that a module's input attends to beside its own output, as a prefix of an attention layer.

`y + s sum_h sum_i v_hi exp(k_hi x + b_hi) / (1 + sum_j exp(k_hj x + b_hj))`: r heads h, each with `SLOTS` generated
keys, values and thresholds, and with a softmax of its own. The 1 is a slot whose key and value are zero: with no key
near, nothing is added. Prefix tuning in the view of He et al. 2022 (arXiv 2110.04366): an update in parallel to a
module, whose bottleneck has a softmax. Their division by sqrt(in) is part of the keys, which a generator writes with
elements of variance about 1 / in, so that scores of inputs of unit variance start with unit variance.

Zeros in the values are the base bit for bit, whatever the keys are. In a sum of adapters the heads stand side by side.
An update through a softmax is no change of a weight: it cannot be merged, and no other tool's format holds it.

Works on linear modules and on convolutions (keys convolve as the module does), not on experts.

Shapes: b samples, n rows of a module's input, m tokens or pixels of a row, r heads (the adapter's rank), k = SLOTS * r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.adapters.active import Active
from openwu.adapters.operators import Operator
from openwu.adapters.site import PlainSite, check_widths
from openwu.errors import TargetError
from openwu.types import Factor, Target

KEYS, VALUES, THRESHOLDS = "prefix_keys", "prefix_values", "prefix_thresholds"
SLOTS = 4
"""Keys and values of each head, without the empty slot."""


class Prefix(Operator):
    """Attention to generated slots: `prefix_keys` `[b, SLOTS, r, in]`, `prefix_values` `[b, SLOTS, out, r]`, and
    `prefix_thresholds` `[b, SLOTS, r]`.
    """

    linear = (VALUES,)
    rank_factor = KEYS
    folds = False

    def factors(self, target: Target, rank: int, /) -> tuple[Factor, ...]:
        return (
            Factor(KEYS, (SLOTS, rank, target.in_dim), "A"),
            Factor(VALUES, (SLOTS, target.out_dim, rank), "B"),
            Factor(THRESHOLDS, (SLOTS, rank), "vector"),
        )

    def summed(self, parts: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]) -> dict[str, Tensor]:
        """Heads side by side, each with its softmax: their number, the rank, adds up."""
        values = [part[VALUES] * ratio for part, ratio in zip(parts, ratios, strict=True)]
        return {
            KEYS: torch.cat([part[KEYS] for part in parts], dim=-2),
            VALUES: torch.cat(values, dim=-1),
            THRESHOLDS: torch.cat([part[THRESHOLDS] for part in parts], dim=-1),
        }

    def site(self, target: Target, module: nn.Module) -> PlainSite:
        return PrefixConvSite(target, module) if isinstance(module, nn.Conv2d) else PrefixSite(target, module)

    def inner_products(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        """To first order around scores of zero, where every slot has 1 / (SLOTS + 1), for inputs of unit variance."""
        means, changes = zip(*(_first_order(each) for each in (one, other)), strict=True)
        total: Tensor = means[0] @ means[1].T + changes[0].flatten(1) @ changes[1].flatten(1).T
        return total / (SLOTS + 1) ** 2


class PrefixSite(PlainSite):
    """x `[n, ..., in]` of a linear module; factors `[n or 1, ...]`."""

    module: nn.Linear | nn.Conv2d

    def __init__(self, target: Target, module: nn.Module) -> None:
        check_widths(target, module)
        super().__init__(module, target)
        self._lengths: tuple[int, ...] = ()

    def take(self, active: Active) -> None:
        super().take(active)
        self._lengths = () if active.segments is None else active.segments.lengths

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        x = x.to(y.device)
        factors = self.factors(y, x)
        rows = len(factors[0])
        if self._run_t is None:
            return y + self._read(x.reshape(rows, -1, x.shape[-1]), y.dtype, *factors).reshape(y.shape)
        tokens = x.reshape(-1, x.shape[-1])
        self.check_runs(len(tokens), x)
        if rows == 1:
            return y + self._read(tokens[None], y.dtype, *factors).reshape(y.shape)
        runs = [
            self._read(run[None], y.dtype, *(part[i : i + 1] for part in factors))[0]
            for i, run in enumerate(torch.split_with_sizes(tokens, self._lengths))
        ]
        return y + torch.cat(runs).reshape(y.shape)

    def deltas(self, _: Active) -> tuple[Tensor, ...]:
        raise TargetError(f"{self.path}: {NOT_MERGED}")

    def _read(self, x: Tensor, dtype: torch.dtype, keys: Tensor, values: Tensor, thresholds: Tensor) -> Tensor:
        """x `[n, m, in]` -> what is added to the output, `[n, m, out]`."""
        scores = x @ keys.flatten(1, 2).to(x.dtype).mT
        shares = attended(torch.unflatten(scores, -1, thresholds.shape[1:]), thresholds[:, None], dim=-2)
        flat = values.transpose(1, 2).flatten(2)  # [n, out, k]
        return shares.flatten(-2).to(dtype) @ (self.scale * flat).to(dtype).mT


class PrefixConvSite(PrefixSite):
    """x `[n, in, h, w]`; keys in the order of the module's weight."""

    module: nn.Conv2d

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        x = x.to(y.device)
        keys, values, thresholds = self.factors(y, x)
        if self._run_t is not None:
            raise TargetError(f"{self.path}: segments are runs of tokens, a convolution has none; use rows")
        if x.ndim != 4:
            raise TargetError(f"{self.path}: expected an input [n, c, h, w], got shape {tuple(x.shape)}")
        conv, rows = self.module, len(keys)
        padding: tuple[int, ...] | str = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)
        kernels = keys.reshape(-1, conv.in_channels, *conv.kernel_size).to(x.dtype)
        merged = x if rows == 1 else x.flatten(0, 1)[None]  # one group of channels for every row
        scores = F.conv2d(merged, kernels, None, conv.stride, padding, conv.dilation, groups=rows)
        scores = scores.reshape(len(x), *thresholds.shape[1:], *scores.shape[2:])  # [n, SLOTS, r, h, w]
        shares = attended(scores, thresholds[..., None, None], dim=1).flatten(1, 2).flatten(2).to(y.dtype)
        flat = (self.scale * values.transpose(1, 2).flatten(2)).to(y.dtype)  # [n or 1, out, k]
        return y + (flat @ shares).reshape(y.shape)


NOT_MERGED = (
    "the operator 'prefix' adds through a softmax, which no weight can hold; apply it by hooks, "
    "attach(...).applied(...), or train operator='lora' for what has to be merged"
)


def attended(scores: Tensor, thresholds: Tensor, dim: int) -> Tensor:
    """exp(scores + thresholds) / (1 + their sum along an axis), in float32 or wider and without overflow."""
    wide = torch.promote_types(torch.promote_types(scores.dtype, thresholds.dtype), torch.float32)
    scores = scores.to(wide) + thresholds.to(wide)
    top = scores.detach().amax(dim, keepdim=True).clamp(min=0)
    parts = (scores - top).exp()
    return parts / ((-top).exp() + parts.sum(dim, keepdim=True))


def _first_order(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """SLOTS + 1 times the change at a zero input `[b, out]` and its derivative there `[b, out, in]`, in float64."""
    keys, values = factors[KEYS].double(), factors[VALUES].double().transpose(1, 2).flatten(2)
    # A score raises its own share at the cost of the head's others.
    return values.sum(-1), values @ (keys - keys.sum(1, keepdim=True) / (SLOTS + 1)).flatten(1, 2)
