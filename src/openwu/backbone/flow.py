"""Sampling of flow models whose pipelines take no batches or no sizes: noise enters, latents of a picture leave.

The scheduler, its steps and their shift by the number of tokens are the library's; what is said at each, the caller's.

Shapes: b requests, n tokens of a picture, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openwu.extras import library

Say = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents `[b, n, C]` and time 0..1 `[b]` -> what the denoiser says of them `[b, n, C]`."""


def sample(
    pipeline: Any, noise: Tensor, say: Say, steps: int, done: Callable[[Any, int, Any, dict[str, Any]], Any]
) -> Tensor:
    """Noise `[b, n, C]` -> clean latents, by the pipeline's scheduler. `done` is called after each step."""
    module = library(type(pipeline).__module__)
    scheduler = pipeline.scheduler
    config = scheduler.config
    shift = module.calculate_shift(
        noise.shape[1],
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift, device=noise.device)
    scheduler.set_begin_index(0)
    latents = noise
    for index, step in enumerate(scheduler.timesteps):
        time = step.expand(len(latents)).to(latents.dtype) / 1000
        latents = scheduler.step(say(latents, time), step, latents, return_dict=False)[0]
        done(pipeline, index, step, {})
    return latents


def noise_of(
    size: tuple[int, int, int], seeds: Sequence[torch.Generator], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A map of noise `[b, *size]`, each request's from its own source, as the pipelines draw it."""
    draw = library("diffusers.utils.torch_utils").randn_tensor
    noise: Tensor = draw((len(seeds), *size), generator=list(seeds), device=device, dtype=dtype)
    return noise
