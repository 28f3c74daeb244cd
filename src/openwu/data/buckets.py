"""Bucketed batches: pairs of one shape in each batch, buckets in proportion to their size.

The pairs of a step depend on its number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property

import torch

from openwu.data.pairs import Pair, Pairs


@dataclass(frozen=True)
class Buckets:
    """Pairs in groups of one shape each."""

    groups: tuple[Pairs, ...]
    count: int
    """Pairs of a batch."""
    seed: int = 0

    @classmethod
    def of(cls, pairs: Pairs, shape: Callable[[Pair], Hashable], count: int, seed: int = 0) -> Buckets:
        """Group pairs by their shape, in the order in which shapes first come."""
        found: dict[Hashable, list[Pair]] = {}
        for pair in pairs.pairs:
            found.setdefault(shape(pair), []).append(pair)
        return cls(tuple(Pairs(tuple(group)) for group in found.values()), count, seed)

    def step(self, step: int) -> list[tuple[Pair, str]]:
        """Return the pairs of a step with one of their wordings each; tasks take turns in a bucket, see `Pairs.step`.

        In a round every bucket comes as often as it fills batches, once at least; rounds are shuffled.
        """
        again, place = divmod(step, len(self._round))
        shuffled = torch.randperm(
            len(self._round), generator=torch.Generator().manual_seed(self.seed * 5_000_011 + again)
        )
        order = [self._round[i] for i in shuffled.tolist()]
        group = order[place]
        turn = again * self._round.count(group) + order[:place].count(group)
        chosen: list[tuple[Pair, str]] = self.groups[group].step(turn, self.count, self.seed)
        return chosen

    @cached_property
    def _round(self) -> list[int]:
        return [number for number, group in enumerate(self.groups) for _ in range(-(-len(group) // self.count))]
