"""How many numbers does an edit on no list need, when a generator writes them? One generator for each operator.

    python examples/generate_operators.py FOLDER [--steps 60] [--seeds 0] [--kinds 0 1 ...] [--part]

Each edit is a random program of one operation on colours, shown by a pair of pictures. The packaged model's base and
its reading of pairs are frozen; a generator of one block is trained from nothing for each kind of adapter, for equal
steps at equal rates on the same programs, and writes to the base's full-resolution path. Scored on programs and
photographs that no training saw. Writes operators-shown.json and .png; finished trainings are kept in FOLDER/trials.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.adapters.inject import attach
from openwu.backbones.embedded.condition import SHOWN
from openwu.backbones.embedded.config import WEIGHTS
from openwu.backbones.embedded.network import TinyEditor, place_planes, recolour
from openwu.data.examples import ExampleBatch, ExampleSampler, neighbours
from openwu.data.programs import COLOUR_FAMILIES, TRAINED_FAMILIES, draw_program
from openwu.data.suite.photographs import Photograph, load_folder, load_test_photographs
from openwu.evaluation.experiments.comparisons.operators import BASE, KINDS, Kind, OperatorResults, Point
from openwu.evaluation.experiments.pictures import draw_operators
from openwu.evaluation.experiments.results import ResultCache, TrialResult, write_findings
from openwu.evaluation.metrics import psnr
from openwu.evaluation.pictures import middle
from openwu.generator.model import ParameterGenerator
from openwu.training.config import StageConfig
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import annealed_floor, picture_losses
from openwu.training.loop import Evaluation, train_stage
from openwu.training.micro_batch import FULL_BATCH, MicroBatch
from openwu.types import Adapter

PACKAGED = "lora, rank 8, as packaged"
"""The model's own branch, after its long training: what is possible."""
SIDE, REQUESTS, WIDTH = 64, 6, 128
PROGRAMS, TEST_SIDE = 24, 128
FIRST_FLOOR = 1e-2
COLOURS = tuple(name for name in TRAINED_FAMILIES if name in COLOUR_FAMILIES)


class Shown:
    """The stage that trains a generator to read the frozen condition of a pair."""

    def __init__(
        self, model: EmbeddedModel, kind: Kind, batches: ExampleSampler, config: StageConfig, seed: int
    ) -> None:
        self.name, self.model, self.batches, self.config = f"{kind.name}, seed {seed}", model, batches, config
        branch = model.config.generator.branches[SHOWN]
        folds = branch.dim_accumulation if kind.rank % branch.dim_accumulation == 0 else 1
        sizes = dataclasses.replace(
            branch, rank=kind.rank, alpha=branch.scale * kind.rank, dim_accumulation=folds, d_model=WIDTH,
            groups=tuple(group.with_operator(kind.operator) for group in branch.groups),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trained = ParameterGenerator(sizes)
            self.trained.init_weights(1e-2)
        self.base = TinyEditor(model.config.backbone)
        self.base.load_state_dict(model.backbone.state_dict())
        self.base.requires_grad_(False)
        self.handle = attach(self.base, self.trained.targets)

    @contextmanager
    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        """Compute the loss of a step; the batch is never cut."""
        assert micro_batch == FULL_BATCH
        yield self.losses(step).mean()

    def not_finite(self, step: int, _micro_batch: MicroBatch = FULL_BATCH) -> list[str]:
        """Say so if the loss of a step is not finite."""
        return [] if bool(self.losses(step).isfinite().all()) else [f"step {step}"]

    def evaluate(self) -> Evaluation:
        """Report nothing: programs are scored at the end."""
        return Evaluation({})

    def losses(self, step: int) -> Tensor:
        """Compute the loss of every picture of a step's batch."""
        batch: ExampleBatch = self.batches.batch(step)
        size, count = len(batch.names), batch.target.shape[1]
        with torch.no_grad():
            text = self.model.instruction([""]).expand(size, -1, -1)
            condition = self.model.condition.shown(batch.examples.unbind(1), text)
        adapter: Adapter = self.trained(condition.tokens)
        pictures = [at for row in range(size) for at in neighbours(row, count, size)]
        rows = [row for row in range(size) for _ in range(count)]
        edited = self.edited(batch.picture[pictures], batch.planes[pictures], adapter, rows)
        floor = annealed_floor(FIRST_FLOOR, step / self.config.steps)
        return picture_losses(edited, batch.target.flatten(0, 1), floor)

    def edited(
        self, pictures: Tensor, planes: Tensor, adapter: Adapter | None, rows: list[int] | None = None
    ) -> Tensor:
        """Edit pictures `[n, 3, k, k]` by the full-resolution path; what the blocks see needs no gradients."""
        with torch.no_grad():
            text = self.model.instruction([""]).expand(len(pictures), -1, -1)
            x = self.base.inputs(pictures, planes)
            tokens, grid = self.base.read_scene(x, text)
        with nullcontext() if adapter is None else self.handle.applied(adapter, rows):
            affine: Tensor = self.base.pixels(x, tokens, grid, None)
        return recolour(pictures, affine)


def scored(stage: Shown, photographs: Mapping[str, Tensor], seed: int, written: str) -> dict[str, float]:
    """PSNR in dB of unseen programs: each shown by one photograph and done on all others.

    `written`: by the stage's generator ("kind"), by the model's own branch ("packaged"), or by nobody ("none").
    """
    names, found = sorted(photographs), {}
    for number in range(PROGRAMS):
        draws = torch.Generator().manual_seed(990_000 + 1000 * seed + number)
        program = draw_program(draws, COLOURS, longest=1)
        noise = {name: torch.randn(1, TEST_SIDE, TEST_SIDE, generator=draws) for name in names}
        first, *others = names[number % len(names) :] + names[: number % len(names)]
        before = photographs[first]
        adapter = None
        if written != "none":
            text = stage.model.instruction([""])
            pair = torch.stack([before, program(before, noise[first])])[None]
            condition = stage.model.condition.shown([pair], text)
            write = stage.trained if written == "kind" else stage.model.generator.branch(SHOWN)
            adapter = write(condition.tokens)
        pictures = torch.stack([photographs[name] for name in others])
        planes = torch.stack([torch.cat([noise[name], place_planes(TEST_SIDE, TEST_SIDE)]) for name in others])
        edited = stage.edited(pictures, planes, adapter)
        target = torch.stack([program(photographs[name], noise[name]) for name in others])
        found[f"{number}: {program.families[0]}"] = float(psnr(edited, target).mean())
    return found


def run(
    model: EmbeddedModel,
    training: list[Photograph],
    test: Mapping[str, Tensor],
    kind: Kind | None,
    name: str,
    steps: int,
    seed: int,
) -> TrialResult:
    """Train a kind and score it; None: score what needs no training, by its name."""
    config = StageConfig(
        steps=steps, shapes=((REQUESTS, SIDE),), learning_rate=1e-3, matrix_learning_rate=3e-3,
        warmup=min(50, steps // 5), first_floor=FIRST_FLOOR,
    )  # fmt: skip
    batches = ExampleSampler(training, config.shapes, TEST_SIDE, seed, plain=steps)
    stage = Shown(model, kind or KINDS[0], batches, config, seed)
    if kind is not None:
        train_stage(stage, config)
    with torch.inference_mode():
        scores = scored(stage, test, seed, "kind" if kind else "packaged" if name == PACKAGED else "none")
    targets = model.generator.branch(SHOWN).targets
    numbers, shared = 0, 0
    if kind is not None:
        numbers = stage.trained.layout.adapter_size
        shared = sum(p.numel() for each, p in stage.trained.named_parameters() if ".shared." in each)
    elif name == PACKAGED:
        numbers = sum(8 * (target.in_dim + target.out_dim) for target in targets)
    sys.stdout.write(f"{name}, seed {seed}: {sum(scores.values()) / len(scores):.2f} dB\n")
    sys.stdout.flush()
    return TrialResult(vars(Point(name, seed, numbers, shared, scores)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=Path, default=Path("photos"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", type=int, nargs="+", default=list(range(len(KINDS))))
    parser.add_argument("--part", action="store_true", help="train only, write no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = EmbeddedModel.from_pretrained(WEIGHTS, dtype=torch.float32).requires_grad_(False)
    training = load_folder(options.photos)
    test = {name: squared(photo) for name, photo in list(load_test_photographs(2 * TEST_SIDE).items())[:4]}
    cache, points = ResultCache(options.folder / "trials"), []
    chosen: Sequence[tuple[str, Kind | None]] = [(BASE, None), (PACKAGED, None)]
    for seed in options.seeds:
        for name, kind in [*chosen, *((KINDS[i].name, KINDS[i]) for i in options.kinds)]:
            trial = partial(run, model, training, test, kind, name, options.steps, seed)
            points.append(Point(**cache.get(f"{name}, {options.steps} steps, seed {seed}", trial).values))
    if not options.part:
        results, path = OperatorResults(points), options.folder / "operators-shown"
        settings = {**vars(options), "folder": None, "photos": None, "programs": PROGRAMS, "crop": SIDE}
        write_findings(path.with_suffix(".json"), settings, results.to_json())
        draw_operators(results, path.with_suffix(".png"))
        sys.stdout.write(results.table())


def squared(photo: Tensor) -> Tensor:
    """The middle of a photograph, at the test's size."""
    square = middle(photo, min(photo.shape[1:]))
    return F.interpolate(square[None], (TEST_SIDE,) * 2, mode="area")[0]


if __name__ == "__main__":
    main()
