"""Own pairs: a look that no edit of the suite has is taught from pairs; what it costs the edits that were known.

A recipe as it is used (`training.embedded.own_pairs`), with its guards on and off, for as many steps on the same pairs:

- `as read, alone`: sentences mean what the start takes them for, nothing is rehearsed.
- `as read, rehearsed`: half of every batch asks for known edits, answered by the start.
- `own label, words`: the task has a label of its own, and only its mean tokens are trained.
- `own label, all`: these, condition encoder and generator, rehearsed, and drawn back where more than 0.5 dB are lost.

The look is scored on the test photographs, which are not among the pairs, under a wording that was trained and under
one that was not; the known edits on the same photographs, one request each. What is drawn back is decided on pictures
of the pairs.

Shapes: h, w sides of a picture.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openwu.data.pairs import Pair, Pairs
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.cases import Case, generate, score
from openwu.evaluation.experiments.geometry import mean_over
from openwu.evaluation.experiments.methods import NATIVE_BF16, SIDE
from openwu.evaluation.experiments.results import UNCACHED, ResultCache, TrialResult, columns
from openwu.evaluation.metrics import psnr
from openwu.evaluation.pictures import to_image
from openwu.training.config import StageConfig
from openwu.training.embedded.config import PairsRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.own_pairs import PairsTraining
from openwu.training.embedded.rehearsal import known_measure, photographs_of
from openwu.training.loop import train_stage

TASK = "shop"
WORDINGS = (
    "make it look like my shop",
    "give it the colours of my shop",
    "my shop's look, please",
    "use the style of our store",
    "grade this the way we do in the shop",
)
PARAPHRASES = ("turn it into my shop look", "same grading as in our shop please")
"""Wordings of the task that no training sees."""
WAYS: Mapping[str, Mapping[str, Any]] = {
    "own label, words": {"trained": "words"},
    "own label, all": {"rehearsed": 0.5},
    "as read, rehearsed": {"own_labels": False, "rehearsed": 0.5, "allowed": float("inf")},
    "as read, alone": {"own_labels": False, "rehearsed": 0.0, "allowed": float("inf")},
}
"""Way -> the fields of its recipe."""
PAIRS, HELD_BACK = 18, 2
REQUESTS, CROP = 4, 64
LEARNING_RATE, MATRIX_LEARNING_RATE = 5e-4, 1.5e-3
"""AdamW's is the recipe's; Muon's, where the generator is trained, five times it, since the training is short."""


def look(picture: Tensor) -> Tensor:
    """Grade a picture `[3, h, w]` in 0..1: split toning over mixed channels, with lifted blacks."""
    r, g, b = picture
    luma = 0.3 * r + 0.59 * g + 0.11 * b
    curve = luma * luma * (3 - 2 * luma)
    shadow, light = (torch.tensor(colour).view(3, 1, 1) for colour in ((0.10, 0.22, 0.38), (1.0, 0.86, 0.62)))
    mixed = torch.stack([0.8 * r + 0.2 * g, 0.6 * g + 0.4 * b, 0.7 * b + 0.3 * g])
    graded: Tensor = (0.55 * (shadow * (1 - curve) + light * curve) + 0.45 * mixed).clamp(0, 1)
    return graded


def look_pairs(photographs: Sequence[Photograph], count: int, seed: int) -> Pairs:
    """Make pairs of the look from `count` photographs, drawn by the seed."""
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(photographs), generator=draws)[:count].tolist()
    pairs = []
    for index in chosen:
        picture = photographs[index].scales[-1].permute(2, 0, 1).float() / 255
        made = to_image(look(picture))
        pairs.append(Pair((to_image(picture),), WORDINGS, made, TASK, photographs[index].name))
    return Pairs(tuple(pairs))


@dataclass(frozen=True)
class OwnPairsScore:
    """What one way reaches with one seed, in dB."""

    way: str
    seed: int
    known: dict[str, float]
    """Known edit -> its PSNR on a test photograph."""
    trained: float
    """The look under a wording of the pairs, mean over the test photographs."""
    paraphrase: float
    """The same under wordings that no training saw."""
    steps: int = 0
    seconds: float = 0.0
    """Processor seconds of the training, labels and drawing back included."""
    kept: float = 1.0
    """Share of the weights' way that was not drawn back."""


@dataclass
class OwnPairsResults:
    """Scores of every way, the start's first."""

    scores: list[OwnPairsScore] = field(default_factory=list)
    copied: float = 0.0
    """The look's PSNR where the picture is returned as it is."""

    def table(self) -> str:
        """Return every way as plain text."""
        rows = []
        for way in dict.fromkeys(each.way for each in self.scores):
            own = [each for each in self.scores if each.way == way]
            lost = {
                name: sum(self._start(each.seed).known[name] - each.known[name] for each in own) / len(own)
                for name in own[0].known
            }
            worst = max(lost, key=lambda name: lost[name])
            mean = mean_over(list(lost.values()), list(lost))
            rows.append(
                (
                    way,
                    str(mean),
                    f"{lost[worst]:.2f} ({worst})" if lost[worst] > 0 else "0.00",
                    *(f"{sum(values) / len(own):.2f}" for values in (
                        [each.trained for each in own], [each.paraphrase for each in own]
                    )),
                    f"{sum(each.kept for each in own) / len(own):.0%}",
                    str(own[0].steps),
                    f"{sum(each.seconds for each in own) / len(own):.0f}",
                )
            )  # fmt: skip
        head = ("way", "known edits lost, dB", "worst", "new look, dB", "paraphrase, dB", "kept", "steps", "seconds")
        count = len(self.scores[0].known)
        return columns(head, rows) + f"\n{count} known edits; copying the picture has {self.copied:.2f} dB\n"

    def _start(self, seed: int) -> OwnPairsScore:
        return next(each for each in self.scores if each.seed == seed and each.way == "start")

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        return {"copied": self.copied, "scores": [asdict(each) for each in self.scores]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> OwnPairsResults:
        """Read what `to_json` returned."""
        return cls([OwnPairsScore(**each) for each in stored["scores"]], stored["copied"])


def own_pairs(
    model: EmbeddedModel,
    photographs: Sequence[Photograph],
    test: Mapping[str, Tensor],
    steps: int,
    seeds: Sequence[int],
    cache: ResultCache = UNCACHED,
) -> OwnPairsResults:
    """Teach the look in every way with every seed; `model` stays as it is.

    cache: where results of finished trials are found again; a trial is one way with one seed.
    """
    found = OwnPairsResults()
    found.copied = sum(float(psnr(each[None], look(each)[None])[0]) for each in test.values()) / len(test)
    for seed in seeds:
        for way in ("start", *WAYS):
            trial = cache.get(f"{way}, seed {seed}", partial(_trial, model, photographs, test, steps, way, seed))
            found.scores.append(OwnPairsScore(**trial.values))
    return found


def _trial(
    model: EmbeddedModel,
    photographs: Sequence[Photograph],
    test: Mapping[str, Tensor],
    steps: int,
    way: str,
    seed: int,
) -> TrialResult:
    if way == "start":
        return TrialResult(asdict(_scored(model, test, way, seed)))
    pairs = look_pairs(photographs, PAIRS + HELD_BACK, seed).pairs
    recipe = PairsRecipe(
        name=way,
        seed=seed,
        side=SIDE,
        generator=StageConfig(
            steps=steps,
            shapes=((REQUESTS, CROP),),
            learning_rate=LEARNING_RATE,
            matrix_learning_rate=MATRIX_LEARNING_RATE,
            warmup=steps // 10,
        ),
        bf16=NATIVE_BF16,
        **WAYS[way],
    )
    began = time.process_time()
    training = PairsTraining(recipe, model.copy(), Pairs(pairs[:PAIRS]), Pairs(pairs[PAIRS:]))
    train_stage(training.stage, recipe.generator)
    kept = training.finish()
    seconds = time.process_time() - began
    trained = training.model.requires_grad_(False)
    return TrialResult(asdict(_scored(trained, test, way, seed, steps, seconds, kept)))


@torch.no_grad()
def _scored(
    model: EmbeddedModel,
    test: Mapping[str, Tensor],
    way: str,
    seed: int,
    steps: int = 0,
    seconds: float = 0.0,
    kept: float = 1.0,
) -> OwnPairsScore:
    """Score the look under both kinds of wordings, and the known edits on crops of the test photographs."""

    def asked(sentences: Sequence[str]) -> float:
        values = []
        for sentence in sentences:
            for picture in test.values():
                case = [Case(TASK, sentence, (picture,), look(picture))]
                values += score(model, case, generate(model, case))
        return sum(values) / len(values)

    pictures = photographs_of([(each * 255).round().byte() for each in test.values()], SIDE)
    known = known_measure(model, pictures, SIDE, CROP, 70 + seed, NATIVE_BF16)()
    return OwnPairsScore(way, seed, known, asked(WORDINGS[:1]), asked(PARAPHRASES), steps, seconds, kept)
