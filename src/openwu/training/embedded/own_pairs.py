"""Training the embedded model on pairs of one's own: pairs enter, a stage for `loop.train_stage` leaves.

Of every pair a random square is shown to the condition encoder as the whole picture, and the base edits a crop of it,
as in the training from photographs. What is drawn for a request depends on the seed and its number alone.

Shapes: b requests, s side of the square, k side of the crop that the base edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.backbones.embedded.network import place_planes
from openwu.data.pairs import SHOWN, File, Pair, Pairs, content, load_picture
from openwu.data.suite.batches import CORNERS, PairBatch
from openwu.errors import DatasetError
from openwu.files.hashing import of_json
from openwu.training.config import PairsRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.stages import PictureStage, generated_by
from openwu.training.micro_batch import WHOLE, MicroBatch

UNNAMED = "pairs"
"""What curves call the task of pairs that name none."""
VALIDATED = 32
"""Requests of a validation batch, at most."""
KEPT_PAIRS = 512
"""Pairs that stay decoded in memory."""
KEPT_SIDE = 512
"""Shorter side in pixels at which larger pictures are kept."""


def split_pairs(pairs: Pairs, share: float) -> tuple[Pairs, Pairs]:
    """(training, held back): of every task the last `share`, at least one where a task has two and share is above 0."""
    training, held_back = [], []
    for task in pairs.tasks:
        own = [pair for pair in pairs.pairs if pair.task == task]
        count = min(len(own) - 1, max(1, round(share * len(own)))) if share else 0
        training += own[: len(own) - count]
        held_back += own[len(own) - count :]
    return Pairs(tuple(training)), Pairs(tuple(held_back))


def pairs_hashes(*parts: Pairs) -> dict[str, str]:
    """Where a pair stands -> SHA-256 of what it says and of its pictures' bytes."""
    return {pair.where: _hash(pair) for pairs in parts for pair in pairs.pairs}


def _hash(pair: Pair) -> str:
    said = of_json([pair.task, *pair.instructions])
    for file in (*pair.images, pair.target):
        said.update(content(file))
    return said.hexdigest()


class PairsStage(PictureStage):
    """Condition encoder and generator on pairs; where none is held back, the first training pairs are validated on."""

    def __init__(self, recipe: PairsRecipe, model: EmbeddedModel, training: Pairs, held_back: Pairs) -> None:
        crowded = [pair.where for pair in (*training.pairs, *held_back.pairs) if len(pair.images) > 2]
        if crowded:
            raise DatasetError(
                "images: expected a picture and at most one reference, which is what the embedded model reads; "
                f"got more at {', '.join(crowded[:SHOWN])}"
            )
        judged = held_back if len(held_back) else training
        count = min(VALIDATED, len(judged))
        self.pairs = OwnPairSampler(training, recipe.generator.shapes, recipe.side, recipe.seed)
        validation = OwnPairSampler(judged, ((count, recipe.side),), recipe.side, recipe.seed + 9)
        super().__init__("generator", recipe, model, *generated_by(model), (self.pairs, validation))

    def not_finite(self, step: int, part: MicroBatch = WHOLE) -> list[str]:
        """Named by where they stand in the user's data."""
        _, losses = self.losses(step, part)
        size = self.pairs.size(step)
        chosen = self.pairs.pairs.step(step, size, self.pairs.seed)[part.rows(size)]
        finite = losses.isfinite().tolist()
        return [f"{pair.where} ({s!r})" for (pair, s), fine in zip(chosen, finite, strict=True) if not fine]


@dataclass(frozen=True)
class OwnPairSampler:
    """Draws the batch of any step."""

    pairs: Pairs
    shapes: tuple[tuple[int, int], ...]
    """Steps walk through these (requests b, crop side k) in turn; b is the same in all."""
    side: int
    seed: int

    def size(self, _step: int) -> int:
        """Requests of a step's batch."""
        return self.shapes[0][0]

    def batch(self, step: int) -> PairBatch:
        crop = self.shapes[step % len(self.shapes)][1]
        count = self.size(step)
        chosen = self.pairs.step(step, count, self.seed)
        rows = []
        for position, (pair, _) in enumerate(chosen, start=step * count):
            generator = torch.Generator().manual_seed(self.seed * 11_000_027 + position)
            rows.append(_request(pair, self.side, crop, generator))
        stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        names = tuple(pair.task or UNNAMED for pair, _ in chosen)
        return PairBatch(names, tuple(sentence for _, sentence in chosen), *stacked)


def _request(pair: Pair, side: int, crop: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The tensors of one row of a `PairBatch`, in its order."""
    picture, target = _kept(pair.images[0]), _kept(pair.target)
    height, width = picture.shape[1:]
    shortest = min(height, width)
    cut = _between(min(side, shortest), shortest, generator)
    top, left = _between(0, height - cut, generator), _between(0, width - cut, generator)
    whole, wanted = (_resized(each[:, top : top + cut, left : left + cut], side) for each in (picture, target))
    planes = torch.cat([torch.randn(1, side, side, generator=generator), place_planes(side, side)])
    # Corners lie where an attention window of the base may begin.
    y, x = (CORNERS * _between(0, (side - crop) // CORNERS, generator) for _ in range(2))
    window = (slice(None), slice(y, y + crop), slice(x, x + crop))
    referenced = len(pair.images) > 1
    reference = _middle(_kept(pair.images[1]), side) if referenced else torch.zeros_like(whole)
    return (
        whole, whole[window], planes[window], wanted[window], reference, torch.tensor(referenced), torch.tensor(1.0)
    )  # fmt: skip


def _middle(picture: Tensor, side: int) -> Tensor:
    """The largest square about the middle, `[3, side, side]`."""
    height, width = picture.shape[1:]
    cut = min(height, width)
    top, left = (height - cut) // 2, (width - cut) // 2
    return _resized(picture[:, top : top + cut, left : left + cut], side)


def _resized(square: Tensor, side: int) -> Tensor:
    """uint8 `[3, c, c]` -> `[3, side, side]` in 0..1"""
    unit = square.float() / 255
    if square.shape[-1] == side:
        return unit
    return F.interpolate(unit[None], (side, side), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


@lru_cache(maxsize=2 * KEPT_PAIRS)
def _kept(file: File) -> Tensor:
    """A picture `[3, h, w]` uint8, its shorter side at most KEPT_SIDE: decoding a photo takes longer than a step."""
    picture = load_picture(file)
    shortest = min(picture.shape[1:])
    if shortest > KEPT_SIDE:
        size = [max(1, round(length * KEPT_SIDE / shortest)) for length in picture.shape[1:]]
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def _between(lowest: int, highest: int, generator: torch.Generator) -> int:
    """A whole number from `lowest` to `highest`, both included."""
    return lowest + int(torch.randint(highest - lowest + 1, (), generator=generator))
