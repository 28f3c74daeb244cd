"""Gradients of the embedded model's sub-tasks: in one adapter that all share, and in the generator.

Enters: the model, training photographs. Leaves: a `Conflict` for a shared LoRA before its training and along it, for
its parts, and for the generator's own parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openwu.data.suite.batches import PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.experiments.gradients import Conflict, gradient, task_cosines
from openwu.evaluation.experiments.methods import SIDE, Adapt, batch_loss
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.stages import SharedAdapter
from openwu.types import Adapter

CROP, REQUESTS = 64, 8
"""Side of the crop that the base edits; requests in a gradient."""
FLOOR = 1e-2
"""Floor of the loss: so high that every request of a task has a say, whatever error it has reached."""
LEARNING_RATE = 1e-2
SAMPLES = 2
"""Independent gradients of a task for each seed."""


def shared_conflicts(
    model: EmbeddedModel,
    photographs: list[Photograph],
    tasks: Sequence[str],
    opposites: Sequence[tuple[str, str]],
    steps: Sequence[int],
    seeds: Sequence[int],
    told: bool = True,
) -> list[Conflict]:
    """One shared LoRA per seed, looked at after each number of training steps (rising, 0 first).

    `told`: whether the base reads the instructions. If it does not, only the pictures tell it what is wanted, and what
    two opposite sub-tasks ask of one adapter meets the same activations.
    """
    found: dict[int, list[Tensor]] = {step: [] for step in steps}
    model.requires_grad_(False)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        shared = SharedAdapter(model.generator.targets, model.generator.config.rank, 1.0, generator)
        optimizer = torch.optim.AdamW(shared.parameters(), lr=LEARNING_RATE)
        batches = PairSampler(photographs, tuple(tasks), ((3 * REQUESTS, CROP),), SIDE, seed)
        made = 0

        def adapt(_batch: PairBatch, _text: Tensor, own: SharedAdapter = shared) -> Adapter:
            adapter: Adapter = own()
            return adapter

        for step in steps:
            for at in tqdm(range(made, step), desc=f"shared LoRA, seed {seed}", unit="step"):
                optimizer.zero_grad()
                torch.autograd.backward(batch_loss(model, batches.batch(at), adapt, FLOOR, told))
                optimizer.step()
            made = max(made, step)
            found[step].append(_cosines(f"after {step} steps", model, photographs, tasks, shared, adapt, seed, told))
    who = "shared LoRA" if told else "shared LoRA, base not told,"
    return [
        Conflict(f"{who} after {step} steps", tuple(tasks), torch.stack(each), tuple(opposites))
        for step, each in found.items()
    ]


def generator_conflict(
    model: EmbeddedModel,
    photographs: list[Photograph],
    tasks: Sequence[str],
    opposites: Sequence[tuple[str, str]],
    seeds: Sequence[int],
) -> Conflict:
    """The trained generator's own parameters: one network for all tasks, whose output differs from task to task."""
    model.requires_grad_(False)
    trained = nn.ModuleList([model.condition, model.generator]).requires_grad_(True)

    def adapt(batch: PairBatch, text: Tensor) -> Adapter:
        references = batch.reference if bool(batch.present.any()) else None
        return model.adapt(batch.whole, text, references, batch.present)

    try:
        each = [_cosines("generator", model, photographs, tasks, trained, adapt, seed) for seed in seeds]
    finally:
        model.requires_grad_(False)
    return Conflict("generator, trained", tuple(tasks), torch.stack(each), tuple(opposites))


def _cosines(
    where: str,
    model: EmbeddedModel,
    photographs: list[Photograph],
    tasks: Sequence[str],
    trained: nn.Module,
    adapt: Adapt,
    seed: int,
    told: bool = True,
) -> Tensor:
    """Cosines `[t, t]` of one set of parameters. A sample's pictures are the same for all tasks."""

    def sample(task: str, which: int) -> Tensor:
        batches = PairSampler(photographs, (task,), ((REQUESTS, CROP),), SIDE, 1000 + SAMPLES * seed + which)
        return gradient(trained, lambda: batch_loss(model, batches.batch(0), adapt, FLOOR, told))

    return task_cosines(f"{where}, seed {seed}", tasks, sample, SAMPLES)
