"""Ways to learn many tasks on one base, each with what it trains, how it serves requests, and its learning rates.

Enters: the embedded model, tasks, a budget. Leaves: methods that `fit` trains on the same requests in the same order.
`conflict.py` says what each method is; `continual.py` trains some of them on one group of tasks after another.

Shapes: b requests, t tasks, r LoRA rank, in / out widths of a target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openwu.data.suite.batches import PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.data.suite.phrases import load_phrases
from openwu.evaluation.experiments.embedded import EmbeddedCase, adapt
from openwu.kernels.attention import training_attention
from openwu.training.config import StageConfig
from openwu.training.embedded.losses import falling_floor, picture_loss
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.stages import SharedAdapter
from openwu.training.loop import part_of_peak
from openwu.training.optimizers import StageOptimizer
from openwu.types import Adapter, Target

SIDE = 192
"""Side in pixels of the picture that the condition encoder sees in training."""
UNTOLD = ""
"""What a base reads that is not told what is wanted."""
FIRST_FLOOR = 3e-2
"""Where the floor of the loss starts; see `openwu.training.embedded.losses.falling_floor`."""
Adapt = Callable[[PairBatch, Tensor], Adapter | None]
"""The adapters of a training batch, from its instruction tokens."""


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
        shapes = [tuple(target.shapes(len(tasks), rank).values()) for target in self.targets]
        self.a = nn.ParameterList(
            nn.Parameter(torch.randn(shape_a, generator=generator) * target.in_dim**-0.5)
            for target, (shape_a, _) in zip(self.targets, shapes, strict=True)
        )
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(shape_b)) for _, shape_b in shapes)

    def of(self, tasks: Sequence[str]) -> Adapter:
        """The adapters of these tasks, one sample each."""
        index = torch.tensor([self.tasks.index(task) for task in tasks])
        weights = {target.name: (self.a[i][index], self.b[i][index]) for i, target in enumerate(self.targets)}
        return Adapter.from_pairs(self.targets, weights, 1.0)


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


METHODS = ("single", "shared", "shared, wide", "sft", "generated")
"""Methods that something is trained for; `base`, `retrieval` and `random` come with others."""


def new_method(model: EmbeddedModel, name: str, tasks: Sequence[str], budget: Budget, seed: int) -> Method:
    """One of METHODS, untrained."""
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
    return generated_on(changed, seed)


def generated_on(model: EmbeddedModel, seed: int) -> Method:
    """Condition encoder and generator of a model, from nothing, through its frozen base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = EmbeddedModel(model.config)
        fresh.generator.init_weights(1e-2)
    model.condition.load_state_dict(fresh.condition.state_dict())
    model.generator.load_state_dict(fresh.generator.state_dict())
    trained = nn.ModuleDict({"condition": model.condition, "generator": model.generator}).requires_grad_(True)

    def write(batch: PairBatch, text: Tensor) -> Adapter:
        return model.adapt(batch.whole, text)

    def generated(cases: Sequence[EmbeddedCase]) -> Adapter:
        return adapt(model, cases)

    rates = {"learning_rate": 1e-3, "matrix_learning_rate": 3e-3}
    return Method("generated", trained, model, write, generated, rates)


def copied(model: EmbeddedModel) -> EmbeddedModel:
    """The same weights in a model of its own: hooks belong to the module that they were made on."""
    fresh = EmbeddedModel(model.config)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    return fresh.requires_grad_(False)


def fit(
    method: Method,
    photographs: list[Photograph],
    tasks: Sequence[str],
    budget: Budget,
    steps: int,
    rates: Mapping[str, float],
    seed: int,
) -> None:
    config = StageConfig(
        steps=steps, shapes=((budget.requests, budget.crop),), warmup=min(50, steps // 5), **dict[str, Any](rates)
    )
    optimizer = StageOptimizer(method.trained, config)
    batches = PairSampler(photographs, tuple(tasks), config.shapes, SIDE, seed)
    for step in tqdm(range(steps), desc=f"{method.name}, seed {seed}", unit="step"):
        optimizer.zero_grad()
        torch.autograd.backward(method_loss(method, batches.batch(step), falling_floor(FIRST_FLOOR, step / steps)))
        nn.utils.clip_grad_norm_(method.trained.parameters(), config.clip)
        optimizer.step(part_of_peak(config, step))


def method_loss(method: Method, batch: PairBatch, floor: float) -> Tensor:
    """The method's loss on a batch."""
    return batch_loss(method.model, batch, method.adapt, floor)


def batch_loss(model: EmbeddedModel, batch: PairBatch, adapt: Adapt, floor: float, told: bool = True) -> Tensor:
    """The loss of a batch under the adapters that `adapt` gives it, in the precision of the trainings.

    `told`: whether the base reads the instructions; if not, it reads the same words for every request.
    """
    with torch.no_grad():
        text = model.instruction(batch.sentences)
        read = text if told else model.instruction([UNTOLD]).expand_as(text)
    with training_attention(batch.target.device), torch.autocast("cpu", torch.bfloat16):
        edited = model.edit(batch.picture, batch.planes, read, adapt(batch, text))
    return picture_loss(edited, batch.target, floor)


def retrieved(method: Method, cases: Sequence[EmbeddedCase], known: Sequence[str]) -> Adapter:
    """The adapter of the known task whose training sentences are nearest, by cosine of mean instruction tokens.

    A memory without a key for "none of these": an unknown task gets the nearest known one's adapter.
    """
    bank, encoder = method.trained, method.model.instruction
    assert isinstance(bank, AdapterBank)
    sentences = [[text for split in load_phrases()[task].values() for text in split["train"]] for task in known]
    keys = torch.stack([encoder(some).flatten(1).mean(0) for some in sentences])
    asked = encoder([case.sentence for case in cases]).flatten(1)
    nearest = (nn.functional.normalize(asked) @ nn.functional.normalize(keys).t()).argmax(1)
    return bank.of([known[int(i)] for i in nearest]).detach()
