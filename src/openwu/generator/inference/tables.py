"""Rotary tables as complex numbers, cached between calls, and the workspace of intermediate results.

A pair (x[2k], x[2k+1]) read as x[2k] + i x[2k+1] is turned by one complex product, in place and without a temporary
(`openwu.kernels`).

Shapes as in `blocks.py`: D head width, p positions of a base layer, n base layers, L condition tokens; the axis of
length 1 is that of the heads.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from openwu.generator.blocks import Rotary, block_rotary, key_rotary
from openwu.generator.layout import GroupLayout
from openwu.kernels.threads import worker


class Workspace:
    """One buffer for each name and thread of `kernels.threads`, as large as the largest request so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor over the buffer of this name."""
        size = prod(shape) * dtype.itemsize
        key = (name, worker())
        buffer = self._buffers.get(key)
        if buffer is None or buffer.device != device or buffer.numel() < size:
            # Given back first, so that both are never held at once.
            self._buffers.pop(key, None)
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
                buffer = self._buffers[key] = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer[:size].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """How much is held."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def poison(self) -> None:
        """Fill everything with bytes that are NaN in every float dtype: whoever reads before writing shows it."""
        for buffer in self._buffers.values():
            buffer.fill_(0xFF)

    def forget(self) -> None:
        """Give all memory back."""
        self._buffers.clear()


KEPT = 16
"""How many tables are kept: one per group of base layers and one per length of the condition, by dtype and device."""


@dataclass(frozen=True)
class RotaryTables:
    """The factors of a group's own positions."""

    layers_n1e: Tensor
    positions_p1e: Tensor
    cross_queries_np1e: Tensor

    def of_layers(self, start: int, stop: int) -> RotaryTables:
        """Those of some base layers, which read the condition as these and no others."""
        return replace(self, cross_queries_np1e=self.cross_queries_np1e[start:stop])


class Tables:
    """The tables used last, at most `kept`."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self._tables: OrderedDict[tuple[object, ...], RotaryTables | Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def rotary(self, head_dim: int, layout: GroupLayout, dtype: torch.dtype, device: torch.device) -> RotaryTables:
        """The factors of a group; `dtype` of their real and imaginary parts."""
        key = (head_dim, layout.num_layers, layout.num_tokens, layout.columns, dtype, device)
        found = self._tables.pop(key, None)
        if found is None:
            # The keys' part of the tables is made by itself: its length changes from request to request.
            angles = block_rotary(*key[:4], 1, device)
            found = RotaryTables(
                _factors(angles.layers, dtype),
                _factors(angles.positions, dtype),
                _factors(angles.cross_queries, dtype).view(layout.num_layers, layout.positions_per_layer, 1, -1),
            )
        self._keep(key, found)
        assert isinstance(found, RotaryTables)
        return found

    def cross_keys(
        self, head_dim: int, layout: GroupLayout, keys: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The factors `[L, 1, D/2]` of a condition's tokens."""
        key = (head_dim, max(layout.num_tokens, layout.columns), keys, dtype, device)
        found = self._tables.pop(key, None)
        if found is None:
            found = _factors(key_rotary(head_dim, layout.num_tokens, layout.columns, keys, device), dtype)
        self._keep(key, found)
        assert isinstance(found, Tensor)
        return found

    def _keep(self, key: tuple[object, ...], table: RotaryTables | Tensor) -> None:
        self._tables[key] = table
        while len(self._tables) > self.kept:
            self._tables.popitem(last=False)


def _factors(table: Rotary, dtype: torch.dtype) -> Tensor:
    return torch.complex(table.cos.to(dtype), table.sin.to(dtype)).unsqueeze(-2)
