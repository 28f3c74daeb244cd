"""Batches of training pairs, drawn without state: the batch of a step depends on the seed and the step alone.

That is what makes a training resumable to the same weights: no iterator has to be rewound. Tasks are balanced: every
batch walks through a shuffled list of sub-tasks.

Shapes: b requests, s side of the picture that the condition sees, k side of the crop that the base edits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwu.backbones.embedded.network import place_planes
from openwu.data.suite import EDITS, Edit, Scene
from openwu.data.suite.cameras import REPAIRS
from openwu.data.suite.operators import gaussian
from openwu.data.suite.photographs import Photograph, random_crop
from openwu.data.suite.phrases import DEGREES, sample_phrase

CORNERS = 64
"""Crops begin at multiples of so many pixels."""
DIALLED_SHARE = 0.25
"""Share of the requests whose strength is set by the adapter's scale, where adapters learn to be scaled."""
NEEDLESS_SHARE = 0.05
"""Share of those batches' requests with a second picture that they do not need."""
SMOOTHED_FAMILIES = ("light", "colour", "age", "weather")
"""Families whose photographs may be smoothed: an edit of detail would learn from them to do nothing."""


@dataclass(frozen=True)
class PairBatch:
    """b requests with their answers."""

    names: tuple[str, ...]
    """Sub-task of each request."""
    sentences: tuple[str, ...]
    """Instruction of each request."""
    whole: Tensor
    """The condition encoder's input: whole pictures `[b, 3, s, s]`."""
    picture: Tensor
    """The base's input: a crop of each `[b, 3, k, k]`."""
    planes: Tensor
    """The base's noise, y and x for the crop `[b, 3, k, k]`."""
    target: Tensor
    """The edited crop `[b, 3, k, k]`."""
    reference: Tensor
    """The request's second picture `[b, 3, s, s]`, zeros where it has none; the condition encoder alone sees it."""
    present: Tensor
    """Which requests have a second picture `[b]` bool."""
    dial: Tensor
    """Scale of the adapter `[b]`: the target is an edit of that strength."""


@dataclass(frozen=True)
class PairSampler:
    """Draws the batch of any step from photographs, without state."""

    photographs: list[Photograph]
    tasks: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    """Steps walk through these (requests b, crop side k) in turn: small crops for variety, large ones for context."""
    side: int = 192
    """Side s of the picture that the condition sees."""
    seed: int = 0
    dialled: bool = False
    """Whether some requests ask for another strength by the adapter's scale, as a user does with `strength`."""
    smooth: float = 0.0
    """Share of the photographs that are smoothed, in `SMOOTHED_FAMILIES`: skies and walls, in which a pattern shows."""
    cameras: float = 0.0
    """Share of the repairs whose damage is that of cameras and files, see `cameras.py`."""

    def batch(self, step: int) -> PairBatch:
        """Draw the batch of a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        names = self._balanced(step)
        crop = self.shapes[step % len(self.shapes)][1]
        drawn = [self._pair(name, crop, generator) for name in names]
        stacked = [torch.stack(parts) for parts in zip(*(tensors for _, tensors in drawn), strict=True)]
        return PairBatch(names, tuple(sentence for sentence, _ in drawn), *stacked)

    def size(self, step: int) -> int:
        """Return the number of requests of a step."""
        return self.shapes[step % len(self.shapes)][0]

    def _balanced(self, step: int) -> tuple[str, ...]:
        """Return a step's sub-tasks, from an endless list of shuffled rounds through all of them."""
        sizes = [requests for requests, _ in self.shapes]
        rounds, place = divmod(step, len(sizes))
        first = rounds * sum(sizes) + sum(sizes[:place])
        names = []
        for position in range(first, first + sizes[place]):
            turn, place = divmod(position, len(self.tasks))
            order = torch.Generator().manual_seed(self.seed * 7_000_003 + turn)
            names.append(self.tasks[int(torch.randperm(len(self.tasks), generator=order)[place])])
        return tuple(names)

    def _pair(self, name: str, crop: int, generator: torch.Generator) -> tuple[str, tuple[Tensor, ...]]:
        edit, side = EDITS[name], self.side
        degree, dial = self._strength(edit, generator)
        source = random_crop(self.photographs, side, generator, edit.natural)
        if self.smooth and edit.family in SMOOTHED_FAMILIES:
            source = _smoothed(source, self.smooth, generator)
        # Some users pass a second picture that their instruction says nothing of.
        needless = self.dialled and float(torch.rand((), generator=generator)) < NEEDLESS_SHARE
        second = random_crop(self.photographs, side, generator) if edit.needs_reference or needless else None
        noise = torch.randn(1, side, side, generator=generator)
        strength = min(DEGREES[degree], edit.limit) * dial
        if self.cameras and name in REPAIRS and float(torch.rand((), generator=generator)) < self.cameras:
            edit = REPAIRS[name]
        pair = edit.make_pair(Scene(source, noise, generator, strength, second))
        # Corners lie where an attention window of the base may begin, and the pattern of a mosaic with it.
        top, left = (torch.randint((side - crop) // CORNERS + 1, (2,), generator=generator) * CORNERS).tolist()
        window = (slice(None), slice(top, top + crop), slice(left, left + crop))
        planes = torch.cat([noise, place_planes(side, side)])
        reference = second if pair.reference is None else pair.reference
        tensors = (
            pair.picture,
            pair.picture[window],
            planes[window],
            pair.target[window],
            torch.zeros_like(source) if reference is None else reference,
            torch.tensor(reference is not None),
            torch.tensor(dial),
        )
        return sample_phrase(name, generator, degree=degree), tensors

    def _strength(self, edit: Edit, generator: torch.Generator) -> tuple[str, float]:
        """Draw the degree of the instruction and the scale of the adapter."""
        draw = torch.rand(3, generator=generator).tolist()
        if not edit.graded:
            return "normal", 1.0
        degree = "little" if draw[0] < 0.12 else "strong" if draw[0] < 0.24 else "normal"
        if not self.dialled or draw[1] > DIALLED_SHARE:
            return degree, 1.0
        highest = edit.limit / min(DEGREES[degree], edit.limit)
        return degree, min(highest, 0.25 + 1.25 * draw[2])


def _smoothed(source: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Smooth a share of photographs `[3, h, w]`, and add the little noise that smooth areas of photographs have."""
    chosen, width, noise = torch.rand(3, generator=generator).tolist()
    if chosen >= share:
        return source
    grain = torch.randn(source.shape, generator=generator)
    smooth: Tensor = gaussian(source, 4 + 16 * width) + 1.5 * noise / 255 * grain
    return smooth.clamp(0, 1)
