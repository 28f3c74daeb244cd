"""Batches of edits that are shown by example: pairs before and after, and photographs that are to be edited alike.

Most batches are series: one program, several photographs, an adapter for all of them. The photographs are small and
whole, and neighbours in the batch share them, so that the base reads each only once. Every fourth batch is of single
requests as users make them: crops of larger photographs, sub-tasks of the suite, words, and the photograph shown too.

Shapes: b requests, p pairs of each, c photographs of each, s side of whole pictures, k side of what the base edits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.backbones.embedded.network import place_planes
from openwu.data.programs import COLOUR_FAMILIES, TRAINED_FAMILIES, Program, draw_program
from openwu.data.suite import EDITS, Scene
from openwu.data.suite.batches import CORNERS
from openwu.data.suite.operators import jpeg
from openwu.data.suite.photographs import Photograph, random_crop
from openwu.data.suite.phrases import sample_phrase

EXAMPLE = "example"
"""Name of programs in curves, beside those of sub-tasks."""
SINGLE_EVERY = 4
"""Every so many batches, one of single requests, unless a sampler says otherwise."""
NAMED_SHARE = 0.25
"""Share of those requests whose example shows a sub-task of the suite; half of them say so in words, too."""
SECOND_SHARE = 0.2
"""Share of the batches with two pairs for every request."""
WORN_SHARE = 0.2
"""Share of the examples that went through a JPEG file, and again of those that were enlarged."""
SHOWN_NAMES = tuple(name for name, edit in EDITS.items() if not edit.needs_reference)

Make = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Noise `[1, s, s]` -> a photograph and the same after the edit."""


@dataclass(frozen=True)
class ExampleBatch:
    """b requests with their answers."""

    names: tuple[str, ...]
    """`EXAMPLE`, or the sub-task that is shown."""
    sentences: tuple[str, ...]
    """Instruction of each request; "" for most."""
    examples: Tensor
    """Pairs before and after `[b, p, 2, 3, s, s]`; the condition encoder alone sees them."""
    picture: Tensor
    """The base's input `[b, 3, k, k]`."""
    planes: Tensor
    """Noise, y and x for it `[b, 3, k, k]`."""
    target: Tensor
    """`[b, c, 3, k, k]`: entry [i, j] is the edit of request i on picture i + j (from the start again after b)."""
    whole: Tensor | None = None
    """What the condition encoder sees of the photographs `[b, 3, s, s]`; None: adapters serve any photograph."""


@dataclass(frozen=True)
class ExampleSampler:
    """Draws the batch of any step from photographs, without state."""

    photographs: list[Photograph]
    shapes: tuple[tuple[int, int], ...]
    """Steps walk through these (requests b, side k) in turn."""
    side: int = 192
    """Side s of examples."""
    seed: int = 0
    photographs_each: int = 2
    """c in a series."""
    families: tuple[str, ...] = TRAINED_FAMILIES
    plain: int = 0
    """So many batches at first show programs of one operation on colours alone. Of all programs from the start, a
    generator learned next to nothing for hundreds of steps."""
    colours: float = 0.0
    """Share of the programs that are drawn of colour families alone; the others of all families."""
    series: bool = True
    """False: all batches are of single requests that show programs."""
    single_every: int = SINGLE_EVERY
    """Every so many batches of series, one of single requests; 0: none."""
    fixed: tuple[Program, ...] = ()
    """Draw series from these programs, whose names in a batch are their numbers; none: new programs for every
    request."""

    def size(self, step: int) -> int:
        """Return the number of requests of a step."""
        return self.shapes[step % len(self.shapes)][0]

    def batch(self, step: int) -> ExampleBatch:
        """Draw the batch of a step."""
        generator = torch.Generator().manual_seed(self.seed * 9_000_011 + step)
        requests, crop = self.shapes[step % len(self.shapes)]
        pairs = 2 if float(torch.rand((), generator=generator)) < SECOND_SHARE else 1
        single = self.single_every and (step + 1) % self.single_every == 0
        if self.series and (step < self.plain or not single):
            return self._series(requests, crop, pairs, generator, step < self.plain)
        return self._singles(requests, crop, pairs, generator)

    def _series(self, requests: int, side: int, pairs: int, generator: torch.Generator, plain: bool) -> ExampleBatch:
        names, programs = self._programs(requests, generator, plain)
        examples = [self._shown(self._making(each, generator), pairs, generator) for each in programs]
        picture = torch.stack([random_crop(self.photographs, side, generator) for _ in programs])
        noise = torch.randn(requests, 1, side, side, generator=generator)
        target = [
            torch.stack([program(picture[at], noise[at]) for at in neighbours(row, self.photographs_each, requests)])
            for row, program in enumerate(programs)
        ]
        planes = torch.cat([noise, place_planes(side, side).expand(requests, -1, -1, -1)], dim=1)
        return ExampleBatch(names, ("",) * requests, torch.stack(examples), picture, planes, torch.stack(target))

    def _programs(self, count: int, generator: torch.Generator, plain: bool) -> tuple[tuple[str, ...], list[Program]]:
        """Programs of a series with their names."""
        if not self.fixed:
            return (EXAMPLE,) * count, [self._program(generator, plain) for _ in range(count)]
        drawn = torch.randint(len(self.fixed), (count,), generator=generator).tolist()
        return tuple(str(number) for number in drawn), [self.fixed[number] for number in drawn]

    def _singles(self, requests: int, crop: int, pairs: int, generator: torch.Generator) -> ExampleBatch:
        shown = float(torch.rand((), generator=generator)) < 0.5
        drawn = [self._single(crop, pairs, generator) for _ in range(requests)]
        names, sentences = tuple(name for name, *_ in drawn), tuple(sentence for _, sentence, _ in drawn)
        stacked = [torch.stack(parts) for parts in zip(*(tensors for *_, tensors in drawn), strict=True)]
        examples, picture, planes, target, whole = stacked
        return ExampleBatch(names, sentences, examples, picture, planes, target[:, None], whole if shown else None)

    def _single(self, crop: int, pairs: int, generator: torch.Generator) -> tuple[str, str, tuple[Tensor, ...]]:
        side = self.side
        named, words, place = torch.rand(3, generator=generator).tolist()
        name, sentence = EXAMPLE, ""
        make = self._making(self._program(generator), generator)
        if self.series and named < NAMED_SHARE:
            name = SHOWN_NAMES[int(place * len(SHOWN_NAMES))]
            sentence = sample_phrase(name, generator) if words < 0.5 else ""
            make = self._making_named(name, generator)
        examples = self._shown(make, pairs, generator)
        noise = torch.randn(1, side, side, generator=generator)
        picture, target = make(noise)
        y, x = (torch.randint((side - crop) // CORNERS + 1, (2,), generator=generator) * CORNERS).tolist()
        window = (slice(None), slice(y, y + crop), slice(x, x + crop))
        planes = torch.cat([noise, place_planes(side, side)])
        return name, sentence, (examples, picture[window], planes[window], target[window], picture)

    def _program(self, generator: torch.Generator, plain: bool = False) -> Program:
        colours = plain or (self.colours > 0 and float(torch.rand((), generator=generator)) < self.colours)
        families = [each for each in self.families if each in COLOUR_FAMILIES] if colours else self.families
        return draw_program(generator, families, longest=1 if plain else 3)

    def _shown(self, make: Make, pairs: int, generator: torch.Generator) -> Tensor:
        """Pairs before and after `[p, 2, 3, s, s]`."""
        noise = [torch.randn(1, self.side, self.side, generator=generator) for _ in range(pairs)]
        return torch.stack([worn(torch.stack(make(each)), generator) for each in noise])

    def _making(self, program: Program, generator: torch.Generator) -> Make:
        def make(noise: Tensor) -> tuple[Tensor, Tensor]:
            source = random_crop(self.photographs, self.side, generator)
            return source, program(source, noise)

        return make

    def _making_named(self, name: str, generator: torch.Generator) -> Make:
        def make(noise: Tensor) -> tuple[Tensor, Tensor]:
            source = random_crop(self.photographs, self.side, generator, EDITS[name].natural)
            pair = EDITS[name].make_pair(Scene(source, noise, generator))
            return pair.picture, pair.target

        return make


def neighbours(row: int, count: int, size: int) -> list[int]:
    """Which pictures of a batch a request's targets are of."""
    return [(row + step) % size for step in range(count)]


def worn(pair: Tensor, generator: torch.Generator) -> Tensor:
    """Some examples `[2, 3, s, s]` come out of JPEG files, some were enlarged."""
    compressed, enlarged, quality, factor = torch.rand(4, generator=generator).tolist()
    if enlarged < WORN_SHARE:
        small = F.interpolate(pair, scale_factor=0.5 + 0.4 * factor, mode="bilinear", antialias=True)
        pair = F.interpolate(small, pair.shape[-2:], mode="bilinear", align_corners=False)
    if compressed < WORN_SHARE:
        pair = torch.stack([jpeg(each, 60 + int(36 * quality)) for each in pair])
    return pair
