"""Train the embedded model on pairs of one's own: the stage, and the sampler of its batches.

Of every pair a random square is shown to the condition encoder as the whole picture, and the base edits a crop of it,
as in the training from photographs. The draws of a request depend on the seed and its number alone.

Shapes: b requests, s side of the square, k side of the crop that the base edits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.backbones.embedded.network import place_planes
from openwu.data.pairs import SHOWN, File, Pair, Pairs, load_picture
from openwu.data.suite import EDITS
from openwu.data.suite.batches import CORNERS, PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph, load_folder
from openwu.data.suite.phrases import vary
from openwu.errors import DatasetError, OpenwuError
from openwu.training.embedded.config import PairsRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.own_words import OwnCentres, new_labels, teach, with_labels
from openwu.training.embedded.picture_stages import Batches, PictureStage, generator_of
from openwu.training.embedded.rehearsal import (
    ADVICE,
    PastSelf,
    Rehearsed,
    known_edits,
    known_measure,
    photographs_of,
    spread_over,
)
from openwu.training.micro_batch import FULL_BATCH, MicroBatch
from openwu.training.retention import Retention

UNNAMED = "pairs"
"""Name of the task of pairs that name none, in curves."""
VALIDATED = 32
"""Requests of a validation batch, at most."""
KEPT_PAIRS = 512
"""Pairs that stay decoded in memory."""
KEPT_SIDE = 512
"""Shorter side in pixels at which larger pictures are kept."""


class PairsStage(PictureStage):
    """Train condition encoder and generator on pairs; where none is held back, the first training pairs validate.

    A share of every batch asks for known edits, answered by the start as it was; see `rehearsal.PastSelf`.
    """

    def __init__(
        self,
        recipe: PairsRecipe,
        model: EmbeddedModel,
        training: Pairs,
        held_back: Pairs,
        own_labels: Sequence[str] = (),
    ) -> None:
        """`model`: the start; it is trained in place, and copied for its answers where known edits are rehearsed.

        `own_labels`: labels of the pairs' tasks whose mean tokens are trained too, see `own_words`.
        """
        crowded = [pair.where for pair in (*training.pairs, *held_back.pairs) if len(pair.images) > 2]
        if crowded:
            raise DatasetError(
                "images: expected a picture and at most one reference, which is what the embedded model reads; "
                f"got more at {', '.join(crowded[:SHOWN])}"
            )
        judged = held_back if len(held_back) else training
        count = min(VALIDATED, len(judged))
        known, shapes = recipe.rehearsed_requests, recipe.generator.shapes
        own = tuple((requests - known, crop) for requests, crop in shapes)
        self.pairs = OwnPairSampler(training, own, recipe.side, recipe.seed, varied=True)
        batches: Batches = self.pairs
        if known:
            rehearsed = tuple((known, crop) for _, crop in shapes)
            photographs = rehearsal_photographs(recipe, training)
            requests = PairSampler(
                photographs, known_edits(model), rehearsed, recipe.side, recipe.seed + 5, dialled=True
            )
            batches = Rehearsed(self.pairs, PastSelf(model.copy(), requests, recipe.bf16))
        validation = OwnPairSampler(judged, ((count, recipe.side),), recipe.side, recipe.seed + 9)
        parts, adapt = generator_of(model)
        assert isinstance(parts, nn.ModuleDict)
        centres = OwnCentres(model.instruction, own_labels) if own_labels else None
        if centres is not None:
            parts["centres"] = centres
        super().__init__(
            *("generator", recipe.generator, model, parts, adapt, batches, validation),
            seed=recipe.seed,
            bf16=recipe.bf16,
            dropped=recipe.dropped,
        )
        self.centres = centres
        if recipe.trained == "words":
            if centres is None:
                raise OpenwuError(
                    f"trained: words needs pairs of a task that is no edit of the suite, got {list(training.tasks)}; "
                    "give the task another name, or set trained=all"
                )
            parts.requires_grad_(False)
            centres.requires_grad_(True)

    def read(self, batch: PairBatch, dropped: tuple[float, torch.Generator] | None = None) -> Tensor:
        """Encode the instructions `[b, K, width]`, with gradients to the mean tokens of labels of one's own."""
        return super().read(batch, dropped) if self.centres is None else self.centres.read(batch.sentences, dropped)

    def not_finite(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> list[str]:
        """Name the pairs whose loss is not finite by their place in the user's data, known edits by their names."""
        batch, losses = self.losses(step, micro_batch)
        size = self.pairs.size(step)
        chosen = self.pairs.pairs.step(step, size, self.pairs.seed)
        places = [pair.where for pair, _ in chosen] + [*self.batches.batch(step).names[size:]]
        own = places[micro_batch.rows(len(places))]
        finite = losses.isfinite().tolist()
        return [f"{w} ({s!r})" for w, s, fine in zip(own, batch.sentences, finite, strict=True) if not fine]


class PairsTraining:
    """A training on pairs from its start to its end: labels of one's own, the stage, the watch, the drawing back."""

    def __init__(self, recipe: PairsRecipe, start: EmbeddedModel, training: Pairs, held_back: Pairs) -> None:
        """Measure the start's known edits, and teach labels of the tasks that it has none for; `start` may change."""
        watched = held_back if len(held_back) else training
        wordings = wordings_of(training)
        new = new_labels(start, wordings) if recipe.own_labels else ()
        # A start that was trained on pairs has their labels already.
        own = tuple(name for name in wordings if name in new or name not in EDITS) if recipe.own_labels else ()
        self.known = pairs_retention(recipe, start, watched)
        self.model = with_labels(start, new) if new else start
        """The model that is trained: the start itself, or a copy with further labels."""
        if new:
            teach(self.model, {name: wordings[name] for name in new}, recipe.seed)
            self.known.follow(pairs_measure(recipe, self.model, watched))
        self.stage = PairsStage(recipe, self.model, training, held_back, own)
        self._weights = {
            name: each for name, each in generator_of(self.model)[0].named_parameters() if each.requires_grad
        }
        self._begun = {name: each.detach().clone() for name, each in self._weights.items()}

    def finish(self) -> float:
        """Write trained mean tokens into the model, draw its weights back if needed; return the share that stays."""
        if self.stage.centres is not None:
            self.stage.centres.store()
        return self.known.draw_back(self._weights, self._begun)


def rehearsal_photographs(recipe: PairsRecipe, pairs: Pairs) -> list[Photograph]:
    """Return the photographs on which known edits are rehearsed: the recipe's folder, or the pairs' own pictures."""
    if recipe.photographs is not None:
        return load_folder(Path(recipe.photographs))
    return photographs_of([_decoded(pair.images[0]) for pair in spread_over(pairs).pairs], recipe.side)


def pairs_retention(recipe: PairsRecipe, model: EmbeddedModel, pairs: Pairs) -> Retention:
    """Measure what a training on pairs loses of the start's known edits, on the pictures of these pairs."""
    return Retention(pairs_measure(recipe, model, pairs), recipe.allowed, "dB", ADVICE, recipe.allowed_each)


def pairs_measure(recipe: PairsRecipe, model: EmbeddedModel, pairs: Pairs) -> Callable[[], dict[str, float]]:
    """Return the function that measures a model's known edits on the pictures of these pairs."""
    pictures = photographs_of([_decoded(pair.images[0]) for pair in spread_over(pairs).pairs], recipe.side)
    crop = max(crop for _, crop in recipe.generator.shapes)
    return known_measure(model, pictures, recipe.side, crop, recipe.seed + 13, recipe.bf16)


def wordings_of(pairs: Pairs) -> dict[str, tuple[str, ...]]:
    """Return every task's wordings, in the order in which they first come."""
    found: dict[str, dict[str, None]] = {}
    for pair in pairs.pairs:
        found.setdefault(pair.task or UNNAMED, {}).update(dict.fromkeys(pair.instructions))
    return {name: tuple(wordings) for name, wordings in found.items()}


@dataclass(frozen=True)
class OwnPairSampler:
    """Draws the batch of any step from pairs, without state."""

    pairs: Pairs
    shapes: tuple[tuple[int, int], ...]
    """Steps walk through these (requests b, crop side k) in turn; b is the same in all."""
    side: int
    seed: int
    varied: bool = False
    """Whether wordings are varied: politeness, other words for the picture, capitals, typing errors."""

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
        return PairBatch(names, self._sentences([sentence for _, sentence in chosen], step), *stacked)

    def _sentences(self, wordings: Sequence[str], step: int) -> tuple[str, ...]:
        """Return the wordings of a step, varied where that is asked for."""
        if not self.varied:
            return tuple(wordings)
        draws = torch.Generator().manual_seed(self.seed * 13_000_027 + step)
        return tuple(vary(words, "en" if words.isascii() else "zh", draws) for words in wordings)


def _request(pair: Pair, side: int, crop: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the tensors of one row of a `PairBatch`, in its order."""
    picture, target = _decoded(pair.images[0]), _decoded(pair.target)
    height, width = picture.shape[1:]
    shortest = min(height, width)
    cut = _between(min(side, shortest), shortest, generator)
    top, left = _between(0, height - cut, generator), _between(0, width - cut, generator)
    whole, edited = (_resized(each[:, top : top + cut, left : left + cut], side) for each in (picture, target))
    planes = torch.cat([torch.randn(1, side, side, generator=generator), place_planes(side, side)])
    # Corners lie where an attention window of the base may begin.
    y, x = (CORNERS * _between(0, (side - crop) // CORNERS, generator) for _ in range(2))
    window = (slice(None), slice(y, y + crop), slice(x, x + crop))
    referenced = len(pair.images) > 1
    reference = _middle(_decoded(pair.images[1]), side) if referenced else torch.zeros_like(whole)
    return (
        whole, whole[window], planes[window], edited[window], reference, torch.tensor(referenced), torch.tensor(1.0)
    )  # fmt: skip


def _middle(picture: Tensor, side: int) -> Tensor:
    """Crop the largest square about the middle and resize it: `[3, side, side]`."""
    height, width = picture.shape[1:]
    cut = min(height, width)
    top, left = (height - cut) // 2, (width - cut) // 2
    return _resized(picture[:, top : top + cut, left : left + cut], side)


def _resized(square: Tensor, side: int) -> Tensor:
    """Resize a square: uint8 `[3, c, c]` -> `[3, side, side]` in 0..1."""
    unit = square.float() / 255
    if square.shape[-1] == side:
        return unit
    return F.interpolate(unit[None], (side, side), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def _decoded(file: File) -> Tensor:
    """Decode a picture `[3, h, w]` uint8, its shorter side at most KEPT_SIDE; files are kept decoded."""
    return _decoded_file(file) if isinstance(file, Path) else _load_bytes(file)


@lru_cache(maxsize=2 * KEPT_PAIRS)
def _decoded_file(file: Path) -> Tensor:
    """Decode a file; kept, since decoding outlasts a step."""
    return _load_bytes(file)


def _load_bytes(file: File) -> Tensor:
    picture = load_picture(file)
    shortest = min(picture.shape[1:])
    if shortest > KEPT_SIDE:
        size = [max(1, round(length * KEPT_SIDE / shortest)) for length in picture.shape[1:]]
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def _between(lowest: int, highest: int, generator: torch.Generator) -> int:
    """Draw a whole number from `lowest` to `highest`, both included."""
    return lowest + int(torch.randint(highest - lowest + 1, (), generator=generator))
