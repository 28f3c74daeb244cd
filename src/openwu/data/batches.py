"""Batches of training pairs, drawn without state: the batch of a step depends on the seed and the step alone.

That is what makes a training resumable to the same weights: no iterator has to be rewound. Tasks are balanced: every
batch walks through a shuffled list of sub-tasks.

Shapes: b requests, s side of the picture that the condition sees, k side of the crop that the base edits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwu.data.edits import EDITS
from openwu.data.photographs import Photograph, random_crop
from openwu.data.phrases import sample_phrase


@dataclass(frozen=True)
class PairBatch:
    """b requests with their answers."""

    names: tuple[str, ...]
    """Sub-task of each request."""
    sentences: tuple[str, ...]
    """Instruction of each request."""
    whole: Tensor
    """What the condition encoder sees: the whole input picture `[b, 3, s, s]`."""
    picture: Tensor
    """What the base edits: a crop of it `[b, 3, k, k]`."""
    noise: Tensor
    """The base's noise plane for the crop `[b, 1, k, k]`."""
    target: Tensor
    """What should come out `[b, 3, k, k]`."""


@dataclass(frozen=True)
class PairSampler:
    """Draws the batch of any step."""

    photographs: list[Photograph]
    tasks: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    """Steps walk through these (requests b, crop side k) in turn: small crops for variety, large ones for context."""
    side: int = 192
    """Side s of the picture that the condition sees."""
    seed: int = 0

    def batch(self, step: int) -> PairBatch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        names = self._balanced(step)
        crop = self.shapes[step % len(self.shapes)][1]
        drawn = [self._pair(name, crop, generator) for name in names]
        stacked = [torch.stack(parts) for parts in zip(*(tensors for _, tensors in drawn), strict=True)]
        return PairBatch(names, tuple(sentence for sentence, _ in drawn), *stacked)

    def _balanced(self, step: int) -> tuple[str, ...]:
        """The next sub-tasks of an endless list made of shuffled rounds through all of them."""
        sizes = [requests for requests, _ in self.shapes]
        rounds, place = divmod(step, len(sizes))
        first = rounds * sum(sizes) + sum(sizes[:place])
        names = []
        for position in range(first, first + sizes[place]):
            turn, place = divmod(position, len(self.tasks))
            order = torch.Generator().manual_seed(self.seed * 7_000_003 + turn)
            names.append(self.tasks[int(torch.randperm(len(self.tasks), generator=order)[place])])
        return tuple(names)

    def _pair(
        self, name: str, crop: int, generator: torch.Generator
    ) -> tuple[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        source = random_crop(self.photographs, self.side, generator)
        noise = torch.randn(1, self.side, self.side, generator=generator)
        given, target = EDITS[name].make_pair(source, noise, generator)
        top, left = torch.randint(self.side - crop + 1, (2,), generator=generator).tolist()
        window = (slice(None), slice(top, top + crop), slice(left, left + crop))
        return sample_phrase(name, generator), (given, given[window], noise[window], target[window])
