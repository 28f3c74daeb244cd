"""Rehearsal: requests of edits that a model knows, answered by the model as it was (Li and Hoiem 2016).

`PastSelf` needs sentences of known edits and any photographs, and no edited picture. `Rehearsed` mixes its requests
into the batches of a new task, and `known_retention` measures what the known edits lose.

Shapes: b requests, s side of the picture that the condition sees, k side of the crop that the base edits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.data.pairs import Pairs
from openwu.data.suite import EDITS
from openwu.data.suite.batches import PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.metrics import psnr
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import Batches, generator_of
from openwu.training.retention import Retention

ALLOWED = 0.5
"""dB that known edits may lose on average before a warning is given."""
WATCHED_AT_ONCE = 10
"""Known edits that are measured in one forward pass."""
PHOTOGRAPHS = 64
"""Most pictures of one's own on which known edits are rehearsed."""
SCALES = (1.0, 0.75, 0.5)
"""Sides at which such a picture is kept, as shares of its own."""
ADVICE = "raise the rehearsed share, lower the learning rates, or stop earlier"


class PastSelf:
    """A frozen copy of a model, whose edits are the targets of known requests."""

    def __init__(self, model: EmbeddedModel, requests: Batches, bf16: bool = True) -> None:
        """`model`: a copy that no training touches."""
        self._model, self._requests, self._bf16 = model.requires_grad_(False), requests, bf16
        _, self._adapt = generator_of(model)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the copy's condition encoder and generator."""
        parts = self._model.condition, self._model.generator
        return sum(parameter.nbytes for part in parts for parameter in part.parameters())

    @torch.no_grad()
    def batch(self, step: int) -> PairBatch:
        """Return the requests of a step with the copy's edits as their targets."""
        batch, model = self._requests.batch(step), self._model
        text = model.instruction(batch.sentences)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            edited = model.edit(batch.picture, batch.planes, text, self._adapt(batch, text), raw=True)
        return replace(batch, target=edited.float())

    def size(self, step: int) -> int:
        """Return the number of requests of a step."""
        return self._requests.size(step)


@dataclass(frozen=True)
class Rehearsed:
    """Batches of new requests, each with requests of known edits behind them."""

    new: Batches
    known: Batches

    def batch(self, step: int) -> PairBatch:
        """Return both batches of a step as one."""
        return joined(self.new.batch(step), self.known.batch(step))

    def size(self, step: int) -> int:
        """Return the number of requests of a step."""
        return self.new.size(step) + self.known.size(step)


def joined(first: PairBatch, second: PairBatch) -> PairBatch:
    """Append the requests of a batch to those of another with equal sides."""
    parts: dict[str, Any] = {}
    for each in fields(PairBatch):
        one, other = getattr(first, each.name), getattr(second, each.name)
        if one is None:  # what edits by example have
            assert other is None
            parts[each.name] = None
        else:
            parts[each.name] = torch.cat([one, other]) if isinstance(one, Tensor) else one + other
    return replace(first, **parts)


def known_edits(model: EmbeddedModel) -> tuple[str, ...]:
    """Return the edits of the suite that a model has a label for."""
    return tuple(label for label in model.config.instruction.labels if label in EDITS)


def photographs_of(pictures: Sequence[Tensor], side: int) -> list[Photograph]:
    """Make training photographs of pictures `[3, h, w]` uint8, enlarged where they are smaller than `side`."""
    found = []
    for number, picture in enumerate(pictures):
        shortest = min(picture.shape[1:])
        scales = [scale for scale in SCALES if shortest * scale >= side] or [side / shortest]
        kept = [_scaled(picture, scale, side) for scale in scales]
        found.append(Photograph(f"picture {number}", tuple(kept)))
    return found


def spread_over(pairs: Pairs, count: int = PHOTOGRAPHS) -> Pairs:
    """Choose at most `count` pairs, evenly spread."""
    chosen = range(0, len(pairs), -(-len(pairs) // count))
    return Pairs(tuple(pairs.pairs[number] for number in chosen))


def known_retention(
    model: EmbeddedModel, photographs: list[Photograph], side: int, crop: int, seed: int, bf16: bool
) -> Retention:
    """Measure a model's known edits in dB of PSNR against their true answers, one request each; see `Retention`."""
    return Retention(known_measure(model, photographs, side, crop, seed, bf16), ALLOWED, "dB", ADVICE)


def known_measure(
    model: EmbeddedModel, photographs: list[Photograph], side: int, crop: int, seed: int, bf16: bool
) -> Callable[[], dict[str, float]]:
    """Return the function that measures a model's known edits as it is then, on the same requests every time."""
    tasks = known_edits(model)
    requests = PairSampler(photographs, tasks, ((min(WATCHED_AT_ONCE, len(tasks)), crop),), side, seed)
    _, adapt = generator_of(model)

    def measure() -> dict[str, float]:
        scores: dict[str, list[float]] = {}
        for step in range(-(-len(tasks) // WATCHED_AT_ONCE)):
            batch = requests.batch(step)
            text = model.instruction(batch.sentences)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                edited = model.edit(batch.picture, batch.planes, text, adapt(batch, text), raw=True)
            for name, value in zip(batch.names, psnr(edited, batch.target).tolist(), strict=True):
                scores.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in scores.items()}

    return measure


def _scaled(picture: Tensor, scale: float, side: int) -> Tensor:
    """Resize `[3, h, w]` uint8 to `[h, w, 3]` uint8, no side below `side`."""
    size = [max(side, round(length * scale)) for length in picture.shape[1:]]
    if size == list(picture.shape[1:]):
        return picture.permute(1, 2, 0).contiguous()
    resized = F.interpolate(picture[None].float(), size, mode="bilinear", antialias=True, align_corners=False)[0]
    return resized.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
