"""Batches of edits that are shown by example: pairs before and after, and a photograph that is to be edited alike.

Shapes: b requests, p pairs of each, s side of whole pictures, k side of the crop that the base edits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.backbones.embedded.network import place_planes
from openwu.data.programs import TRAINED_FAMILIES, draw_program
from openwu.data.suite import EDITS, Scene
from openwu.data.suite.batches import CORNERS, PairBatch
from openwu.data.suite.operators import jpeg
from openwu.data.suite.photographs import Photograph, random_crop
from openwu.data.suite.phrases import sample_phrase

EXAMPLE = "example"
"""Name of programs in curves, beside those of sub-tasks."""
NAMED_SHARE = 0.2
"""Share of the requests whose example shows a sub-task of the suite; half of those say so in words, too."""
SECOND_SHARE = 0.25
"""Share of the batches with two pairs for every request."""
WORN_SHARE = 0.2
"""Share of the examples that went through a JPEG file, and again of those that were enlarged."""
SHOWN_NAMES = tuple(name for name, edit in EDITS.items() if not edit.needs_reference)


@dataclass(frozen=True)
class ExampleSampler:
    """Draws the batch of any step from photographs, without state."""

    photographs: list[Photograph]
    shapes: tuple[tuple[int, int], ...]
    """Steps walk through these (requests b, crop side k) in turn."""
    side: int = 192
    seed: int = 0
    families: tuple[str, ...] = TRAINED_FAMILIES

    def size(self, step: int) -> int:
        """Return the number of requests of a step."""
        return self.shapes[step % len(self.shapes)][0]

    def batch(self, step: int) -> PairBatch:
        """Draw the batch of a step."""
        generator = torch.Generator().manual_seed(self.seed * 9_000_011 + step)
        crop = self.shapes[step % len(self.shapes)][1]
        pairs, shown = torch.rand(2, generator=generator).tolist()
        count = 2 if pairs < SECOND_SHARE else 1
        drawn = [self._request(crop, count, generator) for _ in range(self.size(step))]
        stacked = [torch.stack(parts) for parts in zip(*(tensors for *_, tensors in drawn), strict=True)]
        picture, planes, target, whole, examples = stacked
        nothing = torch.zeros(len(drawn), dtype=torch.bool)
        return PairBatch(
            tuple(name for name, *_ in drawn),
            tuple(sentence for _, sentence, _ in drawn),
            whole, picture, planes, target, torch.zeros_like(whole), nothing, torch.ones(len(drawn)),
            examples=examples,
            photo_shown=torch.full((len(drawn),), shown < 0.5),
        )  # fmt: skip

    def _request(self, crop: int, pairs: int, generator: torch.Generator) -> tuple[str, str, tuple[Tensor, ...]]:
        side = self.side
        named, words, place = torch.rand(3, generator=generator).tolist()
        if named < NAMED_SHARE:
            edit = EDITS[SHOWN_NAMES[int(place * len(SHOWN_NAMES))]]
            sentence = sample_phrase(edit.name, generator) if words < 0.5 else ""

            def make(noise: Tensor) -> tuple[Tensor, Tensor]:
                source = random_crop(self.photographs, side, generator, edit.natural)
                pair = edit.make_pair(Scene(source, noise, generator))
                return pair.picture, pair.target

            name = edit.name
        else:
            program = draw_program(generator, self.families)
            name, sentence = EXAMPLE, ""

            def make(noise: Tensor) -> tuple[Tensor, Tensor]:
                source = random_crop(self.photographs, side, generator)
                return source, program(source, noise)

        examples = torch.stack([
            worn(torch.stack(make(torch.randn(1, side, side, generator=generator))), generator) for _ in range(pairs)
        ])  # fmt: skip
        noise = torch.randn(1, side, side, generator=generator)
        picture, target = make(noise)
        y, x = (torch.randint((side - crop) // CORNERS + 1, (2,), generator=generator) * CORNERS).tolist()
        window = (slice(None), slice(y, y + crop), slice(x, x + crop))
        planes = torch.cat([noise, place_planes(side, side)])
        return name, sentence, (picture[window], planes[window], target[window], picture, examples)


def worn(pair: Tensor, generator: torch.Generator) -> Tensor:
    """Some examples `[2, 3, s, s]` come out of JPEG files, some were enlarged."""
    compressed, enlarged, quality, factor = torch.rand(4, generator=generator).tolist()
    if enlarged < WORN_SHARE:
        small = F.interpolate(pair, scale_factor=0.5 + 0.4 * factor, mode="bilinear", antialias=True)
        pair = F.interpolate(small, pair.shape[-2:], mode="bilinear", align_corners=False)
    if compressed < WORN_SHARE:
        pair = torch.stack([jpeg(each, 60 + int(36 * quality)) for each in pair])
    return pair
