"""Shared by the tests of bases: every backbone once per run, pictures, requests, random adapters and edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import tiny_multimodal
import tiny_pipelines
import torch
from PIL import Image

from openwu import attach
from openwu.adapters.experts import ExpertRouting
from openwu.backbones import backbone_class
from openwu.editor.compatibility import generator_config, target_widths
from openwu.generator.model import ParameterGenerator
from openwu.registry import BASES, DEFAULT_BASE
from openwu.training.bases.pipelines import backbone_stage
from openwu.types import Adapter, BaseRequest, SamplingOptions, Target

MULTIMODAL = ("qwen-image-edit", "qwen-image-edit-plus", "longcat-image-edit")
"""Bases whose text encoder reads pictures and whose prompts we encode; they have a test file of their own."""
CAUSAL = ("qwen-image-21",)
"""Bases that read prompt and pictures as a cached prefix; likewise."""
OWN_CODE = ("hunyuan-image-3",)
"""Bases whose folder contains their code; they have a stand-in and tests of their own."""
NAMES = tuple(name for name in BASES if name not in (*MULTIMODAL, *CAUSAL, *OWN_CODE, DEFAULT_BASE))
PIXELS = 64 * 64
FAST = SamplingOptions(steps=2, pixels=PIXELS)


@cache
def backbone(name: str) -> Any:
    """Return the tiny backbone of a registered name; `tiny_pipelines` or `tiny_multimodal` has a function for each."""
    pipelines = tiny_multimodal if name in MULTIMODAL + CAUSAL else tiny_pipelines
    made = backbone_class(name)(getattr(pipelines, name.replace("-", "_"))())  # type: ignore[call-arg]
    made.condition_pixels = made.pixels = PIXELS
    return made


def generator(base: Any, b_init_std: float = 0.3, rank: int = 4) -> ParameterGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = generator_config(
            base, rank=rank, alpha=rank, token_dim=32, d_model=32, head_dim=16, dim_accumulation=2, num_pg_layers=1
        )
        return ParameterGenerator(config, b_init_std=b_init_std)


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Draw a smooth picture, so that resizing matters little."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def requests(count: int = 2) -> list[BaseRequest]:
    texts = ("make it warm", "draw it as an oil painting", "blur")
    return [BaseRequest((picture(i),), texts[i % 3], seed=i) for i in range(count)]


def losses_of_training(base: Any, made: ParameterGenerator, asked: Sequence[BaseRequest], steps: int) -> list[float]:
    """Return the validation loss before and after some steps: one request's target is black, the other's white."""
    batch = base.latent_batch(asked, [torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])
    stage = backbone_stage(base, made, lambda _: batch, validation=batch)
    try:
        losses = [stage.evaluate().scalars["validation"]]
        optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
        for step in range(steps):
            optimizer.zero_grad()
            with stage.loss(step) as loss:
                torch.autograd.backward(loss)
            optimizer.step()
        return [*losses, stage.evaluate().scalars["validation"]]
    finally:
        stage.handle.detach()


def targets_of(base: Any) -> tuple[Target, ...]:
    return tuple(Target(name, *widths) for name, widths in target_widths(base.layer_groups()).items())


def adapter(base: Any, batch: int, size: float = 0.3, rank: int = 2, seed: int = 0) -> Adapter:
    draws = torch.Generator().manual_seed(seed)
    weights = {}
    for target in targets_of(base):
        a, b = target.shapes(batch, rank).values()
        weights[target.name] = (
            torch.randn(a, generator=draws) * target.in_dim**-0.5,
            torch.randn(b, generator=draws) * size,
        )
    return Adapter.from_pairs(targets_of(base), weights, 1.0)


@contextmanager
def nothing(_: Sequence[int]) -> Iterator[None]:
    """Open a scope without adapters."""
    yield


def edited(
    base: Any, asked: Sequence[BaseRequest], weights: Adapter, options: SamplingOptions = FAST
) -> list[torch.Tensor]:
    """Edit requests, each under its own sample of an adapter."""
    routing = None if base.routing is None else ExpertRouting(*base.routing)
    with attach(base.denoiser, weights.targets, routing=routing) as handle:

        def rows(owners: Sequence[int]) -> Any:
            present = sorted({owner for owner in owners if owner >= 0})
            samples = [present.index(owner) if owner >= 0 else -1 for owner in owners]
            return handle.applied(weights.select(present), rows=samples)

        pictures: list[torch.Tensor] = base.generate(asked, options, rows)
        return pictures


def noisy(batch: Any) -> torch.Tensor:
    """Return fixed noise of a latent batch's shape."""
    return torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0))
