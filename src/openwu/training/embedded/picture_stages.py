"""Stages that train the embedded model on pictures: the base, condition encoder with generator, the shared baseline.

The base learns a few sub-tasks and is then frozen; the condition encoder and the generator learn all sub-tasks end to
end through it; the shared adapter learns from batches drawn alike.

Shapes: b requests, K instruction tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from openwu.data.suite.batches import PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.metrics import psnr
from openwu.kernels.attention import training_attention
from openwu.training.config import FIRST_FLOOR, StageConfig
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.instruction_stages import DROPPED
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.loop import Evaluation
from openwu.training.micro_batch import FULL_BATCH, MicroBatch, StepBatchCache, take_rows
from openwu.training.objectives import squared_errors
from openwu.training.stage import TrainableLora, adapter_scalars, size_scalars
from openwu.types import Adapter

FLOOR = FIRST_FLOOR
"""Mean squared error (40 dB) below which a picture's loss hardly falls any more."""
ANNEALED_SHARE = 0.6
"""Share of a training over which the floor is annealed from where it starts to FLOOR."""
VARIANCE_BATCHES = 2
SHEET_ROWS = 8

Adapt = Callable[[PairBatch, Tensor], Adapter | None]
"""The adapters of a batch from its instruction tokens `[b, K, width]`; None: the base alone."""
Photographs = tuple[list[Photograph], list[Photograph]]
"""Those of training, and those of validation."""


class Batches(Protocol):
    """Draws the batch of any step, see `PairSampler`."""

    def batch(self, step: int) -> PairBatch: ...

    def size(self, step: int) -> int: ...


@dataclass
class PictureStage:
    """Train part of the embedded model, or adapters of it, by picture regression through its base."""

    name: str
    config: StageConfig
    model: EmbeddedModel
    trained: nn.Module
    """All other parameters of the model are frozen."""
    adapt: Adapt
    batches: Batches
    validation: Batches | None = None
    """Evaluated on; None: nothing is reported."""
    validated: int = 1
    """Batches of the validation that are evaluated."""
    seed: int = 0
    bf16: bool = True
    """Compute in bfloat16."""
    dropped: float = DROPPED
    """Share of the n-grams that is left out of sentences."""
    floor: float | None = None
    """A constant floor of the loss; None: annealed from the config's `first_floor`."""
    base_reads_instruction: bool = True
    """False: the base reads the same empty instruction for every request; only adapters depend on the words."""
    penalty: Callable[[int], Tensor] | None = None
    """Added to the loss of a step."""

    def __post_init__(self) -> None:
        self._cache = StepBatchCache(lambda step: self.batches.batch(step))
        self.model.requires_grad_(False)
        self.trained.requires_grad_(True)

    @contextmanager
    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        """Compute the micro-batch's share of the step's loss."""
        _, losses = self.losses(step, micro_batch)
        loss = losses.mean()
        if self.penalty is not None:
            loss = loss + self.penalty(step)
        yield loss * micro_batch.share(self.batches.size(step))

    def not_finite(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> list[str]:
        """Name the requests whose loss is not finite by sub-task and sentence."""
        batch, losses = self.losses(step, micro_batch)
        finite = losses.isfinite().tolist()
        return [f"{n} ({s!r})" for n, s, fine in zip(batch.names, batch.sentences, finite, strict=True) if not fine]

    def losses(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> tuple[PairBatch, Tensor]:
        """Draw a micro-batch of a step and compute the loss of each of its requests `[b]`."""
        whole = self._cache.at(step, micro_batch)
        # N-grams are dropped from the whole batch, so that the draws do not depend on the micro-batches.
        draws = torch.Generator().manual_seed(self.seed * 5_000_011 + step)
        text = self.read(whole, (self.dropped, draws) if self.dropped else None)
        own = micro_batch.rows(len(whole.names))
        batch: PairBatch = take_rows(whole, own)
        progress = step / self.config.steps
        floor = annealed_floor(self.config.first_floor, progress) if self.floor is None else self.floor
        return batch, self.losses_of(batch, text[own], floor)

    def losses_of(self, batch: PairBatch, text: Tensor, floor: float) -> Tensor:
        """Compute the loss `[b]` of any batch, given its instruction tokens."""
        with training_attention(batch.target.device):
            prediction = self.predict(batch, text)
        return picture_losses(prediction, batch.target, floor)

    @torch.no_grad()
    def read(self, batch: PairBatch, dropped: tuple[float, torch.Generator] | None = None) -> Tensor:
        """Encode the instructions `[b, K, width]`; `dropped`: see `InstructionEncoder.forward`."""
        text: Tensor = self.model.instruction(batch.sentences, dropped)
        return text

    def predict(self, batch: PairBatch, text: Tensor) -> Tensor:
        """Return the base's pictures `[b, 3, k, k]` under the batch's adapters."""
        read = text
        if not self.base_reads_instruction:
            with torch.no_grad():
                read = self.model.instruction([""]).expand_as(text)
        with self._precision():
            return self.model.edit(batch.picture, batch.planes, read, self.adapt(batch, text), raw=True)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Measure the PSNR of every sub-task, how much adapters differ and how large they are; draw a contact sheet.

        Warns where updates outweigh the weights.
        """
        if self.validation is None:
            return Evaluation({})
        scalars: dict[str, list[float]] = {}
        sheet = []
        for step in range(self.validated):
            batch = self.validation.batch(step)
            prediction = self.predict(batch, self.read(batch))
            for name, value in zip(batch.names, psnr(prediction, batch.target).tolist(), strict=True):
                scalars.setdefault(f"psnr/{name}", []).append(value)
            shown = zip(batch.picture, prediction.clamp(0, 1), batch.target, strict=True)
            sheet += [torch.cat(row, dim=-1) for row in shown]
        means = {name: sum(values) / len(values) for name, values in scalars.items()}
        means["psnr_mean"] = sum(means.values()) / len(means)
        means |= self._adapters(self.validation)
        return Evaluation(means, torch.cat([row.float() for row in sheet[:SHEET_ROWS]], dim=-2))

    def _adapters(self, validation: Batches) -> dict[str, float]:
        """The size of updates relative to the weights, and how generated adapters differ within and across sub-tasks,
        from two requests or more of each.
        """
        batches = [validation.batch(step) for step in range(VARIANCE_BATCHES)]
        with self._precision():
            found = [self.adapt(batch, self.read(batch)) for batch in batches]
        adapters = [adapter for adapter in found if adapter is not None]
        if not adapters:  # The base alone.
            return {}
        stacked = Adapter.stack(adapters)
        scalars = size_scalars(stacked, self.model.handle.sites)
        if adapters[0].batch == 1:  # One adapter for all requests.
            return scalars
        return scalars | adapter_scalars(stacked, [name for batch in batches for name in batch.names])

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


def base_stage(recipe: EmbeddedRecipe, model: EmbeddedModel, photographs: Photographs) -> PictureStage:
    """Train the base alone, on its own few sub-tasks."""
    return _stage("base", recipe, model, photographs, model.backbone, lambda *_: None)


def generator_stage(recipe: EmbeddedRecipe, model: EmbeddedModel, photographs: Photographs) -> PictureStage:
    """Train condition encoder and generator, end to end through the frozen base."""
    return _stage("generator", recipe, model, photographs, *generator_of(model))


def shared_stage(recipe: EmbeddedRecipe, model: EmbeddedModel, photographs: Photographs) -> PictureStage:
    """Train one adapter for all sub-tasks, through the same frozen base, on batches drawn alike."""
    shared = new_shared_lora(recipe, model)
    return _stage("shared", recipe, model, photographs, shared, lambda *_: shared())


def generator_of(model: EmbeddedModel) -> tuple[nn.Module, Adapt]:
    """Return condition encoder and generator as one module, and the function that gives a batch its adapters."""

    def adapt(batch: PairBatch, text: Tensor) -> Adapter:
        references = batch.reference if bool(batch.present.any()) else None
        return model.adapt(batch.whole, text, references, batch.present).scaled(batch.dial)

    return nn.ModuleDict({"condition": model.condition, "generator": model.generator}), adapt


def new_shared_lora(recipe: EmbeddedRecipe, model: EmbeddedModel) -> TrainableLora:
    """Return an untrained LoRA with the generator's rank and targets; its scale is 1, as usual for a trained LoRA."""
    draws = torch.Generator().manual_seed(recipe.seed)
    return TrainableLora(model.generator.targets, recipe.model.generator.rank, draws)


def _stage(
    name: str,
    recipe: EmbeddedRecipe,
    model: EmbeddedModel,
    photographs: Photographs,
    trained: nn.Module,
    adapt: Adapt,
) -> PictureStage:
    """Only the generator's batches have strengths by the adapter's scale and needless references."""
    tasks = recipe.base_edits if name == "base" else recipe.edits
    # Generator and baseline walk through the same sub-tasks.
    seed, config = recipe.seed + (0 if name == "base" else 1), getattr(recipe, name)
    dialled = name == "generator"
    batches = PairSampler(
        *(photographs[0], tasks, config.shapes, recipe.side, seed, dialled),
        smooth=recipe.smooth,
        cameras=recipe.cameras,
    )
    validation = PairSampler(photographs[1], tasks, ((len(tasks), recipe.side),), recipe.side, seed + 9)
    return PictureStage(name, config, model, trained, adapt, batches, validation, seed=recipe.seed, bf16=recipe.bf16)


def picture_losses(prediction: Tensor, target: Tensor, floor: float = FLOOR) -> Tensor:
    """Return log(mse + floor) of every picture `[b]`: minus its PSNR up to a factor, soft below the floor.

    Sub-tasks differ a hundredfold in the error that can be reached (a tone curve against a restoration). The logarithm
    weighs a relative improvement of each of them alike. A high floor makes it nearly linear: then what is worst counts
    most.
    """
    return (squared_errors(prediction, target) + floor).log()


def annealed_floor(first: float, progress: float) -> float:
    """Return the floor at this progress (0 to 1) of a training: from `first` to FLOOR geometrically, then constant.

    With a low floor from the beginning, sub-tasks that the base does already hold an adapter near nothing: their
    gradients are the largest, and the sub-tasks that are furthest off hardly move.
    """
    remaining = max(0.0, 1 - progress / ANNEALED_SHARE)
    return float(FLOOR * (first / FLOOR) ** remaining)
