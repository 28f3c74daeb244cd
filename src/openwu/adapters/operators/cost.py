"""Count what adapters of an operator hold: generated numbers of a request, numbers shared by all, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from openwu.types import Target


@dataclass(frozen=True)
class AdapterCost:
    """What adapters for some targets hold."""

    numbers: int
    """Generated for each request."""
    shared: int
    """Learned once for all requests."""
    itemsize: int
    """Bytes of one number."""

    @property
    def bytes_per_request(self) -> int:
        return self.numbers * self.itemsize

    @property
    def shared_bytes(self) -> int:
        return self.shared * self.itemsize


def adapter_cost(targets: Sequence[Target], rank: int, dtype: torch.dtype = torch.bfloat16) -> AdapterCost:
    """Count the numbers of an adapter for these targets, without making it."""
    numbers = shared = 0
    for target in targets:
        for factor in target.factors(rank):
            size = prod(factor.shape)
            if factor.name in target.rules.shared:
                shared += size
            else:
                numbers += size
    return AdapterCost(numbers, shared, dtype.itemsize)
