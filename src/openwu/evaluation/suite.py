"""The edit suite on test photographs: for every sub-task, how close each method comes to what should have come out.

Enters: the embedded model, the shared-LoRA baseline if there is one, test photographs. Leaves: scores, a picture grid.

Methods: `input` copies the input; `base` is the frozen base, which reads the instruction itself; `shared` is one LoRA
for all sub-tasks, trained as long on batches drawn alike; `generated` is the adapter written for this request;
`shuffled` is an adapter written for another sub-task's request on the same photograph.

Shapes: t sub-tasks, h and w sides of a photograph, p and q sides of the reference picture.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from tqdm import tqdm

from openwu.backbones.embedded.network import place_planes
from openwu.data.suite import CONTRADICTORY_PAIRS, EDITS, Pair, Scene
from openwu.data.suite.photographs import TEST_PHOTOGRAPHS
from openwu.data.suite.phrases import LANGUAGES, load_phrases
from openwu.errors import OpenwuError
from openwu.evaluation.pictures import middle
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

METHODS = ("input", "base", "shared", "generated", "shuffled")
ROWS_AT_ONCE = 5
"""Requests in one forward pass."""
GRID_SIDE = 112
"""Side in pixels of a cell of a picture grid."""


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
    """t requests on one photograph, each with a sentence."""

    photograph: str
    edits: tuple[str, ...]
    sentences: tuple[str, ...]
    language: str
    split: str
    picture: Tensor
    """[t, 3, h, w]"""
    planes: Tensor
    """[t, 3, h, w]: noise, y, x"""
    target: Tensor
    """[t, 3, h, w]"""
    reference: Tensor
    """[t, 3, p, q], zeros where a request has no second picture"""
    present: Tensor
    """[t] bool: which requests have a second picture"""

    def rows(self) -> list[slice]:
        """Blocks of requests for one forward pass each."""
        return [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(self.edits), ROWS_AT_ONCE)]


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

    @property
    def methods(self) -> list[str]:
        """Methods in the order of METHODS."""
        found = {score.method for score in self.scores}
        return [method for method in METHODS if method in found]

    @property
    def edits(self) -> list[str]:
        """Sub-tasks in the suite's order."""
        found = {score.edit for score in self.scores}
        return [name for name in EDITS if name in found]

    @property
    def paired(self) -> list[str]:
        """Sub-tasks that stand in a contradictory pair, each once."""
        members = {name for pair in CONTRADICTORY_PAIRS for name in pair}
        return [name for name in self.edits if name in members]

    def summary(self) -> dict[str, float]:
        """The numbers that the claims are about, in dB."""
        pairs = {method: self.mean("psnr", method, self.paired) for method in self.methods}
        every = {method: self.mean("psnr", method) for method in self.methods}
        return {
            **{f"pairs_psnr_{method}": value for method, value in pairs.items()},
            "pairs_ssim_generated": self.mean("ssim", "generated", self.paired),
            **{f"all_psnr_{method}": value for method, value in every.items()},
            **{f"generated_minus_{name}": pairs["generated"] - pairs[name] for name in pairs if name != "generated"},
        }

    def missed(self) -> list[str]:
        """Sub-tasks that do not beat copying their input."""
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
) -> Report:
    """Every sub-task on every photograph, once per seed; the seed draws sentences, noise and degradations.

    `shared`: None leaves that method out.
    """
    if len(edits) < 2:
        raise OpenwuError(f"suite: expected at least two sub-tasks, to swap their adapters, got {list(edits)}")
    report = Report()
    rounds = [(name, seed) for seed in seeds for name in photographs]
    for name, seed in tqdm(rounds, desc="suite", unit="photograph"):
        cases = draw_cases(name, photographs[name], seed, edits, following(name, photographs))
        outputs = {"input": cases.picture, **dict(run_methods(model, shared, cases))}
        for method, output in outputs.items():
            report.scores += list(_scores(cases, method, seed, output))
        if not report.grid:
            for i, edit in enumerate(cases.edits):
                cells = [*(outputs[method][i] for method in report.methods), cases.target[i]]
                report.grid[edit] = [middle(cell, GRID_SIDE).float() for cell in cells]
    return report


def following(name: str, photographs: dict[str, Tensor]) -> Tensor:
    """The second photograph of reference edits: the next one."""
    names = sorted(photographs)
    return photographs[names[(names.index(name) + 1) % len(names)]]


def draw_cases(name: str, source: Tensor, seed: int, edits: Sequence[str], second: Tensor) -> Cases:
    """Each photograph is asked in one language and with phrasings of one split; they alternate over photographs."""
    turn = seed + sorted_position(name)
    language, split = LANGUAGES[turn % 2], ("train", "held_out")[turn // 2 % 2]
    sentences, scenes = [], []
    for edit in edits:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{edit}/{seed}".encode()))
        phrases = load_phrases()[edit][language][split]
        sentences.append(phrases[int(torch.randint(len(phrases), (), generator=generator))])
        noise = torch.randn(1, *source.shape[1:], generator=generator)
        scenes.append(Scene(source, noise, generator, second=second))
    return make_cases(name, edits, sentences, scenes, language, split)


def make_cases(
    name: str,
    edits: Sequence[str],
    sentences: Sequence[str],
    scenes: Sequence[Scene],
    language: str,
    split: str,
    pairs: Sequence[Pair] | None = None,
) -> Cases:
    """One request for each of equally large scenes; `pairs` are made by the edits unless they are given."""
    if pairs is None:
        pairs = [EDITS[edit].make_pair(scene) for edit, scene in zip(edits, scenes, strict=True)]
    second = scenes[0].second
    empty = torch.zeros_like(scenes[0].source if second is None else second)
    place = place_planes(*scenes[0].source.shape[-2:])
    return Cases(
        name,
        tuple(edits),
        tuple(sentences),
        language,
        split,
        torch.stack([pair.picture for pair in pairs]),
        torch.stack([torch.cat([scene.noise, place]) for scene in scenes]),
        torch.stack([pair.target for pair in pairs]),
        torch.stack([empty if pair.reference is None else pair.reference for pair in pairs]),
        torch.tensor([pair.reference is not None for pair in pairs]),
    )


def sorted_position(name: str) -> int:
    """A photograph's fixed place, whatever other photographs are evaluated with it."""
    return sorted(TEST_PHOTOGRAPHS).index(name) if name in TEST_PHOTOGRAPHS else 0


def generate(model: EmbeddedModel, cases: Cases) -> tuple[Tensor, Adapter]:
    """Instruction tokens `[t, K, text_dim]` and adapters (b = t) of all requests."""
    text = model.instruction(cases.sentences)
    adapters = [
        model.adapt(cases.picture[rows], text[rows], cases.reference[rows], cases.present[rows])
        for rows in cases.rows()
    ]
    return text, Adapter.stack(adapters)


def apply(model: EmbeddedModel, cases: Cases, text: Tensor, adapter: Adapter | None) -> Tensor:
    """The base's answers `[t, 3, h, w]` under an adapter per request, one for all, or none."""
    pieces = []
    for rows in cases.rows():
        one_for_all = adapter is None or adapter.batch == 1
        own = adapter if one_for_all or adapter is None else adapter.select(range(*rows.indices(len(cases.edits))))
        pieces.append(model.edit(cases.picture[rows], cases.planes[rows], text[rows], own))
    return torch.cat(pieces)


def run_methods(model: EmbeddedModel, shared: Adapter | None, cases: Cases) -> Iterator[tuple[str, Tensor]]:
    """(method, `[t, 3, h, w]`) for every method that computes something."""
    text, generated = generate(model, cases)
    # Half the list away: never the same sub-task, and rarely its opposite, which stands beside it.
    shuffled = generated.select([(i + len(cases.edits) // 2) % len(cases.edits) for i in range(len(cases.edits))])
    yield "base", apply(model, cases, text, None)
    if shared is not None:
        yield "shared", apply(model, cases, text, shared)
    yield "generated", apply(model, cases, text, generated)
    yield "shuffled", apply(model, cases, text, shuffled)


def psnr_of(output: Tensor, target: Tensor) -> float:
    """dB of a picture `[3, h, w]` as its 8-bit file shows it."""
    shown = (output.float().clamp(0, 1) * 255).round() / 255
    error = float((shown - target).square().mean())
    return float(-10 * torch.log10(torch.tensor(max(error, 1e-10))))


def _scores(cases: Cases, method: str, seed: int, output: Tensor) -> Iterator[Score]:
    shown = (output.float().clamp(0, 1) * 255).round() / 255
    for i, edit in enumerate(cases.edits):
        psnr = psnr_of(output[i], cases.target[i])
        ssim = float(structural_similarity(shown[i].numpy(), cases.target[i].numpy(), channel_axis=0, data_range=1.0))
        yield Score(edit, cases.photograph, method, seed, cases.language, cases.split, psnr, ssim)
