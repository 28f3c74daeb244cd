"""Requests for edits on no list, each shown by a pair of pictures, and what needs no training before they come.

Everything edits through `FrozenBase`, whose adapters write to the full-resolution path alone.

Shapes: s side of a square picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.adapters.inject import attach
from openwu.backbones.embedded.condition import SHOWN
from openwu.backbones.embedded.network import TinyEditor, place_planes
from openwu.backbones.embedded.shown.encoder import fit, predicted, reduced
from openwu.backbones.embedded.shown.fitting import EmbeddedFit
from openwu.backbones.embedded.shown.solving import read_view, solve_head
from openwu.data.programs import COLOUR_FAMILIES, TRAINED_FAMILIES, Program, draw_program
from openwu.editor.shown.refine import fit_adapter
from openwu.errors import OpenwuError
from openwu.evaluation.cases import Case
from openwu.evaluation.experiments.methods import precision
from openwu.evaluation.metrics import psnr
from openwu.training.config import StageConfig
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.stage import TrainableLora
from openwu.types import Adapter

FIRST_FLOOR = 1e-2
"""Where the floor of the loss starts; see `openwu.training.embedded.picture_stages.annealed_floor`."""
LORA_RATES = {"learning_rate": 1e-2}
"""The learning rate of LoRA factors."""
OPTIMISED_RATE = 3e-2
"""That of Adam for factors that are trained on one example, from nothing or not."""
GENERATED = "generated, packaged"
FIRST_TRY, LONG_TRY = 30, 100
"""Steps of a shorter and a longer training on the example itself."""
RETRIEVAL_SIDE = 48
"""Side of the reduced example by which a program is chosen."""
PERFECT = (24, 240, 2400)
"""Sizes of perfect banks."""
COLOURS = tuple(name for name in TRAINED_FAMILIES if name in COLOUR_FAMILIES)

Edit = Callable[[Case], Tensor]
"""A request -> its picture `[3, s, s]`."""


@dataclass(frozen=True)
class ShownTask:
    """One program, the pair that shows it, and requests for it."""

    name: str
    example: Tensor
    """Before and after `[2, 3, s, s]`."""
    noise: Tensor
    """What the base sees beside the example `[1, s, s]`."""
    cases: tuple[Case, ...]


def draw_tasks(photographs: Mapping[str, Tensor], count: int, seed: int) -> tuple[ShownTask, ...]:
    """Draw programs of colour, each shown by one photograph `[3, s, s]` and asked for on all others."""
    if len(photographs) < 2:
        raise OpenwuError(f"photographs: expected two or more, one of them for the example, got {len(photographs)}")
    names, tasks = sorted(photographs), []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        program = draw_program(generator, COLOURS)
        name, first = f"{number}: {' + '.join(program.families)}", names[number % len(names)]
        noise = {each: torch.randn(1, *photographs[each].shape[1:], generator=generator) for each in names}
        before = photographs[first]
        cases = tuple(
            Case(name, "", (photographs[each],), program(photographs[each], noise[each]), noise[each], each)
            for each in names
            if each != first
        )
        tasks.append(ShownTask(name, torch.stack([before, program(before, noise[first])]), noise[first], cases))
    return tuple(tasks)


class FrozenBase:
    """A copy of the model's base with adapters of the full-resolution path alone."""

    def __init__(self, model: EmbeddedModel) -> None:
        self.model = model
        self.network = TinyEditor(model.config.backbone)
        self.network.load_state_dict(model.backbone.state_dict())
        self.network.requires_grad_(False)
        self.targets = model.generator.branch(SHOWN).targets
        self.handle = attach(self.network, self.targets)
        self.text: Tensor = model.instruction([""]).detach()

    @torch.no_grad()
    def edit(self, picture: Tensor, noise: Tensor, adapter: Adapter | None) -> Tensor:
        """Edit a picture `[3, s, s]` under one adapter, or none."""
        planes = torch.cat([noise, place_planes(*picture.shape[-2:])])
        with nullcontext() if adapter is None else self.handle.applied(adapter):
            edited: Tensor = self.network(picture[None], planes[None], self.text)
        return edited[0]

    def under(self, adapter: Adapter | None) -> Edit:
        """Return the edit of requests under an adapter."""
        return lambda case: self.edit(case.picture, case.noise, adapter)

    def new_lora(self, seed: int, count: int = 1) -> TrainableLora:
        """Make untrained adapters of the generator's rank and targets."""
        rank = self.model.config.generator.rank
        return TrainableLora(self.targets, rank, torch.Generator().manual_seed(seed), count=count)

    @torch.no_grad()
    def generated(self, task: ShownTask) -> Adapter:
        """Write the adapter of a task's example by the model's branch, its last layer solved for on the example."""
        whole = self.model.adapt_shown(task.example[None, None], self.text)
        return replace(
            whole, targets=self.targets, factors={each.name: whole.factors[each.name] for each in self.targets}
        )

    @torch.no_grad()
    def solved(self, task: ShownTask, adapter: Adapter) -> Adapter:
        """Solve for the last layer of any adapter (b = 1) on a task's example."""
        before, after = task.example[:, None]
        planes = torch.cat([task.noise, place_planes(*before.shape[-2:])])[None]
        view = read_view(self.network, (before, after), planes, self.text)
        return solve_head(self.network, self.handle.applied, adapter, [view])


def stage_config(steps: int, requests: int, crop: int, rates: Mapping[str, float]) -> StageConfig:
    """Return the optimisation that all methods share, with rates of their own."""
    shared: dict[str, Any] = {"warmup": min(20, steps // 5), "first_floor": FIRST_FLOOR, **rates}
    return StageConfig(steps=steps, shapes=((requests, crop),), **shared)


def optimised(base: FrozenBase, task: ShownTask, steps: int, start: Adapter | None = None) -> Adapter:
    """Train a LoRA on a task's example alone, from nothing or from an adapter (b = 1), faster than the editor does."""
    before, after = task.example
    names = [target.name for target in base.targets]
    first = base.new_lora(0)().detach() if start is None else start
    with precision():
        fit = EmbeddedFit(base.network, [(before, after, task.noise)], base.text, adapted=names)
        with attach(fit.denoiser, base.targets) as handle:
            return fit_adapter(handle, first, fit, steps, learning_rate=OPTIMISED_RATE)


def nearest(base: FrozenBase, bank: TrainableLora, picture: Tensor, noise: Tensor, target: Tensor) -> Adapter:
    """Choose the bank's adapter under which a picture `[3, s, s]` comes closest to its target."""
    found = [float(psnr(base.edit(picture, noise, bank([i]).detach()), target)) for i in range(len(bank.a[0]))]
    adapter: Adapter = bank([found.index(max(found))]).detach()
    return adapter


def bank_programs(count: int, seed: int) -> tuple[Program, ...]:
    """Draw the programs that a bank knows; a larger bank has those of a smaller one, too."""
    draws = torch.Generator().manual_seed(seed + 77)
    return tuple(draw_program(draws, COLOURS) for _ in range(count))


def retrieved_program(programs: Sequence[Program], task: ShownTask) -> Edit:
    """Choose the program that does the example best: a bank whose entries do their programs without error."""
    before, after = F.interpolate(task.example, (RETRIEVAL_SIDE,) * 2, mode="area")
    noise = torch.zeros(1, RETRIEVAL_SIDE, RETRIEVAL_SIDE)
    errors = [float((program(before, noise) - after).square().mean()) for program in programs]
    best = programs[errors.index(min(errors))]
    return lambda case: best(case.picture, case.noise)


def fitted(task: ShownTask) -> Edit:
    """Fit a cubic polynomial to the colours of the example."""
    before, after = (reduced(each[None, None]) for each in task.example)
    weights = fit(before, after)
    return lambda case: predicted(case.picture[None, None], weights)[0, 0]


def serve_untrained(base: FrozenBase) -> dict[str, Callable[[ShownTask], Edit]]:
    """Return the methods that need no training before the request, or whose training is finished, by name."""
    packaged, programs = base.generated, bank_programs(max(PERFECT), 0)
    untrained = base.new_lora(0)().detach()
    found: dict[str, Callable[[ShownTask], Edit]] = {
        "input": lambda _: lambda case: case.picture,
        "base": lambda _: base.under(None),
        "cubic fit": fitted,
        "untrained, solved": lambda task: base.under(base.solved(task, untrained)),
        GENERATED: lambda task: base.under(packaged(task)),
        **{f"perfect bank of {size}": partial(retrieved_program, programs[:size]) for size in PERFECT},
    }
    return found | {
        f"optimised, {FIRST_TRY} steps": lambda task: base.under(optimised(base, task, FIRST_TRY)),
        f"packaged, then {FIRST_TRY} steps": lambda task: base.under(optimised(base, task, FIRST_TRY, packaged(task))),
        f"optimised, {LONG_TRY} steps": lambda task: base.under(optimised(base, task, LONG_TRY)),
    }
