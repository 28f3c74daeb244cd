"""Gradient conflict between tasks: cosines between their gradients in a shared LoRA, and in the generator.

Mean cosines over contradictory and over all pairs of tasks stand beside those between two gradients of one task: where
even those are unlike, a small cosine between tasks says nothing.

Shapes: t tasks, s independent samples of a task's gradient, n parameters, e seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openwu.data.suite.batches import PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.experiments.geometry import Mean, mean_over
from openwu.evaluation.experiments.methods import NATIVE_BF16, SIDE
from openwu.evaluation.experiments.results import columns
from openwu.training.config import StageConfig
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import PictureStage
from openwu.training.loop import Trainer
from openwu.training.stage import TrainableLora
from openwu.types import Adapter

CROP, REQUESTS = 64, 8
"""Side of the crop that the base edits; requests in a gradient."""
FLOOR = 1e-2
"""Floor of the loss: so high that every request of a task has a say, whatever error it has reached."""
LEARNING_RATE = 1e-2
SAMPLES = 2
"""Independent gradients of a task for each seed."""


@dataclass(frozen=True)
class GradientConflict:
    """Cosines between the tasks' gradients in one set of parameters."""

    where: str
    """Which parameters, when in their training."""
    tasks: tuple[str, ...]
    cosine: Tensor
    """[e, t, t] between different samples of the tasks; on the diagonal, within a task."""
    opposites: tuple[tuple[str, str], ...]
    step: int | None = None
    """Training steps made before; None: parameters that are not followed along a training."""
    told: bool = True
    """Whether the base reads the instruction."""

    @property
    def contradictory(self) -> Mean:
        """The mean cosine over contradictory pairs."""
        index = {task: i for i, task in enumerate(self.tasks)}
        values, pairs = [], []
        for one, other in self.opposites:
            values += self.cosine[:, index[one], index[other]].tolist()
            pairs += [f"{one}/{other}"] * len(self.cosine)
        return mean_over(values, pairs)

    @property
    def all_pairs(self) -> Mean:
        """The mean cosine over all pairs of different tasks."""
        values, groups = [], []
        for i, task in enumerate(self.tasks):
            others = [j for j in range(len(self.tasks)) if j != i]
            values += self.cosine[:, i, others].flatten().tolist()
            groups += [task] * (len(others) * len(self.cosine))
        return mean_over(values, groups)

    @property
    def same_task(self) -> Mean:
        """The mean cosine between independent gradients of one task."""
        own = self.cosine.diagonal(dim1=1, dim2=2)  # [e, t]
        return mean_over(own.t().flatten().tolist(), [task for task in self.tasks for _ in range(len(own))])

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        return {
            "where": self.where,
            "step": self.step,
            "told": self.told,
            "contradictory": self.contradictory.to_json(),
            "all_pairs": self.all_pairs.to_json(),
            "same_task": self.same_task.to_json(),
            "cosine": [[round(float(value), 4) for value in row] for row in self.cosine.mean(0)],
        }


def gradient(module: nn.Module, loss: Callable[[], Tensor], keep: Callable[[str], bool] = lambda _: True) -> Tensor:
    """Return the gradient `[n]` of a loss with respect to a module's parameters whose names `keep` accepts."""
    module.zero_grad(set_to_none=True)
    torch.autograd.backward(loss())
    parts = [
        (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
        for name, p in module.named_parameters()
        if p.requires_grad and keep(name)
    ]
    module.zero_grad(set_to_none=True)
    return torch.cat(parts).float()


def task_cosines(where: str, tasks: Sequence[str], sample: Callable[[str, int], Tensor], samples: int) -> Tensor:
    """Return the cosines `[t, t]` between tasks' gradients.

    sample: (task, s) -> gradient `[n]` of the task on data that no other s sees. samples: at least 2.
    """
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, to compare a task with itself, got {samples}")
    rows = []
    for task in tqdm(tasks, desc=where, unit="task"):
        drawn = [sample(task, s) for s in range(samples)]
        rows.append(torch.stack([each / each.norm().clamp(min=1e-30) for each in drawn]))
    unit = torch.stack(rows)  # [t, s, n]
    flat = unit.flatten(0, 1)
    alike = (flat @ flat.t()).view(len(tasks), samples, len(tasks), samples)
    # A sample is compared with other samples only, between tasks too: equal pictures would make tasks look alike.
    different = ~torch.eye(samples, dtype=torch.bool)
    return alike.permute(0, 2, 1, 3)[:, :, different].mean(-1)


def conflicts_table(found: Sequence[GradientConflict]) -> str:
    """Return the mean cosines of every set of parameters as plain text."""
    rows = [(each.where, str(each.contradictory), str(each.all_pairs), str(each.same_task)) for each in found]
    return columns(("cosine of gradients", "contradictory pairs", "all pairs", "within a task"), rows)


def shared_conflicts(
    model: EmbeddedModel,
    photographs: list[Photograph],
    tasks: Sequence[str],
    opposites: Sequence[tuple[str, str]],
    steps: Sequence[int],
    seeds: Sequence[int],
    base_reads_instruction: bool = True,
) -> list[GradientConflict]:
    """Measure one shared LoRA per seed after each number of training steps (rising, 0 first).

    base_reads_instruction: False leaves the task to the pictures alone, so that the gradients of two opposite sub-tasks
    meet the same activations.
    """
    found: dict[int, list[Tensor]] = {step: [] for step in steps}
    config = StageConfig(
        steps=max(1, *steps),
        shapes=((3 * REQUESTS, CROP),),
        learning_rate=LEARNING_RATE,
        warmup=0,
        schedule="constant",
        weight_decay=0.01,
        clip=1e9,
    )
    for seed in seeds:
        shared = TrainableLora(
            model.generator.targets, model.generator.config.rank, torch.Generator().manual_seed(seed)
        )
        batches = PairSampler(photographs, tuple(tasks), config.shapes, SIDE, seed)
        stage = PictureStage(
            *(f"shared LoRA, seed {seed}", config, model, shared, lambda *_, own=shared: own(), batches),
            bf16=NATIVE_BF16,
            dropped=0.0,
            floor=FLOOR,
            base_reads_instruction=base_reads_instruction,
        )
        trainer = Trainer(stage, config)
        for step in steps:
            trainer.run(step)
            found[step].append(_cosines(f"after {step} steps, seed {seed}", stage, photographs, tasks, seed))
    who = "shared LoRA" if base_reads_instruction else "shared LoRA, base not told,"
    return [
        GradientConflict(
            *(f"{who} after {step} steps", tuple(tasks), torch.stack(each), tuple(opposites)),
            step=step,
            told=base_reads_instruction,
        )
        for step, each in found.items()
    ]


def generator_conflict(
    model: EmbeddedModel,
    photographs: list[Photograph],
    tasks: Sequence[str],
    opposites: Sequence[tuple[str, str]],
    seeds: Sequence[int],
) -> GradientConflict:
    """Measure the trained generator's own parameters: one network for all tasks, whose output differs among them."""
    trained = nn.ModuleList([model.condition, model.generator])

    def adapt(batch: PairBatch, text: Tensor) -> Adapter:
        references = batch.reference if bool(batch.present.any()) else None
        return model.adapt(batch.whole, text, references, batch.present)

    config = StageConfig(steps=1, shapes=((REQUESTS, CROP),), learning_rate=LEARNING_RATE)
    batches = PairSampler(photographs, tuple(tasks), config.shapes, SIDE)
    stage = PictureStage("generator", config, model, trained, adapt, batches, bf16=NATIVE_BF16, dropped=0.0)
    try:
        each = [_cosines(f"generator, seed {seed}", stage, photographs, tasks, seed) for seed in seeds]
    finally:
        model.requires_grad_(False)
    return GradientConflict("generator, trained", tuple(tasks), torch.stack(each), tuple(opposites))


def _cosines(where: str, stage: PictureStage, photographs: list[Photograph], tasks: Sequence[str], seed: int) -> Tensor:
    """Cosines `[t, t]` of a stage's parameters. A sample's pictures are the same for all tasks."""

    def sample(task: str, which: int) -> Tensor:
        batches = PairSampler(photographs, (task,), ((REQUESTS, CROP),), SIDE, 1000 + SAMPLES * seed + which)
        batch = batches.batch(0)
        return gradient(stage.trained, lambda: stage.losses_of(batch, stage.read(batch), FLOOR).mean())

    return task_cosines(where, tasks, sample, SAMPLES)
