"""Edits on no list, shown by a pair of pictures: the generated adapter against what else could know them.

Programs of random operations (`openwu.data.programs`) on test photographs: one photograph shows the edit, another is to
be edited alike. Rivals: the input itself, the mean of all programs' adapters, another program's adapter, the nearest
named edit (all are tried on the example), and a cubic polynomial of the example's colours by least squares. What
becomes of the adapter with the photograph in its condition, with three pairs, or with a worn pair is measured, too.

Shapes: s side of the square pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from openwu.backbones.embedded.network import place_planes
from openwu.backbones.embedded.shown.encoder import fit, predicted, reduced
from openwu.data.programs import HELD_OUT_FAMILIES, TRAINED_FAMILIES, Program, draw_program
from openwu.data.suite import EDITS
from openwu.data.suite.operators import jpeg
from openwu.editor.shown.reproduction import ACCEPTED, Reproduction
from openwu.evaluation.cases import first_phrase
from openwu.evaluation.experiments.geometry import Mean, mean_over
from openwu.evaluation.experiments.results import columns
from openwu.evaluation.metrics import psnr
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

GENERATED = "generated, one pair"
UNDERSTOOD = "understood"
"""Group of the trials whose example the editor would take."""
GROUPS: Mapping[str, Callable[[Program], bool]] = {
    "all": lambda program: not program_is_new(program),
    "colour alone": lambda program: not program_is_new(program) and program.colour_only,
    "with a spatial part": lambda program: not program_is_new(program) and not program.colour_only,
    "families never trained on": lambda program: program_is_new(program),
}
"""Groups of programs by name."""


def program_is_new(program: Program) -> bool:
    """Whether a program has an operation of a family that no training sees."""
    return bool(set(program.families) & set(HELD_OUT_FAMILIES))


@dataclass(frozen=True)
class Trial:
    """One program with the photographs that show it and the one that is edited."""

    program: Program
    shown: tuple[str, ...]
    edited: str
    noise: Tensor
    """What the base sees `[1, s, s]`."""
    seed: int


@dataclass(frozen=True)
class ExampleResults:
    """PSNR of every method on every trial."""

    trials: tuple[Trial, ...]
    scores: dict[str, list[float]]
    """Method -> dB of every trial."""
    shares: list[float]
    """Of every trial, the share of its example's own change that the adapter reproduces."""
    pictures: dict[str, list[Tensor]]
    """Row -> cells of the contact sheet."""

    def mean(self, method: str, group: str) -> Mean | None:
        """Return the mean of a method over a group of programs, bootstrapped over edited photographs and programs."""
        if group == UNDERSTOOD:
            own = [i for i, share in enumerate(self.shares) if share >= ACCEPTED]
        else:
            own = [i for i, trial in enumerate(self.trials) if GROUPS[group](trial.program)]
        if not own:
            return None
        return mean_over([self.scores[method][i] for i in own], [self.trials[i].edited for i in own])

    def table(self) -> str:
        """Return the means as plain text."""
        used = [name for name in (*GROUPS, UNDERSTOOD) if self.mean(GENERATED, name)]
        rows = [(method, *(str(self.mean(method, name)) for name in used)) for method in self.scores]
        return columns(("dB [95% interval]", *used), rows)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        means = {
            method: {name: mean.to_json() for name in (*GROUPS, UNDERSTOOD) if (mean := self.mean(method, name))}
            for method in self.scores
        }
        trials = [
            {
                "program": trial.program.families,
                "shown": trial.shown,
                "edited": trial.edited,
                "share": round(self.shares[i], 3),
                **{method: round(values[i], 3) for method, values in self.scores.items()},
            }
            for i, trial in enumerate(self.trials)
        ]
        return {"means": means, "trials": trials}


def draw_trials(photographs: Sequence[str], count: int, side: int, seed: int = 0) -> tuple[Trial, ...]:
    """Draw trials; every fourth has a family that no training sees."""
    trials = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        families = TRAINED_FAMILIES
        if number % 4 == 3:
            families = (HELD_OUT_FAMILIES[number // 4 % len(HELD_OUT_FAMILIES)],)
        program = draw_program(generator, families)
        order = torch.randperm(len(photographs), generator=generator).tolist()
        names = [photographs[i] for i in order]
        noise = torch.randn(1, side, side, generator=generator)
        trials.append(Trial(program, tuple(names[1:4]), names[0], noise, number))
    return tuple(trials)


@torch.inference_mode()
def example_edits(model: EmbeddedModel, photographs: Mapping[str, Tensor], trials: Sequence[Trial]) -> ExampleResults:
    """Measure all methods on all trials; photographs are squares `[3, s, s]` in 0..1."""
    bench = _Bench(model, photographs)
    adapters = [bench.adapter(bench.pair(trial, 0)) for trial in trials]
    mean = _mean(adapters)
    scores: dict[str, list[float]] = {}
    sheet: dict[str, list[Tensor]] = {}
    shares = []
    for number, trial in enumerate(tqdm(trials, desc="examples", unit="program")):
        picture = photographs[trial.edited]
        target = trial.program(picture, trial.noise)
        first = bench.pair(trial, 0)
        weights = fit(reduced(first[:, :1]), reduced(first[:, 1:]))
        outputs = {
            "the input": picture,
            "the mean adapter": bench.edit(trial, mean),
            "another program's adapter": bench.edit(trial, adapters[(number + 1) % len(trials)]),
            "the nearest named edit": bench.nearest(trial, first),
            "a cubic fit of the colours": predicted(picture[None, None], weights)[0, 0],
            GENERATED: bench.edit(trial, adapters[number]),
            "generated, another pair of the program": bench.edit(trial, bench.adapter(bench.pair(trial, 1))),
            "generated, with the photograph": bench.edit(trial, bench.adapter(first, photo=picture)),
            "generated, three pairs": bench.edit(trial, bench.adapter(*(bench.pair(trial, i) for i in range(3)))),
            "generated, a pair from JPEG files": bench.edit(trial, bench.adapter(_worn(first, 75))),
            "generated, a pair of JPEG quality 30": bench.edit(trial, bench.adapter(_worn(first, 30))),
            "generated, a pair at half the size": bench.edit(trial, bench.adapter(_smaller(first))),
        }
        own = bench.apply(first[0, 0], bench.noise(trial, 0), adapters[number], "")
        shares.append(share_of(first[0, 0], first[0, 1], own))
        for method, output in outputs.items():
            scores.setdefault(method, []).append(float(psnr(output[None], target[None])))
        cells = [first[0, 0], first[0, 1], picture, outputs[GENERATED].clamp(0, 1), target]
        sheet[" + ".join(trial.program.families)] = cells
    return ExampleResults(tuple(trials), scores, shares, sheet)


@dataclass(frozen=True)
class _Bench:
    """The model and the photographs, and what is computed once for all trials."""

    model: EmbeddedModel
    photographs: Mapping[str, Tensor]
    tried: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Photograph -> every named edit of it."""

    def pair(self, trial: Trial, number: int) -> Tensor:
        """The trial's program on one of the photographs that show it: `[1, 2, 3, s, s]`."""
        before = self.photographs[trial.shown[number]]
        return torch.stack([before, trial.program(before, self.noise(trial, number))])[None]

    def noise(self, trial: Trial, number: int) -> Tensor:
        """The noise `[1, s, s]` of that pair."""
        generator = torch.Generator().manual_seed(trial.seed * 31 + number)
        return torch.randn(trial.noise.shape, generator=generator)

    def adapter(self, *pairs: Tensor, photo: Tensor | None = None) -> Adapter:
        """Generate the adapter of an edit that pairs show."""
        text = self.model.instruction([""])
        pictures = None if photo is None else photo[None]
        return self.model.adapt_shown(torch.stack(pairs, dim=1), text, pictures)

    def edit(self, trial: Trial, adapter: Adapter, words: str = "") -> Tensor:
        """The trial's photograph `[3, s, s]` under an adapter."""
        return self.apply(self.photographs[trial.edited], trial.noise, adapter, words)

    def apply(self, picture: Tensor, noise: Tensor, adapter: Adapter, words: str) -> Tensor:
        planes = torch.cat([noise, place_planes(*picture.shape[-2:])])
        text = self.model.instruction([words])
        edited = self.model.edit(picture[None], planes[None], text, adapter)
        return edited[0].float()

    def nearest(self, trial: Trial, example: Tensor) -> Tensor:
        """What the named edit makes of the trial's photograph that comes closest on the example."""
        after = example[0, 1]
        tried = self.named(trial.shown[0])
        names = list(tried)
        found = psnr(torch.stack([tried[name] for name in names]), after.expand(len(names), -1, -1, -1))
        name = names[int(found.argmax())]
        picture = self.photographs[trial.edited]
        return self.apply(picture, trial.noise, self.words(picture, name), NAMED[name])

    def words(self, picture: Tensor, name: str) -> Adapter:
        return self.model.adapt(picture[None], self.model.instruction([NAMED[name]]))

    def named(self, photograph: str) -> dict[str, Tensor]:
        """Every named edit of a photograph, computed once."""
        if photograph not in self.tried:
            picture = self.photographs[photograph]
            noise = torch.randn(1, *picture.shape[1:], generator=torch.Generator().manual_seed(0))
            self.tried[photograph] = {
                name: self.apply(picture, noise, self.words(picture, name), words) for name, words in NAMED.items()
            }
        return self.tried[photograph]


def _mean(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter whose update is the mean of theirs."""
    return Adapter.sum([adapter.scaled(1 / len(adapters)) for adapter in adapters])


def _worn(pair: Tensor, quality: int) -> Tensor:
    """A pair `[1, 2, 3, s, s]` out of JPEG files."""
    return torch.stack([jpeg(picture, quality) for picture in pair[0]])[None]


def _smaller(pair: Tensor) -> Tensor:
    """A pair `[1, 2, 3, s, s]` scaled to half its sides."""
    return F.interpolate(pair[0], scale_factor=0.5, mode="bilinear", antialias=True)[None]


def share_of(before: Tensor, after: Tensor, edited: Tensor) -> float:
    """The share of the change that an edited picture has, as the editor's check of examples measures it."""
    change, error = (float((each.clamp(0, 1) - after).square().mean().sqrt()) for each in (before, edited))
    return Reproduction((change,), (error,)).share


NAMED = {name: first_phrase(name) for name, edit in EDITS.items() if not edit.needs_reference}
"""Named edits that may stand in for a program, with the words that ask for them."""
