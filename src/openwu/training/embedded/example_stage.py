"""The stage that learns edits shown by example: the example encoder and the generator's branch that reads it.

Base, instruction encoder, condition encoder and the rest of the generator are frozen, so edits that are asked for in
words stay as they are, bit by bit. The branch writes to the base's full-resolution path alone: what the blocks see is
computed once for each photograph, without gradients, and serves several programs.

Shapes: b requests, c photographs of each, k side of what the base edits, m side of the window that a loss is taken in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.backbones.embedded.condition import SHOWN
from openwu.backbones.embedded.network import pad_mirrored, place_planes, recolour
from openwu.backbones.embedded.shown.solving import pixel_replica, read_view, solvable, solve_head
from openwu.data.examples import ExampleBatch, ExampleSampler, neighbours
from openwu.errors import OpenwuError
from openwu.evaluation.metrics import psnr
from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import Photographs, annealed_floor, picture_losses
from openwu.training.embedded.wordless import learn_wordless
from openwu.training.loop import Evaluation
from openwu.training.micro_batch import FULL_BATCH, MicroBatch, StepBatchCache
from openwu.types import Adapter

WINDOW = 48
"""m, margins included, where a picture is larger."""
VALIDATED = 48
SHEET_ROWS = 8

Adapt = Callable[[ExampleBatch, slice, Tensor], Adapter]
"""The adapters of some requests of a batch, from their instruction tokens `[b, K, text_dim]`."""


def shown_parts(model: EmbeddedModel) -> nn.Module:
    """Return what the stage trains as one module. Raises OpenwuError for a model without examples."""
    if model.condition.example is None or SHOWN not in model.generator.branches:
        raise OpenwuError(
            "examples: expected a model with condition.examples and a generator branch "
            f"{SHOWN!r}, got one without; take both into the recipe's model"
        )
    return nn.ModuleDict({"example": model.condition.example, SHOWN: model.generator.branch(SHOWN)})


def generate_shown(model: EmbeddedModel) -> Adapt:
    """Return the function that writes a batch's adapters by the model's example encoder and branch."""

    def adapt(batch: ExampleBatch, own: slice, text: Tensor) -> Adapter:
        whole = None if batch.whole is None else batch.whole[own]
        condition = model.condition.shown(batch.examples[own].unbind(1), text, whole)
        adapter: Adapter = model.generator.branch(SHOWN)(condition.tokens)
        return adapter

    return adapt


def ensure_wordless(recipe: EmbeddedRecipe, model: EmbeddedModel, photographs: Photographs) -> None:
    """Learn the tokens of no words where there are none yet: the same ones for the same base, seed and photographs."""
    assert model.instruction.wordless is not None  # the config's check
    if not bool(model.instruction.wordless.any()):
        learn_wordless(model, photographs[0], recipe.seed)


def example_stage(recipe: EmbeddedRecipe, model: EmbeddedModel, photographs: Photographs) -> ExampleStage:
    """Build the stage; where no words have no tokens yet, they are learned first."""
    assert recipe.examples is not None
    trained = shown_parts(model)
    ensure_wordless(recipe, model, photographs)
    config = recipe.examples
    drawn = ExampleSampler(
        photographs[0],
        config.shapes,
        recipe.side,
        recipe.seed,
        recipe.photographs_each,
        plain=recipe.plain_examples,
        colours=recipe.colour_examples,
    )
    judged = ExampleSampler(photographs[1], ((VALIDATED, recipe.side),), recipe.side, recipe.seed + 9, series=False)
    return ExampleStage(config, model, trained, generate_shown(model), drawn, judged, recipe.bf16)


class Batches(Protocol):
    """Draws the batch of any step, see `ExampleSampler`."""

    def batch(self, step: int) -> ExampleBatch: ...

    def size(self, step: int) -> int: ...


class ExampleStage:
    """Train what writes adapters of the base's full-resolution path, by picture regression through that path."""

    name = "examples"

    def __init__(
        self,
        config: StageConfig,
        model: EmbeddedModel,
        trained: nn.Module,
        adapt: Adapt,
        batches: Batches,
        validation: Batches | None,
        bf16: bool,
        solved: bool = True,
    ) -> None:
        """`adapt` uses `trained`. Without a `validation` nothing is reported.

        `solved`: the last layer is solved for on the example; False for adapters that no example changes.
        """
        self.config, self.model, self.trained, self.adapt = config, model, trained, adapt
        self.batches, self.validation, self.bf16 = batches, validation, bf16
        self._cache = StepBatchCache(self.batches.batch)
        model.requires_grad_(False)
        trained.requires_grad_(True)
        # The base again, without the model's hooks: adapters of the branch have targets in the last part alone.
        self.base = pixel_replica(model.backbone)
        targets = model.generator.branch(SHOWN).targets
        self.handle = attach(self.base, targets)
        self.solved = solved and solvable(targets)

    @contextmanager
    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        """Compute the micro-batch's share of the step's loss."""
        _, losses = self.losses(step, micro_batch)
        yield losses.mean() * micro_batch.share(self.batches.size(step))

    def not_finite(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> list[str]:
        """Name the requests whose loss is not finite."""
        names, losses = self.losses(step, micro_batch)
        return [name for name, fine in zip(names, losses.isfinite().tolist(), strict=True) if not fine]

    def losses(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> tuple[tuple[str, ...], Tensor]:
        """Draw a micro-batch of a step and compute the loss of each of its requests `[b]`."""
        batch = self._cache.at(step, micro_batch)
        own = range(len(batch.names))[micro_batch.rows(len(batch.names))]
        window = _window(batch, torch.Generator().manual_seed(step))
        edited, target = self.edited(batch, own, window, step)
        floor = annealed_floor(self.config.first_floor, step / self.config.steps)
        margin = self.base.pixels.reach if target.shape[-1] < batch.picture.shape[-1] else 0
        inside = (..., slice(margin, target.shape[-1] - margin), slice(margin, target.shape[-1] - margin))
        losses = picture_losses(edited[inside], target[inside], floor)
        return tuple(batch.names[row] for row in own), losses.view(len(own), -1).mean(1)

    def edited(
        self, batch: ExampleBatch, own: range, window: tuple[slice, slice] | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Pictures and targets `[b c, 3, m, m]` of the requests `own`, one after another; `seed`: of the views."""
        count, size = batch.target.shape[1], len(batch.names)
        pictures = [at for row in own for at in neighbours(row, count, size)]
        used = sorted(set(pictures))
        place = torch.tensor([used.index(at) for at in pictures])
        text = self.model.instruction(batch.sentences)
        shown = slice(own.start, own.stop)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            adapter = self.adapters(batch, shown, text[shown], seed)
            with torch.no_grad():
                x, tokens, grid = self._scene(batch.picture[used], batch.planes[used], text[used])
            cut = (slice(None), slice(None), *(window or (slice(None), slice(None))))
            rows = [row for row in range(len(own)) for _ in range(count)]
            with self.handle.applied(adapter, rows):
                affine = self.base.pixels(x[place][cut], tokens[place], grid, window)
        k = batch.picture.shape[-1]
        edited = recolour(batch.picture[pictures][cut], affine[:, :, :k, :k])
        return edited, batch.target[shown].flatten(0, 1)[cut]

    def adapters(self, batch: ExampleBatch, own: slice, text: Tensor, seed: int = 0) -> Adapter:
        """The adapters of the requests `own`, with the last layer solved for on samples of their examples."""
        written = self.adapt(batch, own, text)
        if not self.solved:
            return written
        pairs, planes = shown_samples(batch, self.base.config.cell, seed)
        views = [read_view(self.base, (pair[own, 0], pair[own, 1]), planes[own], text) for pair in pairs]
        return solve_head(self.base, self.handle.applied, written, views)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Measure programs on photographs kept back: the input, another program's adapter, the right one."""
        if self.validation is None:
            return Evaluation({})
        batch = self.validation.batch(0)
        everyone = range(len(batch.names))
        edited, target = self.edited(batch, everyone)
        # The same answers asked of the program before.
        wrong = self.edited(_turned(batch), everyone)[0]
        means = {
            f"psnr/{name}": float(psnr(picture, target).mean())
            for name, picture in (("example", edited), ("other", wrong), ("input", batch.picture))
        }
        rows = [torch.cat(row, dim=-1) for row in zip(batch.picture, edited.clamp(0, 1), target, strict=True)]
        return Evaluation(means, torch.cat(rows[:SHEET_ROWS], dim=-2).float())

    def _scene(self, picture: Tensor, planes: Tensor, text: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """The network's channels, what the blocks see, and the grid of patches."""
        cell = self.base.config.cell
        x = pad_mirrored(self.base.inputs(picture, planes), -picture.shape[-2] % cell, -picture.shape[-1] % cell)
        return x, *self.base.read_scene(x, text)


def _window(batch: ExampleBatch, draws: torch.Generator) -> tuple[slice, slice] | None:
    """A window at a random place, for less to compute; None where pictures are no larger."""
    room = batch.picture.shape[-1] - WINDOW
    if room <= 0:
        return None
    y, x = torch.randint(room + 1, (2,), generator=draws).tolist()
    return slice(y, y + WINDOW), slice(x, x + WINDOW)


def shown_samples(batch: ExampleBatch, side: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Every n-th pixel of all examples, `side` or a few more: a list of pairs `[b, 2, 3, m, m]`, planes `[b, 3, m, m]`.

    The last layer is solved on them, as an editor does it on a large example.
    """
    draws = torch.Generator().manual_seed(seed)
    whole = batch.examples.shape[-1]
    noise = torch.randn(len(batch.names), 1, whole, whole, generator=draws)
    planes = torch.cat([noise, place_planes(whole, whole).expand(len(noise), -1, -1, -1)], dim=1)
    step = max(1, whole // side)
    y, x = torch.randint(step, (2,), generator=draws).tolist()
    cut = (..., slice(y, None, step), slice(x, None, step))
    return [pair[cut] for pair in batch.examples.unbind(1)], planes[cut]


def _turned(batch: ExampleBatch) -> ExampleBatch:
    """The batch with every request's examples exchanged for those of the one before it."""
    return ExampleBatch(
        batch.names, batch.sentences, batch.examples.roll(1, 0), batch.picture, batch.planes, batch.target, batch.whole
    )
