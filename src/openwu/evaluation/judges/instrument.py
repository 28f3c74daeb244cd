"""A judge without a model: the four dimensions measured against the known target, each from 1 to 5.

Only for cases whose target is known. It is exact where a target is the one right answer (tone, colour, blur) and too
strict where many are (styles with random strokes); it has no taste, and cannot be talked round.

Shapes: h, w sides of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from openwu.errors import OpenwuError
from openwu.evaluation.cases import image_tensor
from openwu.evaluation.judges import EDITED, SOURCE, TARGET, Answer, Judge, Question, Respondent, Rubric
from openwu.evaluation.judges.rubrics import DIMENSIONS
from openwu.evaluation.stages.record import FAILED, SCORED, StoredCase

VERSION = "1"
VISIBLE = 3 / 255
"""Change of a pixel from which on it counts as edited."""
WEIGHTS = (0.299, 0.587, 0.114)


class Measures(Rubric):
    """The four dimensions as measured values from 1 to 5, with fractions; `overall` is their mean."""

    name = "instrument"
    metrics: Mapping[str, tuple[float, float]] = {**dict.fromkeys(DIMENSIONS, (1.0, 5.0)), "overall": (1, 5)}
    headline = "overall"

    def questions(self, _case: StoredCase, /) -> Sequence[Question]:
        return (Question("instrument", VERSION, "", (SOURCE, EDITED, TARGET), dict.fromkeys(DIMENSIONS, (1, 5))),)

    def combine(self, answers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        (scores,) = answers.values()
        return {**scores, "overall": sum(scores.values()) / len(scores)}


class Instrument(Respondent):
    """Measures alignment, consistency, structure and quality."""

    name = "measures"

    def identity(self) -> dict[str, object]:
        return {"measures": VERSION}

    def answer(self, _question: Question, case: StoredCase, pictures: Mapping[str, Image.Image], /) -> Answer:
        if TARGET not in pictures:
            return Answer(FAILED, note=f"case {case.key!r} has no known target to measure against")
        source, edited, target = (image_tensor(pictures[name]) for name in (SOURCE, EDITED, TARGET))
        if not source.shape == edited.shape == target.shape:
            return Answer(
                FAILED, note=f"sizes differ: {list(source.shape)}, {list(edited.shape)}, {list(target.shape)}"
            )
        return Answer(SCORED, {name: _five(share) for name, share in measure(source, edited, target).items()})


def instrument_judge() -> Judge:
    """Return the judge that measures."""
    return Judge(Measures(), Instrument())


def measure(source: Tensor, edited: Tensor, target: Tensor) -> dict[str, float]:
    """Return the four dimensions as shares from 0 (worst) to 1 of pictures `[3, h, w]` in 0..1.

    Raises OpenwuError for pictures of different shapes.
    """
    if not source.shape == edited.shape == target.shape:
        raise OpenwuError(f"instrument: expected equal shapes, got {source.shape}, {edited.shape}, {target.shape}")
    return {
        "alignment": _alignment(source, edited, target),
        "consistency": _consistency(source, edited, target),
        "structure": _structure(edited, target),
        "quality": _quality(edited, target),
    }


def _five(share: float) -> float:
    return round(1 + 4 * min(1.0, max(0.0, share)), 4)


def _alignment(source: Tensor, edited: Tensor, target: Tensor) -> float:
    """Progress along the line from input to target, less overshoot and the way that leads elsewhere."""
    wanted, made = (target - source).flatten(), (edited - source).flatten()
    size = float(wanted.square().mean())
    if size < (VISIBLE / 4) ** 2:  # nothing was to be done
        return 1.0 - min(1.0, float(made.abs().mean()) / 0.05)
    progress = float(made @ wanted / wanted.square().sum())
    aside = math.sqrt(float((made - progress * wanted).square().mean()) / size)
    return (1 - abs(1 - progress)) / (1 + aside)


def _consistency(source: Tensor, edited: Tensor, target: Tensor) -> float:
    """Change where the target changes nothing; where it changes everything, drift of the whole beyond the target's."""
    kept = (target - source).abs().amax(0) < VISIBLE
    if float(kept.float().mean()) < 0.02:
        coarse = [avg_pool2d(each, max(1, min(each.shape[-2:]) // 8)) for each in (edited, target)]
        return 1 - min(1.0, float((coarse[0] - coarse[1]).abs().mean()) / 0.15)
    return 1 - min(1.0, float((edited - source).abs().amax(0)[kept].mean()) / 0.10)


def _structure(edited: Tensor, target: Tensor) -> float:
    """Correlation of the edges of edit and target, after a small blur."""
    edges = [_edges(avg_pool2d(_grey(each), 3, 1, 1)) for each in (edited, target)]
    first, second = (each - each.mean() for each in edges)
    scale = float(first.norm() * second.norm())
    if scale < 1e-6:
        return 1.0 if float((edges[0] - edges[1]).abs().mean()) < 1e-3 else 0.0
    return max(0.0, float((first * second).sum()) / scale)


def _quality(edited: Tensor, target: Tensor) -> float:
    """Blocks, bands and noise, each beyond what the target itself has."""
    blocks = max(0.0, _blockiness(edited) - _blockiness(target)) / 0.02
    noise = abs(_noise(edited) - _noise(target)) / 0.04
    bands = max(0.0, _levels(target) - _levels(edited)) / 0.6
    return 1 - min(1.0, max(blocks, noise, bands))


def _grey(x: Tensor) -> Tensor:
    return (torch.tensor(WEIGHTS).view(3, 1, 1) * x).sum(0, keepdim=True)


def _edges(x: Tensor) -> Tensor:
    return (x[..., 1:, :-1] - x[..., :-1, :-1]).abs() + (x[..., :-1, 1:] - x[..., :-1, :-1]).abs()


def _blockiness(x: Tensor) -> float:
    """Steps across the borders of 8 x 8 blocks beyond those inside them, whatever the grid's offset."""
    grey = _grey(x)
    excess = 0.0
    across, down = grey[..., 1:] - grey[..., :-1], grey[..., 1:, :] - grey[..., :-1, :]
    for steps in (across.abs().mean((0, 1)), down.abs().mean((0, 2))):
        if steps.numel() < 16:
            continue
        whole = steps[: steps.numel() // 8 * 8].view(-1, 8).mean(0)
        excess = max(excess, float(whole.max() - whole.median()))
    return excess


def _noise(x: Tensor) -> float:
    """Robust standard deviation of the second differences, which smooth slopes do not have."""
    grey = _grey(x)
    rows = 2 * grey[..., 1:-1, 1:-1] - grey[..., :-2, 1:-1] - grey[..., 2:, 1:-1]
    columns = 2 * grey[..., 1:-1, 1:-1] - grey[..., 1:-1, :-2] - grey[..., 1:-1, 2:]
    second = rows + columns
    return float(second.abs().median()) / (0.6745 * math.sqrt(20))


def _levels(x: Tensor) -> float:
    """Share of the 8-bit levels between a channel's extremes that occur: banding leaves most of them out."""
    shares: list[float] = []
    for channel in x:
        values = (channel * 255).round().long().flatten()
        span = int(values.max() - values.min()) + 1
        shares.append(values.unique().numel() / min(span, values.numel()))
    return min(shares)
