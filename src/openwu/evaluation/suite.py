"""The edit suite on test photographs: for every sub-task, how close each method comes to what should have come out.

Enters: the embedded model, the shared-LoRA baseline, test photographs. Leaves: rows of numbers and a picture grid.

Methods: `input` copies the input; `base` is the frozen base, which reads the instruction itself; `shared` is one LoRA
for all sub-tasks, trained as long on the same batches; `generated` is the adapter written for this request; `shuffled`
is an adapter written for another sub-task's request on the same photograph.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from tqdm import tqdm

from openwu.data.edits import CONTRADICTORY_PAIRS, EDITS
from openwu.data.photographs import TEST_PHOTOGRAPHS
from openwu.data.phrases import LANGUAGES, load_phrases
from openwu.embedded import EmbeddedModel
from openwu.errors import OpenwuError
from openwu.types import Adapter

METHODS = ("input", "base", "shared", "generated", "shuffled")
ROWS_AT_ONCE = 6
"""Requests in one forward pass."""
GRID_SIDE = 160
"""Side in pixels of a cell of the picture grid."""


@dataclass(frozen=True)
class Score:
    """One request under one method."""

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


@dataclass(frozen=True)
class Cases:
    """All sub-tasks on one photograph: t sub-tasks, each with a sentence."""

    photograph: str
    edits: tuple[str, ...]
    sentences: tuple[str, ...]
    language: str
    split: str
    picture: Tensor
    """[t, 3, h, w]"""
    noise: Tensor
    """[t, 1, h, w]"""
    target: Tensor
    """[t, 3, h, w]"""


@dataclass
class Report:
    """What an evaluation found."""

    scores: list[Score] = field(default_factory=list)
    grid: dict[str, list[Tensor]] = field(default_factory=dict)
    """Sub-task -> cells `[3, s, s]`: input, one per method after "input", target; of the first photograph and seed."""

    def mean(self, metric: str, method: str, edits: Sequence[str] | None = None, **only: str) -> float:
        """Mean over the scores of a method; `only` keeps those with these attributes."""
        values = [
            getattr(score, metric)
            for score in self.scores
            if score.method == method
            and (edits is None or score.edit in edits)
            and all(getattr(score, name) == value for name, value in only.items())
        ]
        return sum(values) / len(values) if values else float("nan")

    def summary(self) -> dict[str, float]:
        """The numbers that the claims are about, in dB."""
        paired = [
            name for pair in CONTRADICTORY_PAIRS for name in pair if name in {score.edit for score in self.scores}
        ]
        pairs = {method: self.mean("psnr", method, paired) for method in METHODS}
        return {
            **{f"pairs_psnr_{method}": value for method, value in pairs.items()},
            "pairs_ssim_generated": self.mean("ssim", "generated", paired),
            "generated_minus_shared": pairs["generated"] - pairs["shared"],
            "generated_minus_shuffled": pairs["generated"] - pairs["shuffled"],
            "held_out_minus_train": self.mean("psnr", "generated", split="held_out")
            - self.mean("psnr", "generated", split="train"),
            "zh_minus_en": self.mean("psnr", "generated", language="zh")
            - self.mean("psnr", "generated", language="en"),
        }


@torch.inference_mode()
def evaluate_suite(
    model: EmbeddedModel, shared: Adapter, photographs: dict[str, Tensor], seeds: Sequence[int], edits: Sequence[str]
) -> Report:
    """Every sub-task on every photograph, once per seed; the seed draws sentences, noise and degradations."""
    if len(edits) < 2:
        raise OpenwuError(f"suite: expected at least two sub-tasks, to swap their adapters, got {list(edits)}")
    report = Report()
    rounds = [(name, seed) for seed in seeds for name in photographs]
    for name, seed in tqdm(rounds, desc="suite", unit="photograph"):
        cases = draw_cases(name, photographs[name], seed, edits)
        outputs = {"input": cases.picture, **dict(run_methods(model, shared, cases))}
        for method in METHODS:
            report.scores += list(_scores(cases, method, seed, outputs[method]))
        if not report.grid:
            for i, edit in enumerate(cases.edits):
                cells = [*(outputs[method][i] for method in METHODS), cases.target[i]]
                report.grid[edit] = [cell[:, :GRID_SIDE, :GRID_SIDE] for cell in cells]
    return report


def draw_cases(name: str, source: Tensor, seed: int, edits: Sequence[str]) -> Cases:
    """Each photograph is asked in one language and with phrasings of one split; they alternate over photographs."""
    turn = seed + sorted_position(name)
    language, split = LANGUAGES[turn % 2], ("train", "held_out")[turn // 2 % 2]
    sentences, parts = [], []
    for edit in edits:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{edit}/{seed}".encode()))
        phrases = load_phrases()[edit][language][split]
        sentences.append(phrases[int(torch.randint(len(phrases), (), generator=generator))])
        noise = torch.randn(1, *source.shape[1:], generator=generator)
        given, target = EDITS[edit].make_pair(source, noise, generator)
        parts.append((given, noise, target))
    picture, noise, target = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return Cases(name, tuple(edits), tuple(sentences), language, split, picture, noise, target)


def sorted_position(name: str) -> int:
    """A photograph's fixed place, whatever other photographs are evaluated with it."""
    return sorted(TEST_PHOTOGRAPHS).index(name) if name in TEST_PHOTOGRAPHS else 0


def run_methods(model: EmbeddedModel, shared: Adapter, cases: Cases) -> Iterator[tuple[str, Tensor]]:
    """(method, `[t, 3, h, w]`) for every method that computes something."""
    text = model.instruction(cases.sentences)
    adapters = [model.adapt(cases.picture[rows], text[rows]) for rows in _row_blocks(len(cases.edits))]
    generated = Adapter.stack(adapters)
    # Half the list away: never the same sub-task, and rarely its opposite, which stands beside it.
    shuffled = generated.select([(i + len(cases.edits) // 2) % len(cases.edits) for i in range(len(cases.edits))])
    for method, adapter in (("base", None), ("shared", shared), ("generated", generated), ("shuffled", shuffled)):
        pieces = []
        for rows in _row_blocks(len(cases.edits)):
            own = adapter if adapter is None or adapter.batch == 1 else adapter.select(range(*rows.indices(10**6)))
            pieces.append(model.edit(cases.picture[rows], cases.noise[rows], text[rows], own))
        yield method, torch.cat(pieces)


def _row_blocks(rows: int) -> list[slice]:
    return [slice(start, min(rows, start + ROWS_AT_ONCE)) for start in range(0, rows, ROWS_AT_ONCE)]


def _scores(cases: Cases, method: str, seed: int, output: Tensor) -> Iterator[Score]:
    shown = (output.float().clamp(0, 1) * 255).round() / 255
    for i, edit in enumerate(cases.edits):
        error = float((shown[i] - cases.target[i]).square().mean())
        psnr = float(-10 * torch.log10(torch.tensor(max(error, 1e-10))))
        ssim = float(structural_similarity(shown[i].numpy(), cases.target[i].numpy(), channel_axis=0, data_range=1.0))
        yield Score(edit, cases.photograph, method, seed, cases.language, cases.split, psnr, ssim)
