"""The four stages of the embedded model: what each trains, and the loss of one step.

Enters: a recipe, the model, photographs. Leaves: stages for `loop.train_stage`. The instruction encoder learns to tell
the sub-tasks apart and is then frozen for everyone; the base learns a few sub-tasks and is then frozen; the condition
encoder and the generator learn all sub-tasks end to end through it; a shared adapter learns from batches drawn alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.data.suite.batches import PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.data.suite.phrases import DEGREES, OUT_OF_SCOPE, sample_phrase
from openwu.evaluation.wording import understanding
from openwu.kernels.attention import training_attention
from openwu.training.config import EmbeddedRecipe, PairsRecipe, StageConfig
from openwu.training.embedded.losses import falling_floor, picture_losses, psnr
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.loop import Evaluation
from openwu.training.micro_batch import WHOLE, MicroBatch, StepBatchCache, take_rows
from openwu.training.stage import adapter_scalars
from openwu.types import Adapter, Target


class SharedAdapter(nn.Module):
    """A and B of every target as plain parameters: A random, B zero, as LoRA starts (Hu et al. 2021, section 4.1)."""

    def __init__(self, targets: Sequence[Target], rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.scale = scale
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()
        for target in self.targets:
            shape_a, shape_b = target.shapes(1, rank).values()
            self.a.append(nn.Parameter(torch.randn(shape_a, generator=generator) * target.in_dim**-0.5))
            self.b.append(nn.Parameter(torch.zeros(shape_b)))

    def forward(self) -> Adapter:
        weights = {target.name: (self.a[i], self.b[i]) for i, target in enumerate(self.targets)}
        return Adapter.from_pairs(self.targets, weights, self.scale)


OUT_OF_SCOPE_SHARE = 0.2
"""Share of the instruction encoder's sentences that no sub-task serves."""

STRONG_SHARE = 0.2
"""Share of its sentences with words for "strongly", and again with words for "a little"."""

DROPPED = 0.1
"""Share of the n-grams that the instruction encoder does not see in training: no single one decides, and whoever reads
its tokens meets more than the sentences of the suite."""

DEGREE_WEIGHT = 0.5
"""Weight of the degree in the instruction encoder's loss."""

VALIDATION_BATCHES = 1
VARIANCE_BATCHES = 2
SHEET_ROWS = 8


@dataclass(frozen=True)
class Sentences:
    """b sentences with what they ask for."""

    sentences: list[str]
    rows: Tensor
    """Their rows of the encoder's table `[b, t, g]`, a share of them left out."""
    wanted: Tensor
    """Number of the label of each `[b]`."""
    degrees: Tensor
    """Number of the degree `[b]`."""
    noise: Tensor
    """To be added to the tokens `[b, K, width]`: sentences of one sub-task stay together in a cloud, which is what
    whoever reads the tokens then meets."""


class InstructionStage:
    """Cross entropy over sub-tasks and "out of scope", from sentences alone; typical tokens are learned beside it."""

    name = "instruction"

    def __init__(self, model: EmbeddedModel, seed: int, size: int, dropped: float = DROPPED) -> None:
        """`size`: sentences in a batch. `dropped`: the share of their n-grams that is left out."""
        self.encoder, self.seed, self.size, self.dropped = model.instruction, seed, size, dropped
        self.labels = model.config.instruction.labels

    @property
    def trained(self) -> nn.Module:
        return self.encoder

    def drawn(self, step: int) -> Sentences:
        """The whole batch of a step."""
        generator = torch.Generator().manual_seed(self.seed * 3_000_017 + step)
        wanted = torch.randint(len(self.labels) - 1, (self.size,), generator=generator)
        outside = torch.rand(self.size, generator=generator) < OUT_OF_SCOPE_SHARE
        wanted[outside] = self.labels.index(OUT_OF_SCOPE)
        strong = torch.rand(self.size, generator=generator)
        degrees = torch.where(strong < STRONG_SHARE, 2, torch.where(strong > 1 - STRONG_SHARE, 0, 1))
        names = list(DEGREES)
        sentences = [
            sample_phrase(self.labels[label], generator, degree=names[degree])
            for label, degree in zip(wanted.tolist(), degrees.tolist(), strict=True)
        ]
        rows = self.encoder.table_rows(sentences, dropped=(self.dropped, generator))
        noise = 0.1 * torch.randn(self.size, *self.encoder.query.shape, generator=generator)
        return Sentences(sentences, rows, wanted, degrees, noise)

    @contextmanager
    def loss(self, step: int, part: MicroBatch = WHOLE) -> Iterator[Tensor]:
        drawn = self.drawn(step)
        own = part.rows(self.size)
        wanted, degrees = drawn.wanted[own], drawn.degrees[own]
        tokens = self.encoder.read_rows(drawn.rows[own])
        held = self.held(drawn.sentences[own], tokens, wanted, degrees)
        tokens = tokens + drawn.noise[own]
        edits = F.nll_loss(smoothed(self.encoder.log_probabilities(tokens)), wanted)
        graded = F.nll_loss(smoothed(self.encoder.degree_log_probabilities(tokens)), degrees)
        yield (edits + DEGREE_WEIGHT * graded + held) * part.share(self.size)

    def held(self, _sentences: list[str], tokens: Tensor, wanted: Tensor, degrees: Tensor) -> Tensor:
        """What ties the tokens `[b, K, width]` to something, besides being understood: learns what is typical."""
        return self.encoder.off_centre(tokens, wanted, degrees)

    def not_finite(self, step: int, _part: MicroBatch = WHOLE) -> list[str]:
        return [f"the sentences of step {step}"]

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        return Evaluation({f"held_out/{name}": share for name, share in understanding(self.encoder).items()})


def smoothed(logs: Tensor, amount: float = 0.1) -> Tensor:
    """Log-probabilities that make `nll_loss` the cross entropy with label smoothing."""
    return (1 - amount) * logs + amount * logs.mean(dim=1, keepdim=True)


class Batches(Protocol):
    """Draws the batch of any step, see `PairSampler`."""

    def batch(self, step: int) -> PairBatch: ...

    def size(self, step: int) -> int: ...


class PictureStage:
    """What the stages with pictures share: batches, precision, validation. `adapt` says which adapter a batch gets."""

    def __init__(
        self,
        name: str,
        recipe: EmbeddedRecipe | PairsRecipe,
        model: EmbeddedModel,
        trained: nn.Module,
        adapt: Callable[[PairBatch, Tensor], Adapter] | None,
        batches: tuple[Batches, Batches],
    ) -> None:
        """`batches`: those of training, and those of validation."""
        self.name, self.recipe, self.model, self.adapt = name, recipe, model, adapt
        self._trained = trained
        self.config: StageConfig = getattr(recipe, name)
        self.batches, self.validation = batches
        self._drawn = StepBatchCache(lambda step: self.batches.batch(step))
        model.requires_grad_(False)
        trained.requires_grad_(True)

    @property
    def trained(self) -> nn.Module:
        return self._trained

    @contextmanager
    def loss(self, step: int, part: MicroBatch = WHOLE) -> Iterator[Tensor]:
        _, losses = self.losses(step, part)
        yield losses.mean() * part.share(self.batches.size(step))

    def not_finite(self, step: int, part: MicroBatch = WHOLE) -> list[str]:
        batch, losses = self.losses(step, part)
        finite = losses.isfinite().tolist()
        return [f"{n} ({s!r})" for n, s, fine in zip(batch.names, batch.sentences, finite, strict=True) if not fine]

    def losses(self, step: int, part: MicroBatch = WHOLE) -> tuple[PairBatch, Tensor]:
        """A part of a step's batch and the loss of each of its requests `[b]`."""
        whole = self._drawn.at(step, part)
        # What is left out of sentences is drawn for the whole batch, so that it does not depend on the parts.
        text = self.read(whole, (DROPPED, torch.Generator().manual_seed(self.recipe.seed * 5_000_011 + step)))
        own = part.rows(len(whole.names))
        batch: PairBatch = take_rows(whole, own)
        with training_attention(batch.target.device):
            predicted, _ = self.predict(batch, text[own])
        floor = falling_floor(self.config.first_floor, step / self.config.steps)
        return batch, picture_losses(predicted, batch.target, floor)

    @torch.no_grad()
    def read(self, batch: PairBatch, dropped: tuple[float, torch.Generator] | None = None) -> Tensor:
        """Instruction tokens `[b, K, width]`; `dropped`: see `InstructionEncoder.forward`."""
        text: Tensor = self.model.instruction(batch.sentences, dropped)
        return text

    def predict(self, batch: PairBatch, text: Tensor) -> tuple[Tensor, Adapter | None]:
        """The base's answers and the adapters."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            adapter = None if self.adapt is None else self.adapt(batch, text)
            return self.model.edit(batch.picture, batch.planes, text, adapter), adapter

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        scalars: dict[str, list[float]] = {}
        sheet = []
        for step in range(VALIDATION_BATCHES):
            batch = self.validation.batch(step)
            predicted, _ = self.predict(batch, self.read(batch))
            for name, value in zip(batch.names, psnr(predicted, batch.target).tolist(), strict=True):
                scalars.setdefault(f"psnr/{name}", []).append(value)
            sheet += [
                torch.cat(row, dim=-1) for row in zip(batch.picture, predicted.clamp(0, 1), batch.target, strict=True)
            ]
        means = {name: sum(values) / len(values) for name, values in scalars.items()}
        tasks = [value for name, value in means.items() if name.startswith("psnr/")]
        means["psnr_mean"] = sum(tasks) / len(tasks)
        means |= self._variances()
        return Evaluation(means, torch.cat([row.float() for row in sheet[:SHEET_ROWS]], dim=-2))

    def _variances(self) -> dict[str, float]:
        """How generated updates differ within and across sub-tasks, from two requests or more of each."""
        if self.adapt is None:
            return {}
        batches = [self.validation.batch(step) for step in range(VARIANCE_BATCHES)]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            adapters = [self.adapt(batch, self.read(batch)) for batch in batches]
        if adapters[0].batch == 1:  # One for all: the baseline.
            return {}
        return adapter_scalars(Adapter.stack(adapters), [name for batch in batches for name in batch.names])


def base_stage(
    recipe: EmbeddedRecipe, model: EmbeddedModel, photographs: tuple[list[Photograph], list[Photograph]]
) -> PictureStage:
    """The base alone, on its own few sub-tasks."""
    return PictureStage("base", recipe, model, model.backbone, None, _samplers("base", recipe, photographs))


def generator_stage(
    recipe: EmbeddedRecipe, model: EmbeddedModel, photographs: tuple[list[Photograph], list[Photograph]]
) -> PictureStage:
    """Condition encoder and generator, end to end through the frozen base."""
    return PictureStage("generator", recipe, model, *generated_by(model), _samplers("generator", recipe, photographs))


def generated_by(model: EmbeddedModel) -> tuple[nn.Module, Callable[[PairBatch, Tensor], Adapter]]:
    """What is trained to generate adapters, and how a batch gets them."""

    def adapt(batch: PairBatch, text: Tensor) -> Adapter:
        references = batch.reference if bool(batch.present.any()) else None
        return model.adapt(batch.whole, text, references, batch.present).scaled(batch.dial)

    return nn.ModuleDict({"condition": model.condition, "generator": model.generator}), adapt


def shared_stage(
    recipe: EmbeddedRecipe, model: EmbeddedModel, photographs: tuple[list[Photograph], list[Photograph]]
) -> PictureStage:
    """One adapter for all sub-tasks, through the same frozen base, on batches drawn alike."""
    shared = new_shared_adapter(recipe, model)

    def adapt(_batch: PairBatch, _text: Tensor) -> Adapter:
        adapter: Adapter = shared()
        return adapter

    return PictureStage("shared", recipe, model, shared, adapt, _samplers("shared", recipe, photographs))


def _samplers(
    name: str, recipe: EmbeddedRecipe, photographs: tuple[list[Photograph], list[Photograph]]
) -> tuple[PairSampler, PairSampler]:
    """Batches of training and validation. Only the generator has dials and needless references."""
    tasks = recipe.base_edits if name == "base" else recipe.edits
    # Generator and baseline walk through the same sub-tasks.
    seed, shapes = recipe.seed + (0 if name == "base" else 1), getattr(recipe, name).shapes
    return (
        PairSampler(photographs[0], tasks, shapes, recipe.side, seed, name == "generator"),
        PairSampler(photographs[1], tasks, ((len(tasks), recipe.side),), recipe.side, seed + 9),
    )


def new_shared_adapter(recipe: EmbeddedRecipe, model: EmbeddedModel) -> SharedAdapter:
    """With the generator's rank and targets. Its scale is 1, as usual for a LoRA that is learned itself."""
    generator = torch.Generator().manual_seed(recipe.seed)
    return SharedAdapter(model.generator.targets, recipe.model.generator.rank, 1.0, generator)
