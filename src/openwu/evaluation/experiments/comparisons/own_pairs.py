"""Own pairs: looks that no edit of the suite has are taught from pairs; what it costs the edits that were known.

A recipe as it is used (`training.embedded.own_pairs`), with its guards on and off, for as many steps on the same pairs:

- `as read, alone`: sentences mean what the start takes them for, nothing is rehearsed.
- `as read, rehearsed`: half of every batch asks for known edits, answered by the start.
- `own label, words`: the task has a label of its own, and only its mean tokens are trained.
- `own label, all`: these, condition encoder and generator, rehearsed, and drawn back where more than
  0.5 dB are lost on average, or 1 dB of one edit.

The look is scored on the test photographs, which are not among the pairs, under a wording that was trained and under
one that was not; the known edits on the same photographs, one request each. What is drawn back is decided on pictures
of the pairs.

Shapes: h, w sides of a picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


@dataclass(frozen=True)
class Look:
    """An edit that no edit of the suite is, and how it is asked for."""

    apply: Callable[[Tensor], Tensor]
    """Edits a picture `[3, h, w]` in 0..1."""
    wordings: tuple[str, ...]
    paraphrases: tuple[str, ...]
    """Wordings of the task that no training sees."""


def shop(picture: Tensor) -> Tensor:
    """Grade a picture `[3, h, w]` in 0..1: split toning over mixed channels, with lifted blacks."""
    r, g, b = picture
    luma = 0.3 * r + 0.59 * g + 0.11 * b
    curve = luma * luma * (3 - 2 * luma)
    shadow, light = (torch.tensor(colour).view(3, 1, 1) for colour in ((0.10, 0.22, 0.38), (1.0, 0.86, 0.62)))
    mixed = torch.stack([0.8 * r + 0.2 * g, 0.6 * g + 0.4 * b, 0.7 * b + 0.3 * g])
    graded: Tensor = (0.55 * (shadow * (1 - curve) + light * curve) + 0.45 * mixed).clamp(0, 1)
    return graded


def album(picture: Tensor) -> Tensor:
    """Make a picture `[3, h, w]` in 0..1 glow: a blurred copy is screened over it, in pale colours."""
    blurred = F.avg_pool2d(F.pad(picture[None], (4, 4, 4, 4), mode="replicate"), 9, stride=1)[0]
    glowing = 1 - (1 - picture) * (1 - 0.6 * blurred)
    return (0.75 * glowing + 0.25 * glowing.mean(0, keepdim=True)).clamp(0, 1)


def zine(picture: Tensor) -> Tensor:
    """Print a picture `[3, h, w]` in 0..1 as a zine: dark outlines of what is light, on three inks of a warm paper."""
    luma = picture.mean(0, keepdim=True)
    padded = F.pad(luma[None], (1, 1, 1, 1), mode="replicate")[0]
    across, down = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2], padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    outline = (1 - 3 * (across.square() + down.square()).sqrt()).clamp(0, 1)
    paper = torch.tensor((1.0, 0.95, 0.82)).view(3, 1, 1)
    return (outline * paper * (0.35 * picture + 0.65 * luma) ** 0.8).clamp(0, 1)


LOOKS: Mapping[str, Look] = {
    "shop": Look(
        shop,
        (
            "make it look like my shop",
            "give it the colours of my shop",
            "my shop's look, please",
            "use the style of our store",
            "grade this the way we do in the shop",
        ),
        ("turn it into my shop look", "same grading as in our shop please"),
    ),
    "album": Look(
        album,
        (
            "make it look like our album",
            "give it the glow of our wedding album",
            "our album's look, please",
            "use the style of our wedding pictures",
            "finish this the way we do for the album",
        ),
        ("turn it into our album look", "same finish as in our wedding album please"),
    ),
    "zine": Look(
        zine,
        (
            "make it look like my zine",
            "print it the way my zine looks",
            "my zine's look, please",
            "use the style of our fanzine",
            "ink this the way we do for the zine",
        ),
        ("turn it into my zine look", "same inking as in our zine please"),
    ),
}
"""Task -> its look: a colour grading, a glow, and outlines."""
START = "start"
"""The way of the model that nothing was taught."""
UNGUARDED = {"allowed": float("inf"), "allowed_each": float("inf")}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "own label, words": {"trained": "words"},
    "own label, all": {"rehearsed": 0.5},
    "as read, rehearsed": {"own_labels": False, "rehearsed": 0.5, **UNGUARDED},
    "as read, alone": {"own_labels": False, "rehearsed": 0.0, **UNGUARDED},
}
"""Way -> the fields of its recipe."""
WORTH_NAMING = 0.005
"""dB from which the edit that lost most is named."""
PAIRS, HELD_BACK = 18, 2
REQUESTS, CROP = 4, 64
LEARNING_RATE, MATRIX_LEARNING_RATE = 5e-4, 1.5e-3
"""AdamW's is the recipe's; Muon's, where the generator is trained, five times it, since the training is short."""


def look_pairs(name: str, photographs: Sequence[Photograph], count: int, seed: int) -> Pairs:
    """Make pairs of a look from `count` photographs, drawn by the seed."""
    draws, look = torch.Generator().manual_seed(seed), LOOKS[name]
    chosen = torch.randperm(len(photographs), generator=draws)[:count].tolist()
    pairs = []
    for index in chosen:
        picture = photographs[index].scales[-1].permute(2, 0, 1).float() / 255
        made = to_image(look.apply(picture))
        pairs.append(Pair((to_image(picture),), look.wordings, made, name, photographs[index].name))
    return Pairs(tuple(pairs))


@dataclass(frozen=True)
class OwnPairsScore:
    """What one way reaches with one look and one seed, in dB."""

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
    look: str = "shop"


@dataclass
class OwnPairsResults:
    """Scores of every way with every look, the start's first."""

    scores: list[OwnPairsScore] = field(default_factory=list)
    copied: dict[str, float] = field(default_factory=dict)
    """Look -> its PSNR where the picture is returned as it is."""

    def table(self) -> str:
        """Return every way with every look as plain text; intervals are over seeds, of known edits over these too."""
        rows = []
        for way, look in dict.fromkeys((each.way, each.look) for each in self.scores):
            own = [each for each in self.scores if (each.way, each.look) == (way, look)]
            lost = {name: [self._start(each).known[name] - each.known[name] for each in own] for name in own[0].known}
            worst = max(lost, key=lambda name: max(lost[name]))
            mean = mean_over([loss for values in lost.values() for loss in values], [n for n in lost for _ in own])
            rows.append(
                (
                    *(way, look, str(mean)),
                    f"{max(lost[worst]):.2f} ({worst})" if max(lost[worst]) >= WORTH_NAMING else "0.00",
                    _over_seeds([each.trained for each in own]),
                    _over_seeds([each.paraphrase for each in own]),
                    f"{sum(each.kept for each in own) / len(own):.0%}",
                    str(own[0].steps),
                    f"{sum(each.seconds for each in own) / len(own):.0f}",
                )
            )
        head = (
            *("way", "look", "known edits lost, dB", "worst edit and seed", "new look, dB", "paraphrase, dB"),
            *("kept", "steps", "seconds"),
        )
        seeds, count = len({each.seed for each in self.scores}), len(self.scores[0].known)
        copies = ", ".join(f"{name} {value:.2f} dB" for name, value in self.copied.items())
        return columns(head, rows) + f"\n{count} known edits, seeds: {seeds}; copying the picture has: {copies}\n"

    def _start(self, score: OwnPairsScore) -> OwnPairsScore:
        """The start's score that one is compared with: its known edits are the same with every look."""
        return next(each for each in self.scores if each.seed == score.seed and each.way == START)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        return {"copied": self.copied, "scores": [asdict(each) for each in self.scores]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> OwnPairsResults:
        """Read what `to_json` returned."""
        return cls([OwnPairsScore(**each) for each in stored["scores"]], dict(stored["copied"]))


def _over_seeds(values: Sequence[float]) -> str:
    """Format the mean over seeds, with its interval where there are several."""
    mean = mean_over(values, [str(seed) for seed in range(len(values))])
    return str(mean) if len(values) > 1 else f"{mean.value:.2f}"


def own_pairs(
    model: EmbeddedModel,
    photographs: Sequence[Photograph],
    test: Mapping[str, Tensor],
    steps: int,
    seeds: Sequence[int],
    ways: Sequence[str] = tuple(WAYS),
    looks: Sequence[str] = tuple(LOOKS),
    cache: ResultCache = UNCACHED,
) -> OwnPairsResults:
    """Teach every look in every way with every seed; `model` stays as it is.

    ways, looks: some of WAYS and LOOKS. cache: where results of finished trials are found again; a trial is one way
    with one look and one seed.
    """
    found = OwnPairsResults()
    for name in looks:
        pairs = [(each, LOOKS[name].apply(each)) for each in test.values()]
        found.copied[name] = sum(float(psnr(each[None], target[None])[0]) for each, target in pairs) / len(pairs)
    for way in (START, *ways):
        for seed in seeds:
            known: dict[str, float] | None = None  # the start's are the same with every look
            for look in looks:
                if way == START:
                    trial = partial(_start_trial, model, test, look, seed, known)
                else:
                    trial = partial(_trial, model, photographs, test, steps, way, look, seed)
                found.scores.append(OwnPairsScore(**cache.get(f"{way}, {look}, seed {seed}", trial).values))
                known = found.scores[-1].known
    return found


def _start_trial(
    model: EmbeddedModel, test: Mapping[str, Tensor], look: str, seed: int, known: dict[str, float] | None
) -> TrialResult:
    said, other = _asked(model, test, look)
    known = _known(model, test, seed) if known is None else known
    return TrialResult(asdict(OwnPairsScore(START, seed, known, said, other, look=look)))


def _trial(
    model: EmbeddedModel,
    photographs: Sequence[Photograph],
    test: Mapping[str, Tensor],
    steps: int,
    way: str,
    look: str,
    seed: int,
) -> TrialResult:
    pairs = look_pairs(look, photographs, PAIRS + HELD_BACK, seed).pairs
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
    said, other = _asked(trained, test, look)
    found = OwnPairsScore(way, seed, _known(trained, test, seed), said, other, steps, seconds, kept, look)
    return TrialResult(asdict(found))


@torch.no_grad()
def _asked(model: EmbeddedModel, test: Mapping[str, Tensor], look: str) -> tuple[float, float]:
    """Score the look on the test photographs, under a wording of the pairs and under those that no training saw."""
    wanted = LOOKS[look]

    def mean(sentences: Sequence[str]) -> float:
        values = []
        for sentence in sentences:
            for picture in test.values():
                case = [Case(look, sentence, (picture,), wanted.apply(picture))]
                values += score(model, case, generate(model, case))
        return sum(values) / len(values)

    return mean(wanted.wordings[:1]), mean(wanted.paraphrases)


@torch.no_grad()
def _known(model: EmbeddedModel, test: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    """Score the known edits, one request each, on crops of the test photographs."""
    pictures = photographs_of([(each * 255).round().byte() for each in test.values()], SIDE)
    return known_measure(model, pictures, SIDE, CROP, 70 + seed, NATIVE_BF16)()
