"""Methods to learn many tasks on one base: the trained parameters, the adapters of requests, and learning rates.

`fit` trains all of them on the same requests in the same order. `conflict.py` compares them; `continual.py` trains some
of them on one group of tasks after another.

Shapes: b requests, t tasks, r LoRA rank, in / out widths of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openwu.data.suite.batches import PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.data.suite.phrases import load_phrases
from openwu.evaluation.cases import Case, encode, generate
from openwu.training.config import StageConfig
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import Adapt, Batches, PictureStage
from openwu.training.loop import train_stage
from openwu.training.optimizers import multiplies_bfloat16
from openwu.training.stage import TrainableLora
from openwu.types import Adapter, Target

SIDE = 192
"""Side in pixels of the picture that the condition encoder sees in training."""
MUON_FIELDS = ("matrix_learning_rate", "stack_learning_rate")
"""Fields of StageConfig that let Muon train."""
FIRST_FLOOR = 3e-2
"""Where the floor of the loss starts; see `openwu.training.embedded.picture_stages.annealed_floor`."""


@dataclass(frozen=True)
class Method:
    """A way to learn all tasks."""

    name: str
    trained: nn.Module
    model: EmbeddedModel
    """The model whose base edits: the frozen one, or the copy that `sft` trains."""
    adapt: Adapt
    """The adapters of a training batch, from its instruction tokens."""
    serve: Callable[[Sequence[Case]], Adapter | None]
    """The adapters of test requests."""
    rates: Mapping[str, float]
    """Fields of StageConfig: the peak learning rates at factor 1 of the search."""
    other_rates: Mapping[str, float] | None = None
    """Those of the other optimiser, as another choice of the search: AdamW's where `rates` are Muon's. None: no
    choice."""

    @property
    def choices(self) -> dict[str, Mapping[str, float]]:
        """The optimisers' rates by name, those of `rates` first."""
        own, other = ("Muon", "AdamW") if set(self.rates) & set(MUON_FIELDS) else ("AdamW", "Muon")
        return {own: self.rates} | ({} if self.other_rates is None else {other: self.other_rates})


class AdapterBank(TrainableLora):
    """One LoRA per task."""

    def __init__(self, targets: Sequence[Target], rank: int, tasks: Sequence[str], generator: torch.Generator) -> None:
        super().__init__(targets, rank, generator, count=len(tasks))
        self.tasks = tuple(tasks)

    def of(self, tasks: Sequence[str]) -> Adapter:
        """Return the adapters of these tasks, one sample each."""
        adapter: Adapter = self([self.tasks.index(task) for task in tasks])
        return adapter


@dataclass(frozen=True)
class Budget:
    """Steps and batches of every method's training."""

    steps: int
    requests: int = 24
    crop: int = 64
    wide_rank: int = 64
    factors: tuple[float, ...] = (1.0,)
    """Learning rates are searched at these multiples for `search_steps` each; the best on validation is taken."""
    search_steps: int = 0
    clock: str = "steps"
    """What is equal for all methods of a comparison: "steps", or "time", the processor seconds of the generator's."""


BANK_RATES = ({"learning_rate": 1e-2}, {"learning_rate": 1e-2, "stack_learning_rate": 1e-2})
"""Rates of one LoRA or a bank of them: AdamW's, then Muon's."""
WIDE_RATES = ({"learning_rate": 3e-3}, {"learning_rate": 3e-3, "stack_learning_rate": 3e-3})
"""The same at a larger rank."""

METHODS = ("single", "shared", "shared, wide", "sft", "generated")
"""Methods that are trained; `base`, `retrieval` and `random` come with others."""


def new_method(model: EmbeddedModel, name: str, tasks: Sequence[str], budget: Budget, seed: int) -> Method:
    """Make one of METHODS, untrained."""
    targets, rank = model.generator.targets, model.generator.config.rank
    random = torch.Generator().manual_seed(seed)
    if name == "single":
        bank = AdapterBank(targets, rank, tasks, random)

        def own(cases: Sequence[Case]) -> Adapter | None:
            known = [case.task in tasks for case in cases]
            return bank.of([case.task for case in cases]).detach() if all(known) else None

        return Method(name, bank, model, lambda batch, _: bank.of(batch.names), own, *BANK_RATES)
    if name in ("shared", "shared, wide"):
        shared = TrainableLora(targets, rank if name == "shared" else budget.wide_rank, random)
        both = BANK_RATES if name == "shared" else WIDE_RATES
        return Method(name, shared, model, lambda *_: shared(), lambda _: shared().detach(), *both)
    changed = model.copy()
    if name == "sft":
        rates = {"learning_rate": 5e-4, "matrix_learning_rate": 2e-3}
        trained = changed.backbone.requires_grad_(True)
        return Method(name, trained, changed, lambda *_: None, lambda _: None, rates, {"learning_rate": 1e-3})
    return generated_on(changed, seed)


def generated_on(model: EmbeddedModel, seed: int) -> Method:
    """Make the method that trains a model's condition encoder and generator, from nothing, through its frozen base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = EmbeddedModel(model.config)
        fresh.generator.init_weights(1e-2)
    model.condition.load_state_dict(fresh.condition.state_dict())
    model.generator.load_state_dict(fresh.generator.state_dict())
    trained = nn.ModuleDict({"condition": model.condition, "generator": model.generator}).requires_grad_(True)

    def adapt(batch: PairBatch, text: Tensor) -> Adapter:
        return model.adapt(batch.whole, text)

    rates = {"learning_rate": 1e-3, "matrix_learning_rate": 3e-3}
    adamw = {"learning_rate": 1e-3}
    return Method("generated", trained, model, adapt, lambda cases: generate(model, cases), rates, adamw)


def fit(
    method: Method,
    batches: Batches,
    budget: Budget,
    steps: int,
    rates: Mapping[str, float],
    label: str,
    penalty: Callable[[int], Tensor] | None = None,
) -> None:
    """Train a method in memory; `label` names the progress bar, `penalty`: see `PictureStage`."""
    config = StageConfig(
        steps=steps,
        shapes=((budget.requests, budget.crop),),
        warmup=min(50, steps // 5),
        first_floor=FIRST_FLOOR,
        **dict[str, Any](rates),
    )
    train_stage(method_stage(method, config, batches, label, penalty), config)


def method_stage(
    method: Method,
    config: StageConfig,
    batches: Batches,
    label: str,
    penalty: Callable[[int], Tensor] | None = None,
) -> PictureStage:
    """Make the stage that trains a method, with whole sentences."""
    return PictureStage(
        label,
        config,
        method.model,
        method.trained,
        method.adapt,
        batches,
        bf16=multiplies_bfloat16(torch.device("cpu")),
        dropped=0.0,
        penalty=penalty,
    )


def precision() -> torch.autocast:
    """Compute in bfloat16 inside, as trainings do, where the processor multiplies matrices in it; float32 elsewhere.

    A processor without such units emulates bfloat16 several times more slowly than it computes in float32.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16(torch.device("cpu")))


def sampler(photographs: list[Photograph], tasks: Sequence[str], budget: Budget, seed: int) -> PairSampler:
    """Make the sampler of a method's training batches."""
    return PairSampler(photographs, tuple(tasks), ((budget.requests, budget.crop),), SIDE, seed)


@torch.no_grad()
def method_loss(method: Method, batch: PairBatch, floor: float) -> float:
    """Return the method's mean loss on a batch."""
    config = StageConfig(steps=1, shapes=((len(batch.names), batch.target.shape[-1]),), learning_rate=1.0)
    stage = method_stage(method, config, PairSampler([], (), config.shapes), method.name)
    return float(stage.losses_of(batch, stage.read(batch), floor).mean())


def retrieved(method: Method, cases: Sequence[Case], known: Sequence[str]) -> Adapter:
    """Choose the adapter of the known task with the nearest training sentences, by cosine of mean instruction tokens.

    A memory without a key for "none of these": an unknown task gets the nearest known one's adapter.
    """
    bank, encoder = method.trained, method.model.instruction
    assert isinstance(bank, AdapterBank)
    sentences = [[text for split in load_phrases()[task].values() for text in split["train"]] for task in known]
    keys = torch.stack([encoder(some).flatten(1).mean(0) for some in sentences])
    asked = encode(method.model, cases).flatten(1)
    nearest = (nn.functional.normalize(asked) @ nn.functional.normalize(keys).t()).argmax(1)
    return bank.of([known[int(i)] for i in nearest]).detach()
