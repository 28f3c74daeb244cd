"""The edit suite on test photographs: PSNR and SSIM of every sub-task under every method.

Methods: `input` copies the input; `base` is the frozen base, which reads the instruction itself; `shared` is one LoRA
for all sub-tasks, trained as long on batches drawn alike; `generated` is the adapter generated for this request;
`shuffled` is the adapter of another sub-task's request on the same photograph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.suite import CONTRADICTORY_PAIRS, EDITS
from openwu.errors import OpenwuError
from openwu.evaluation.cases import Case, draw_cases, edit, encode, generate
from openwu.evaluation.metrics import psnr, ssim
from openwu.evaluation.pictures import middle
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

METHODS = ("input", "base", "shared", "generated", "shuffled")
GRID_SIDE = 112
"""Side in pixels of a cell of a picture grid."""


@dataclass(frozen=True)
class Score:
    """The quality of one request under one method."""

    edit: str
    photograph: str
    method: str
    seed: int
    language: str
    split: str
    """Whether the sentence is one of the training phrasings ("train") or was held out ("held_out")."""
    psnr: float
    """dB, of the 8-bit picture"""
    ssim: float


@dataclass
class Report:
    """The scores of an evaluation, and pictures of some."""

    scores: list[Score] = field(default_factory=list)
    grid: dict[str, list[Tensor]] = field(default_factory=dict)
    """Sub-task -> cells `[3, s, s]`: input, one per method after "input", target; of the first photograph and seed."""

    def mean(self, metric: str, method: str, edits: Sequence[str] | None = None, **only: str) -> float:
        """Average a metric over a method's scores; `only` keeps those with these attributes."""
        values = [
            getattr(score, metric)
            for score in self.scores
            if score.method == method
            and (edits is None or score.edit in edits)
            and all(getattr(score, name) == value for name, value in only.items())
        ]
        return sum(values) / len(values) if values else float("nan")

    @property
    def methods(self) -> list[str]:
        """The methods that were scored, in the order of METHODS."""
        found = {score.method for score in self.scores}
        return [method for method in METHODS if method in found]

    @property
    def edits(self) -> list[str]:
        """The sub-tasks that were scored, in the suite's order."""
        found = {score.edit for score in self.scores}
        return [name for name in EDITS if name in found]

    @property
    def paired(self) -> list[str]:
        """The scored sub-tasks of contradictory pairs, each once."""
        members = {name for pair in CONTRADICTORY_PAIRS for name in pair}
        return [name for name in self.edits if name in members]

    def summary(self) -> dict[str, float]:
        """Return the means behind the model card's claims, in dB."""
        pairs = {method: self.mean("psnr", method, self.paired) for method in self.methods}
        every = {method: self.mean("psnr", method) for method in self.methods}
        return {
            **{f"pairs_psnr_{method}": value for method, value in pairs.items()},
            "pairs_ssim_generated": self.mean("ssim", "generated", self.paired),
            **{f"all_psnr_{method}": value for method, value in every.items()},
            **{f"generated_minus_{name}": pairs["generated"] - pairs[name] for name in pairs if name != "generated"},
        }

    def missed(self) -> list[str]:
        """Return the sub-tasks that do not beat copying their input."""
        return [
            name
            for name in self.edits
            if not self.mean("psnr", "generated", [name]) > self.mean("psnr", "input", [name])
        ]


@torch.inference_mode()
def evaluate_suite(
    model: EmbeddedModel,
    shared: Adapter | None,
    photographs: dict[str, Tensor],
    seeds: Sequence[int],
    edits: Sequence[str],
    only: str | None = None,
) -> Report:
    """Score every sub-task on every photograph, once per seed; the seed draws sentences, noise and degradations.

    shared: None leaves that method out. only: the name of one photograph; the others serve as references.
    """
    if len(edits) < 2:
        raise OpenwuError(f"suite: expected at least two sub-tasks, to swap their adapters, got {list(edits)}")
    report = Report()
    rounds = [(name, seed) for seed in seeds for name in (photographs if only is None else [only])]
    for name, seed in tqdm(rounds, desc="suite", unit="photograph"):
        cases = draw_cases(photographs, edits, seed, only=name)
        outputs = {"input": [case.picture for case in cases], **dict(run_methods(model, shared, cases))}
        for method, edited in outputs.items():
            report.scores += [_score(case, method, seed, output) for case, output in zip(cases, edited, strict=True)]
        if not report.grid:
            for i, case in enumerate(cases):
                cells = [*(outputs[method][i] for method in report.methods), case.target]
                report.grid[case.task] = [middle(cell, GRID_SIDE).float() for cell in cells]
    return report


def run_methods(
    model: EmbeddedModel, shared: Adapter | None, cases: Sequence[Case]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield (method, edited pictures) for every method that computes something."""
    text, generated = encode(model, cases), generate(model, cases)
    # Half the list away: never the same sub-task, and rarely its opposite, which stands beside it.
    shuffled = generated.select([(i + len(cases) // 2) % len(cases) for i in range(len(cases))])
    yield "base", edit(model, cases, None, text)
    if shared is not None:
        yield "shared", edit(model, cases, shared, text)
    yield "generated", edit(model, cases, generated, text)
    yield "shuffled", edit(model, cases, shuffled, text)


def _score(case: Case, method: str, seed: int, output: Tensor) -> Score:
    quality = float(psnr(output, case.target)), ssim(output, case.target)
    return Score(case.task, case.photograph, method, seed, case.language, case.split, *quality)
