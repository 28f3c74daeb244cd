"""Contradictory tasks on equal terms: what one shared adapter, one per task, the whole base, and a generator learn.

Enters: a model whose base is frozen, photographs, contradictory tasks. Leaves: for every method and task how close it
comes, how far it goes towards what was asked, and what is left of the base's old tasks.

Every method sees the same requests in the same order for as many steps:

- `base`: nothing is trained; the base reads the instruction, as under every other method.
- `single`: one LoRA per task, given by the true task; an upper bound for adapters that are not told the picture.
- `retrieval`: the same bank, but the nearest training sentences choose.
- `shared`: one LoRA of the generator's rank for all tasks; `shared, wide`: one of a larger rank.
- `sft`: all of the base's weights.
- `generated`: condition encoder and generator, from nothing; `random`: noise as large as what they write.

Shapes: b requests, t tasks, r LoRA rank, in / out widths of a target, h and w sides of a picture.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from openwu.data.batches import PairBatch, PairSampler
from openwu.data.photographs import Photograph
from openwu.data.phrases import load_phrases
from openwu.embedded import EmbeddedModel
from openwu.evaluation.pictures import middle
from openwu.evaluation.suite import psnr_of
from openwu.lab.embedded import EmbeddedCase, adapt, answers, draw
from openwu.lab.geometry import random_like
from openwu.lab.intervals import Mean, mean_over
from openwu.training.loop import part_of_peak
from openwu.training.loss import falling_floor, picture_loss
from openwu.training.optimizer import StageOptimizer
from openwu.training.recipe import StageConfig
from openwu.training.shared import SharedAdapter
from openwu.types import Adapter, Target

SIDE = 192
"""Side in pixels of the picture that the condition encoder sees in training."""
FIRST_FLOOR = 3e-2
"""Where the floor of the loss starts; see `openwu.training.loss.falling_floor`."""
CELL = 112
"""Side in pixels of a cell of the picture grid."""
Adapt = Callable[[PairBatch, Tensor], Adapter | None]


@dataclass(frozen=True)
class Method:
    """One way to learn all tasks."""

    name: str
    trained: nn.Module
    model: EmbeddedModel
    """Whose base answers: the frozen one, or the copy that `sft` changes."""
    adapt: Adapt
    """The adapters of a training batch, from its instruction tokens."""
    serve: Callable[[Sequence[EmbeddedCase]], Adapter | None]
    """The adapters of test requests."""
    rates: Mapping[str, float]
    """Fields of StageConfig: the peak learning rates at factor 1 of the search."""


class AdapterBank(nn.Module):
    """One LoRA per task: A random, B zero, as LoRA starts."""

    def __init__(self, targets: Sequence[Target], rank: int, tasks: Sequence[str], generator: torch.Generator) -> None:
        super().__init__()
        self.targets, self.tasks = tuple(targets), tuple(tasks)
        shapes = [target.shapes(len(tasks), rank) for target in self.targets]
        self.a = nn.ParameterList(
            nn.Parameter(torch.randn(shape_a, generator=generator) * target.in_dim**-0.5)
            for target, (shape_a, _) in zip(self.targets, shapes, strict=True)
        )
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(shape_b)) for _, shape_b in shapes)

    def of(self, tasks: Sequence[str]) -> Adapter:
        """The adapters of these tasks, one sample each."""
        index = torch.tensor([self.tasks.index(task) for task in tasks])
        weights = {target.name: (self.a[i][index], self.b[i][index]) for i, target in enumerate(self.targets)}
        return Adapter(self.targets, weights, 1.0)


@dataclass(frozen=True)
class Budget:
    """How long, and on what, every method learns."""

    steps: int
    requests: int = 24
    crop: int = 64
    wide_rank: int = 64
    factors: tuple[float, ...] = (1.0,)
    """Learning rates are tried at these multiples for `search_steps` each; what is best on validation is taken."""
    search_steps: int = 0


@dataclass(frozen=True)
class Outcome:
    """One test request under one method."""

    method: str
    seed: int
    task: str
    photograph: str
    old: bool
    """Whether the base was trained on this task: then it is about retention."""
    psnr: float
    ssim: float
    gain: float
    """dB over copying the input"""
    progress: float
    """How far along the line from input to target the answer lies: 1 is there, 0 nothing done."""


@dataclass
class Contest:
    """All that was found."""

    outcomes: list[Outcome] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    """Method, seed, trained parameters, seconds, learning rates and the search behind them."""
    cells: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    """New task -> "input", method or "target" -> `[3, s, s]` of the first photograph and seed."""

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(outcome.method for outcome in self.outcomes))

    def mean(self, method: str, metric: str = "psnr", old: bool = False) -> Mean:
        found = [each for each in self.outcomes if each.method == method and each.old == old]
        return mean_over([getattr(each, metric) for each in found], [each.task for each in found])

    def lead(self, method: str, other: str, old: bool = False) -> Mean:
        """Mean difference in dB between two methods, request by request."""
        ours, theirs = (
            {
                (each.seed, each.task, each.photograph): each.psnr
                for each in self.outcomes
                if each.method == name and each.old == old
            }
            for name in (method, other)
        )
        keys = sorted(ours)
        return mean_over([ours[key] - theirs[key] for key in keys], [key[1] for key in keys])

    def to_json(self) -> dict[str, Any]:
        return {
            "methods": [
                {
                    "method": method,
                    **{
                        f"{name}_{metric}": _plain(self.mean(method, metric, old))
                        for metric in ("psnr", "ssim", "gain", "progress")
                        for name, old in (("new", False), ("old", True))
                        if any(each.old == old for each in self.outcomes)
                    },
                }
                for method in self.methods
            ],
            "costs": self.costs,
            "outcomes": [vars(each) for each in self.outcomes],
        }


def _plain(mean: Mean) -> dict[str, float]:
    return {"value": mean.value, "low": mean.low, "high": mean.high}


def conflict(
    model: EmbeddedModel,
    photographs: tuple[list[Photograph], list[Photograph]],
    test: dict[str, Tensor],
    tasks: Sequence[str],
    old_tasks: Sequence[str],
    budget: Budget,
    seeds: Sequence[int],
) -> Contest:
    """`photographs`: (training, validation). `old_tasks`: what the base learned and no method trains on."""
    found = Contest()
    for seed in seeds:
        cases = [(case, False) for case in draw(test, tasks, seed)]
        cases += [(case, True) for case in draw(test, old_tasks, seed)] if old_tasks else []
        for method in new_methods(model, tasks, budget, seed):
            began = time.monotonic()
            rates, search = _searched(model, method.name, tasks, budget, seed, photographs)
            _fit(method, photographs[0], tasks, budget, budget.steps, rates, seed)
            found.costs.append(
                {
                    "method": method.name,
                    "seed": seed,
                    "parameters": sum(p.numel() for p in method.trained.parameters() if p.requires_grad),
                    "seconds": round(time.monotonic() - began, 1),
                    "rates": dict(rates),
                    "search": search,
                }
            )
            _judge(method, cases, seed, found)
    return found


def new_methods(model: EmbeddedModel, tasks: Sequence[str], budget: Budget, seed: int) -> list[Method]:
    """All methods that something is trained for, untrained; `base`, `retrieval` and `random` come with others."""
    names = ("single", "shared", "shared, wide", "sft", "generated")
    return [new_method(model, name, tasks, budget, seed) for name in names]


def new_method(model: EmbeddedModel, name: str, tasks: Sequence[str], budget: Budget, seed: int) -> Method:
    targets, rank = model.generator.targets, model.generator.config.rank
    random = torch.Generator().manual_seed(seed)
    if name == "single":
        bank = AdapterBank(targets, rank, tasks, random)

        def own(cases: Sequence[EmbeddedCase]) -> Adapter | None:
            known = [case.edit in tasks for case in cases]
            return bank.of([case.edit for case in cases]).detach() if all(known) else None

        return Method(name, bank, model, lambda batch, _: bank.of(batch.names), own, {"learning_rate": 1e-2})
    if name in ("shared", "shared, wide"):
        shared = SharedAdapter(targets, rank if name == "shared" else budget.wide_rank, 1.0, random)
        one = {"learning_rate": 1e-2 if name == "shared" else 3e-3}
        return Method(name, shared, model, lambda *_: shared(), lambda _: shared().detach(), one)
    changed = copied(model)
    if name == "sft":
        rates = {"learning_rate": 5e-4, "matrix_learning_rate": 2e-3}
        return Method(name, changed.backbone.requires_grad_(True), changed, lambda *_: None, lambda _: None, rates)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = EmbeddedModel(model.config)
    fresh.generator.init_weights(1e-2)
    changed.condition.load_state_dict(fresh.condition.state_dict())
    changed.generator.load_state_dict(fresh.generator.state_dict())
    trained = nn.ModuleDict({"condition": changed.condition, "generator": changed.generator}).requires_grad_(True)

    def write(batch: PairBatch, text: Tensor) -> Adapter:
        return changed.adapt(batch.whole, text)

    def generated(cases: Sequence[EmbeddedCase]) -> Adapter:
        return adapt(changed, cases)

    rates = {"learning_rate": 1e-3, "matrix_learning_rate": 3e-3}
    return Method(name, trained, changed, write, generated, rates)


def copied(model: EmbeddedModel) -> EmbeddedModel:
    """The same weights in a model of its own: hooks belong to the module that they were made on."""
    fresh = EmbeddedModel(model.config)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    return fresh.requires_grad_(False)


def _searched(
    model: EmbeddedModel,
    name: str,
    tasks: Sequence[str],
    budget: Budget,
    seed: int,
    photographs: tuple[list[Photograph], list[Photograph]],
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Learning rates for a method: its own times the best factor; and what every factor reached on validation."""
    plain = dict(new_method(model, name, tasks, budget, seed).rates)
    if len(budget.factors) < 2:
        return {key: value * budget.factors[0] for key, value in plain.items()}, []
    tried = []
    for factor in budget.factors:
        method = new_method(model, name, tasks, budget, seed)
        rates = {key: value * factor for key, value in plain.items()}
        _fit(method, photographs[0], tasks, budget, budget.search_steps, rates, seed)
        loss = _validation_loss(method, photographs[1], tasks, budget)
        tried.append({"factor": factor, "validation_loss": loss})
    best = min(tried, key=lambda each: each["validation_loss"])["factor"]
    return {key: value * best for key, value in plain.items()}, tried


def _fit(
    method: Method,
    photographs: list[Photograph],
    tasks: Sequence[str],
    budget: Budget,
    steps: int,
    rates: Mapping[str, float],
    seed: int,
) -> None:
    config = StageConfig(steps=steps, shapes=((budget.requests, budget.crop),), warmup=min(50, steps // 5), **rates)
    optimizer = StageOptimizer(method.trained, config)
    batches = PairSampler(photographs, tuple(tasks), config.shapes, SIDE, seed)
    for step in tqdm(range(steps), desc=f"{method.name}, seed {seed}", unit="step"):
        optimizer.zero_grad()
        torch.autograd.backward(_loss(method, batches.batch(step), falling_floor(FIRST_FLOOR, step / steps)))
        nn.utils.clip_grad_norm_(method.trained.parameters(), config.clip)
        optimizer.step(part_of_peak(config, step))


def _loss(method: Method, batch: PairBatch, floor: float) -> Tensor:
    with torch.no_grad():
        text = method.model.instruction(batch.sentences)
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        edited = method.model.edit(batch.picture, batch.planes, text, method.adapt(batch, text))
    return picture_loss(edited, batch.target, floor)


@torch.no_grad()
def _validation_loss(method: Method, photographs: list[Photograph], tasks: Sequence[str], budget: Budget) -> float:
    """Over two batches of every task, at the floor that a training ends with."""
    batches = PairSampler(photographs, tuple(tasks), ((len(tasks), budget.crop),), SIDE, 99)
    return sum(float(_loss(method, batches.batch(step), falling_floor(FIRST_FLOOR, 1.0))) for step in range(2)) / 2


@torch.inference_mode()
def _judge(method: Method, cases: Sequence[tuple[EmbeddedCase, bool]], seed: int, found: Contest) -> None:
    """The method on all requests, and the untrained methods that come with it."""
    for old in (False, True):
        some = [case for case, its in cases if its == old]
        if not some:
            continue
        served = method.serve(some)
        under = {method.name: served}
        if method.name == "single":
            under |= {"base": None, "retrieval": _retrieved(method, some)}
        if method.name == "generated":
            assert served is not None
            under["random"] = random_like(served, torch.Generator().manual_seed(seed))
        for name, adapter in under.items():
            with torch.autocast("cpu", torch.bfloat16):
                edited = answers(method.model, some, adapter)
            for case, said in zip(some, edited, strict=True):
                found.outcomes.append(_outcome(name, seed, case, old, said))
                _show(found, name, case, said, old)


def _show(found: Contest, method: str, case: EmbeddedCase, edited: Tensor, old: bool) -> None:
    """Keep the first answer to every new task under every method."""
    cells = found.cells.setdefault(case.edit, {}) if not old else {}
    cells.setdefault("input", middle(case.picture, CELL))
    cells.setdefault(method, middle(edited.float(), CELL))
    cells.setdefault("target", middle(case.target, CELL))


def _retrieved(method: Method, cases: Sequence[EmbeddedCase]) -> Adapter:
    """The adapter of the task whose training sentences are nearest, by cosine of mean instruction tokens.

    A memory without a key for "none of these": an old task gets the nearest new one's adapter.
    """
    bank, encoder = method.trained, method.model.instruction
    assert isinstance(bank, AdapterBank)
    sentences = [[text for split in load_phrases()[task].values() for text in split["train"]] for task in bank.tasks]
    keys = torch.stack([encoder(some).flatten(1).mean(0) for some in sentences])
    asked = encoder([case.sentence for case in cases]).flatten(1)
    nearest = (nn.functional.normalize(asked) @ nn.functional.normalize(keys).t()).argmax(1)
    return bank.of([bank.tasks[int(i)] for i in nearest]).detach()


def _outcome(method: str, seed: int, case: EmbeddedCase, old: bool, edited: Tensor) -> Outcome:
    shown = (edited.float().clamp(0, 1) * 255).round() / 255
    wanted, made = (case.target - case.picture).double(), (shown - case.picture).double()
    psnr = psnr_of(edited, case.target)
    ssim = structural_similarity(shown.numpy(), case.target.numpy(), channel_axis=0, data_range=1.0)
    progress = float((made * wanted).sum() / wanted.square().sum().clamp(min=1e-12))
    gain = psnr - psnr_of(case.picture, case.target)
    return Outcome(method, seed, case.edit, case.photograph, old, psnr, float(ssim), gain, progress)
