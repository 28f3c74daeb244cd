"""Batches of pairs whose pictures differ in shape: every batch is of one bucket, and buckets come as often as is due.

Enters: pairs, and what must be equal within a batch. Leaves: the pairs of any step, by its number alone.
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
        """Groups in the order in which their shapes first come."""
        found: dict[Hashable, list[Pair]] = {}
        for pair in pairs.pairs:
            found.setdefault(shape(pair), []).append(pair)
        return cls(tuple(Pairs(tuple(group)) for group in found.values()), count, seed)

    def step(self, step: int) -> list[tuple[Pair, str]]:
        """The pairs of a step with one of their wordings each. Within a bucket tasks take turns, as `Pairs.step` says.

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
