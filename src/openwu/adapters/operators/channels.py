"""Shared by operators that act on each output channel: shapes that broadcast, parameters that merging changes, sums.

Shapes: n rows of a module's input, T tokens of a packed sequence, k numbers of a vector (out, or pairs of channels).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from openwu.adapters.site import PlainSite, Slot
from openwu.errors import TargetError


class ChannelSite(PlainSite):
    """A site whose update reads the output: y `[n, ..., out]`, or `[n, out, h, w]` of a convolution or group norm."""

    @property
    def pictures(self) -> bool:
        """Whether channels are the second axis of the output and not the last."""
        return isinstance(self.module, nn.Conv2d | nn.GroupNorm)

    @property
    def axis(self) -> int:
        """The axis of the channels in what `aligned` returns."""
        return 1 if self.pictures else -1

    def aligned(self, y: Tensor, x: Tensor, vectors: Iterable[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and vectors `[n or 1, k]` in shapes that broadcast: `[n, m, out]` and `[n or 1, 1, k]`, say."""
        vectors = tuple(vectors)
        if self.pictures:
            if self._run_t is not None:
                raise TargetError(f"{self.path}: segments are runs of tokens, a convolution has none; use rows")
            if isinstance(self.module, nn.Conv2d) and x.ndim != 4:
                raise TargetError(f"{self.path}: expected an input [n, c, h, w], got shape {tuple(x.shape)}")
            return y, tuple(part.reshape(*part.shape, *[1] * (y.ndim - 2)) for part in vectors)
        rows = len(vectors[0])
        if self._run_t is not None:
            tokens = y.reshape(-1, y.shape[-1])
            self.check_runs(len(tokens), x)
            return tokens, vectors if rows == 1 else tuple(part.index_select(0, self._run_t) for part in vectors)
        if rows == 1:
            return y, tuple(part[0] for part in vectors)
        return y.reshape(rows, -1, y.shape[-1]), tuple(part[:, None] for part in vectors)

    @property
    def weight_slots(self) -> tuple[Slot, ...]:
        return (Slot(f"{self.path}.weight", self.module, "weight"),)

    @property
    def bias_slot(self) -> Slot:
        return Slot(f"{self.path}.bias", self.module, "bias")


def summed_vectors(
    names: Sequence[str], parts: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]
) -> dict[str, Tensor]:
    """Return the factors of these names, each the sum of the parts' times their ratios."""
    return {
        name: torch.stack([part[name] * ratio for part, ratio in zip(parts, ratios, strict=True)]).sum(0)
        for name in names
    }
