"""The conflict experiment on edits that are on no list: programs of colour, shown by a pair of pictures.

No method has seen the test's programs. All are trained on the same frozen base and full-resolution targets.

- `input`: the photograph as it is; `base`: the base alone, with the tokens of no words.
- `shared`: one LoRA trained over programs. `shared, solved`: one trained so that its last layer is solved for on the
  example when the request comes, as that of generated adapters is; `untrained, solved`: the same of random factors.
- `bank`: one LoRA for each of BANK training programs; the one that does the example best is taken. `best of the bank`:
  the one that does the request best, which nobody can know.
- `perfect bank`: of so many random programs the one that does the example best, itself: no trained entry is better.
- `told`: all of the base's weights, with the example's summary added to its instruction tokens.
- `generated`: example encoder and branch, from nothing; `generated, packaged`: as the given model has them.
- `optimised`: a LoRA trained on the example itself when the request comes (test-time training); `packaged, then`: the
  same from the packaged adapter. `cubic fit`: a polynomial of the example's colours, by least squares.

Shapes: b requests, p pairs of each, c photographs of each, K instruction tokens, s side of a square picture.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openwu.backbones.embedded.network import TinyEditor
from openwu.backbones.embedded.shown.encoder import ExampleEncoder
from openwu.data.examples import ExampleBatch, ExampleSampler, neighbours
from openwu.data.suite.photographs import Photograph
from openwu.errors import OpenwuError
from openwu.evaluation.cases import Case
from openwu.evaluation.experiments.comparisons.conflict import CELL, ConflictResults, outcome
from openwu.evaluation.experiments.comparisons.shown_requests import (
    COLOURS,
    GENERATED,
    LORA_RATES,
    Edit,
    FrozenBase,
    ShownTask,
    bank_programs,
    nearest,
    serve_untrained,
    stage_config,
)
from openwu.evaluation.experiments.methods import NATIVE_BF16, Budget
from openwu.evaluation.experiments.results import UNCACHED, ResultCache, TrialResult, columns
from openwu.evaluation.pictures import middle
from openwu.training.config import StageConfig
from openwu.training.embedded.example_stage import ExampleStage, generate_shown, shown_parts
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import annealed_floor, picture_losses
from openwu.training.loop import Evaluation, Stage, train_stage
from openwu.training.micro_batch import FULL_BATCH, MicroBatch

BANK = 24
"""Programs of the bank."""
SIDE = 96
"""Side s of the examples in training."""
PLAIN_SHARE = 1 / 3
"""Share of a training, at its beginning, whose programs are of one operation; see `ExampleSampler.plain`."""
BEST_OF_BANK = "best of the bank"
"""Added to the name of a bank's method where the request itself chooses."""
RATES: Mapping[str, Mapping[str, float]] = {
    "generated": {"learning_rate": 2e-3, "matrix_learning_rate": 6e-3},
    "shared": LORA_RATES,
    "shared, solved": LORA_RATES,
    "bank": LORA_RATES,
    "told": {"learning_rate": 5e-4, "matrix_learning_rate": 2e-3},
}
"""Methods that are trained before requests come, with their rates: those of the recipes and of the conflict."""


class ShownConflict(ConflictResults):
    """Outcomes of all methods, with the seconds that a request costs before its picture is edited."""

    def table(self) -> str:
        """Return every method, best first, as plain text."""
        costs: dict[str, list[Mapping[str, Any]]] = {}
        for each in self.costs:
            costs.setdefault(each["method"], []).append(each)
        own = next((name for name in (GENERATED, "generated") if name in self.methods), self.methods[0])
        rows = [
            (
                *(method, str(self.mean(method)), str(self.mean(method, "gain"))),
                "" if method == own else str(self.lead(own, method)),
                *_cost(costs[method]),
            )
            for method in sorted(self.methods, key=lambda each: self.mean(each).value, reverse=True)
        ]
        head = ("method", "unseen programs, dB", "over the input", f"{own} minus it")
        return columns((*head, "trained", "steps", "seconds", "seconds a request"), rows)

    def add(self, trial: TrialResult) -> None:
        """Add the results of a trial: one method, or several of one training."""
        for cost in trial.values["costs"]:
            values = {"outcomes": trial.values["outcomes"] if cost is trial.values["costs"][0] else [], "cost": cost}
            super().add(TrialResult(values, trial.tensors))

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        return {"tasks": "examples", **super().to_json()}


def _cost(costs: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, str]:
    """Format a method's trained parameters, steps, training seconds and seconds of a request, means over its trials."""

    def mean(name: str) -> float:
        return sum(float(each[name]) for each in costs) / len(costs)

    seconds = f"{mean('request_seconds'):.2f}" if "request_seconds" in costs[0] else ""
    if "steps" not in costs[0]:
        return "", "", "", seconds
    return f"{costs[0]['parameters']:,}", f"{mean('steps'):.0f}", f"{mean('processor_seconds'):.0f}", seconds


def shown_conflict(
    model: EmbeddedModel,
    photographs: Callable[[], list[Photograph]],
    tasks: Callable[[int], Sequence[ShownTask]],
    budget: Budget,
    seeds: Sequence[int],
    cache: ResultCache = UNCACHED,
    methods: Sequence[str] | None = None,
) -> ShownConflict:
    """Train and measure all methods with every seed at equal steps, the quicker ones at the generator's time as well.

    photographs: reads those of training, if they are needed. tasks: the test's programs of a seed. cache: where results
    of finished trials are found again. methods: only these; None: all. Raises OpenwuError for a model without examples,
    and for unknown methods.
    """
    shown_parts(model)
    known = (*serve_untrained(FrozenBase(model)), *RATES)
    if unknown := sorted(set(methods or ()) - set(known)):
        raise OpenwuError(f"--method: expected some of {list(known)}, got {unknown}")
    chosen = known if methods is None else tuple(name for name in known if name in methods)
    found, read = ShownConflict(), functools.cache(photographs)
    for seed in seeds:
        own, base = tasks(seed), FrozenBase(model)
        serving = {name: serve for name, serve in serve_untrained(base).items() if name in chosen}
        for (name, serve), (number, task) in itertools.product(serving.items(), enumerate(own)):
            # Some of these train for every request: a finished request is not done again.
            run = partial(_measure, {name: serve}, [task], seed)
            found.add(cache.get(f"{name}, seed {seed}, program {number}", run))
        train = partial(_train_and_measure, model, read, own, budget, seed)
        seconds = {}
        for name in (name for name in RATES if name in chosen):
            trial = cache.get(f"{name}, seed {seed}", partial(train, name, name, budget.steps))
            found.add(trial)
            seconds[name] = trial.values["costs"][0]["processor_seconds"]
        for name in seconds:
            if seconds[name] < seconds.get("generated", 0):
                label, steps = f"{name}, equal time", round(budget.steps * seconds["generated"] / seconds[name])
                found.add(cache.get(f"{label}, seed {seed}", partial(train, name, label, steps)))
    return found


def _train_and_measure(
    model: EmbeddedModel,
    photographs: Callable[[], list[Photograph]],
    tasks: Sequence[ShownTask],
    budget: Budget,
    seed: int,
    name: str,
    label: str,
    steps: int,
) -> TrialResult:
    """Train a method of RATES under a label and measure it."""
    config = stage_config(steps, budget.requests, budget.crop, RATES[name])
    stage, serve = trainable(model, name, photographs(), config, seed)
    began = time.process_time()
    train_stage(stage, config)
    cost = {
        "parameters": sum(each.numel() for each in stage.trained.parameters() if each.requires_grad),
        "steps": steps,
        "processor_seconds": round(time.process_time() - began, 3),
        "rates": dict(RATES[name]),
    }
    return _measure({label + more: each for more, each in serve.items()}, tasks, seed, cost)


def _measure(
    methods: Mapping[str, Callable[[ShownTask], Edit]],
    tasks: Sequence[ShownTask],
    seed: int,
    training: Mapping[str, Any] | None = None,
) -> TrialResult:
    """Measure methods (label -> what serves it) of one training, or of none, on all requests."""
    outcomes, costs = [], []
    cells: dict[str, Tensor] = {}
    for label, serve in methods.items():
        seconds = 0.0
        for task in tasks:
            began = time.process_time()
            edit = serve(task)
            seconds += time.process_time() - began
            for case in task.cases:
                output = edit(case).float()
                outcomes.append(vars(outcome(label, seed, case, False, output)))
                for key, picture in (("input", case.picture), (label, output), ("target", case.target)):
                    cells.setdefault(f"{task.name}/{key}", middle(picture, CELL).clamp(0, 1))
        cost = {"method": label, "seed": seed, **(training or {})}
        known = {} if label.endswith(BEST_OF_BANK) else {"request_seconds": round(seconds / len(tasks), 4)}
        costs.append(cost | known)
    return TrialResult({"outcomes": outcomes, "costs": costs}, cells)


def trainable(
    model: EmbeddedModel, name: str, photographs: list[Photograph], config: StageConfig, seed: int
) -> tuple[Stage, dict[str, Callable[[ShownTask], Edit]]]:
    """Return the stage that trains a method of RATES, and what serves requests from what the stage has learned.

    The latter by what is added to the method's name: the bank has two ways.
    """
    programs = bank_programs(BANK, seed) if name == "bank" else ()
    plain = round(PLAIN_SHARE * config.steps)
    batches = ExampleSampler(
        *(photographs, config.shapes, SIDE, seed), families=COLOURS, plain=plain, single_every=0, fixed=programs
    )
    if name == "told":
        told = told_base(model, seed)
        return ToldStage(config, told, batches), {"": told.serve}
    if name == "generated":
        fresh = _fresh(model, seed)
        stage = ExampleStage(config, fresh, shown_parts(fresh), generate_shown(fresh), batches, None, NATIVE_BF16)
        base = FrozenBase(fresh)
        return stage, {"": lambda task: base.under(base.generated(task))}
    base = FrozenBase(model)
    lora = base.new_lora(seed, max(1, len(programs)))

    def adapt(batch: ExampleBatch, own: slice, _text: Tensor) -> Any:
        return lora([int(each) if programs else 0 for each in batch.names[own]])

    solved = name == "shared, solved"
    stage = ExampleStage(config, model, lora, adapt, batches, None, NATIVE_BF16, solved)
    if solved:
        return stage, {"": lambda task: base.under(base.solved(task, lora().detach()))}
    if not programs:
        return stage, {"": lambda _: base.under(lora().detach())}

    def by_example(task: ShownTask) -> Edit:
        return base.under(nearest(base, lora, task.example[0], task.noise, task.example[1]))

    def by_request(_: ShownTask) -> Edit:
        return lambda case: base.under(nearest(base, lora, case.picture, case.noise, case.target))(case)

    return stage, {"": by_example, f", {BEST_OF_BANK}": by_request}


def _fresh(model: EmbeddedModel, seed: int) -> EmbeddedModel:
    """A copy of the model with an untrained example encoder and branch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = EmbeddedModel(model.config)
        untrained.generator.init_weights(1e-2)
    copy = model.copy()
    shown_parts(copy).load_state_dict(shown_parts(untrained).state_dict())
    return copy


class ToldBase(nn.Module):
    """A trainable copy of the base that is told what an example shows by its instruction tokens."""

    def __init__(self, model: EmbeddedModel) -> None:
        super().__init__()
        config = model.config
        self.network = TinyEditor(config.backbone)
        self.network.load_state_dict(model.backbone.state_dict())
        self.example = ExampleEncoder(config.condition.width)
        wordless: Tensor = model.instruction([""]).detach()
        self.register_buffer("wordless", wordless)
        self.project = nn.Linear(config.condition.width, wordless[0].numel())
        # It starts from the base that changes nothing.
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, pairs: Sequence[Tensor]) -> Tensor:
        """Pairs before and after, `[b, 2, 3, h, w]` each -> instruction tokens `[b, K, text_dim]`."""
        _, summary = self.example(pairs)
        wordless = self.get_buffer("wordless")
        told: Tensor = wordless + self.project(summary[:, 0]).view(-1, *wordless.shape[1:])
        return told

    @torch.no_grad()
    def serve(self, task: ShownTask) -> Edit:
        """Read a task's example."""
        text = self([task.example[None]])

        def edit(case: Case) -> Tensor:
            with torch.no_grad():
                edited: Tensor = self.network(case.picture[None], case.planes[None], text)
            found: Tensor = edited[0]
            return found

        return edit


def told_base(model: EmbeddedModel, seed: int) -> ToldBase:
    """Make one whose new parts are drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ToldBase(model)


@dataclass
class ToldStage:
    """Train all weights of a `ToldBase` on whole crops."""

    config: StageConfig
    trained: ToldBase
    batches: ExampleSampler
    name: str = "told"

    @contextmanager
    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        """Compute the micro-batch's share of the step's loss."""
        yield self.losses(step, micro_batch).mean() * micro_batch.share(self.batches.size(step))

    def losses(self, step: int, micro_batch: MicroBatch) -> Tensor:
        """Compute the losses `[b c]` of a part of a step's requests on all of their photographs."""
        batch = self.batches.batch(step)
        count, size = batch.target.shape[1], len(batch.names)
        shown = micro_batch.rows(size)
        own = range(size)[shown]
        pictures = [at for row in own for at in neighbours(row, count, size)]
        with torch.autocast("cpu", torch.bfloat16, enabled=NATIVE_BF16):
            text = self.trained(batch.examples[shown].unbind(1)).repeat_interleave(count, 0)
            edited = self.trained.network(batch.picture[pictures], batch.planes[pictures], text, raw=True)
        floor = annealed_floor(self.config.first_floor, step / self.config.steps)
        return picture_losses(edited, batch.target[shown].flatten(0, 1), floor)

    def not_finite(self, step: int, _micro_batch: MicroBatch = FULL_BATCH) -> list[str]:
        """Name the step: programs are drawn, and none is the user's."""
        return [f"the programs of step {step}"]

    def evaluate(self) -> Evaluation:
        """Return nothing: it is measured when it is trained."""
        return Evaluation({})
