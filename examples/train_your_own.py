"""Train a generator for a base that is not ours, and audit it: functional memory in two dimensions.

The base is a small flow model whose samples lie on a circle around the origin; it is trained first, then frozen, and
reads nothing but a point and a time. A request says where the circle shall be moved. The generator reads the request
and writes a LoRA adapter for the base; both meet in the flow-matching loss alone.

    python examples/train_your_own.py        # or torchrun --nproc-per-node 2 examples/train_your_own.py
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import openwu
from openwu.config import LayerGroup, PlainTarget
from openwu.evaluation.experiments.probes.audit import Ladder, Subject, audit
from openwu.training.config import StageConfig
from openwu.training.distributed import is_main, process_group_scope
from openwu.training.loop import LoopConfig, train_stage
from openwu.training.objectives import FlowMatching, NoisySample
from openwu.training.stage import GeneratorStage

WIDTH, POINTS = 64, 64
LOOP = LoopConfig(recipe="{}", checkpoint_every=10_000, evaluate_every=10_000, log_every=50)


class Flow(nn.Module):
    """Points `[b, n, 2]` at times `[b]` -> velocities `[b, n, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(WIDTH, WIDTH)}) for _ in range(3))
        self.leave = nn.Linear(WIDTH, 2)

    def forward(self, points: Tensor, time: Tensor) -> Tensor:
        x = self.enter(torch.cat([points, time.view(-1, 1, 1).expand(*points.shape[:2], 1)], dim=-1))
        for layer in self.layers:
            x = x + layer["fc"](nn.functional.silu(x))
        out: Tensor = self.leave(x)
        return out

    @torch.no_grad()
    def sample(self, noise: Tensor, steps: int = 16) -> Tensor:
        """Follow the velocity from noise (time 1) to samples (time 0)."""
        points = noise
        for step in range(steps):
            points = points - self(points, torch.full((len(points),), 1 - step / steps)) / steps
        return points


@dataclass(frozen=True)
class Moves:
    """Requests: where circles shall be moved `[b, 2]`, and points on the moved circles `[b, n, 2]`."""

    to: Tensor
    points: Tensor


def draw(count: int, generator: torch.Generator, far: float = 2.0) -> Moves:
    to = far * (2 * torch.rand(count, 2, generator=generator) - 1)
    angle = 2 * math.pi * torch.rand(count, POINTS, generator=generator)
    return Moves(to, torch.stack([angle.cos(), angle.sin()], dim=-1) + to[:, None])


def batch(step: int) -> Moves:
    return draw(16, torch.Generator().manual_seed(step))


def trained_base(steps: int) -> Flow:
    """The frozen base: circles around the origin."""
    torch.manual_seed(0)
    base, objective = Flow(), FlowMatching()
    optimizer = torch.optim.Adam(base.parameters(), lr=3e-3)
    for step in range(steps):
        sample = objective.sample(draw(16, torch.Generator().manual_seed(step), far=0.0).points, seeded(step))
        optimizer.zero_grad()
        torch.autograd.backward(objective.losses(predict(base, sample), sample).mean())
        optimizer.step()
    return base.requires_grad_(False)


def predict(base: Flow, sample: NoisySample) -> Tensor:
    assert sample.x_t is not None
    assert sample.time is not None
    return base(sample.x_t, sample.time)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_generator() -> openwu.ParameterGenerator:
    """Reads two condition tokens, x and y; writes adapters for the three hidden layers."""
    torch.manual_seed(1)
    group = LayerGroup(prefix="layers.", num_layers=3, targets=(PlainTarget("fc", WIDTH, WIDTH),), name="layers")
    config = openwu.GeneratorConfig(
        rank=4, alpha=4, token_dim=WIDTH, input_dim=4, d_model=64, head_dim=32, dim_accumulation=2, num_pg_layers=1,
        groups=(group,),
    )  # fmt: skip
    return openwu.ParameterGenerator(config, b_init_std=1e-2)


def condition(to: Tensor) -> Tensor:
    """Where to `[b, 2]` -> condition tokens `[b, 2, 4]`: which axis, how far, and a constant."""
    which = torch.eye(2).expand(len(to), 2, 2)
    return torch.cat([which, to[:, :, None], torch.ones(len(to), 2, 1)], dim=-1)


def train(base_steps: int = 600, steps: int = 600, folder: Path | None = None) -> tuple[Ladder, float, float]:
    """The audit, and how far from the wanted place circles lie on average: the base's, and with adapters."""
    base, generator = trained_base(base_steps), new_generator()
    handle = openwu.attach(base, generator.targets)
    stage = GeneratorStage(
        "generator",
        generator,
        handle,
        batch,
        adapt=lambda moves: generator(condition(moves.to)),
        target=lambda moves: moves.points,
        predict=lambda _, sample: predict(base, sample),
        objective=FlowMatching(),
        validation=draw(16, seeded(-1)),
    )
    config = StageConfig(steps=steps, shapes=((16, 0),), learning_rate=3e-3, matrix_learning_rate=3e-3)
    with tempfile.TemporaryDirectory() as scratch:
        train_stage(stage, config, LOOP, folder or Path(scratch))

    def distance(some: Sequence[Tensor], adapter: openwu.Adapter | None) -> list[float]:
        """From the middle of the samples to where they should be."""
        noise = torch.randn(len(some), 256, 2, generator=seeded(7))
        if adapter is None:
            samples = base.sample(noise)
        else:
            with handle.applied(adapter):
                samples = base.sample(noise)
        return (samples.mean(1) - torch.stack(list(some))).norm(dim=1).tolist()

    places = torch.tensor([[1.5, 0.0], [-1.5, 0.0], [0.0, 1.5], [0.0, -1.5]]).repeat(4, 1)
    places = list(places + 0.2 * torch.randn(places.shape, generator=seeded(8)))
    with torch.no_grad():
        subject = Subject(
            name="circles",
            cases=places,
            tasks=["right", "left", "up", "down"] * 4,
            adapt=lambda some: generator(condition(torch.stack(list(some)))),
            score=lambda some, adapter: [-each for each in distance(some, adapter)],
            unit="minus distance",
        )
        ladder = audit(subject)
    return ladder, -ladder.mean("none").value, -ladder.mean("matched").value


if __name__ == "__main__":
    with process_group_scope():
        ladder, alone, adapted = train()
    if is_main():
        sys.stdout.write(f"\nmean distance from the wanted place: base {alone:.2f}, with adapters {adapted:.2f}\n\n")
        sys.stdout.write(ladder.table())
