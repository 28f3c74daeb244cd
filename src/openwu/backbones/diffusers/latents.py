"""Convert pictures to tensors and latent maps to tokens, and sample latents with a pipeline's scheduler.

Shapes: b requests, h and w the sides of a picture or map, C channels, n tokens of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from openwu.errors import PictureError
from openwu.extras import library
from openwu.files.hashing import of_bytes

StepCallback = Callable[[Any, int, Any, dict[str, Any]], Any]
"""diffusers' `callback_on_step_end`: pipeline, step, timestep, tensors -> tensors."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents `[b, n, C]` and time 0..1 `[b]` -> predicted velocity `[b, n, C]`."""

MIN_SIDE = 64
"""Shortest side of a picture that a base is given, in pixels."""

COORDINATES = 3
"""Channels that `coordinates` adds to a picture token in a condition."""


def sample(
    pipeline: Any,
    noise: Tensor,
    velocity: Velocity,
    steps: int,
    step_done: StepCallback,
) -> Tensor:
    """Denoise `[b, n, C]` with the pipeline's flow-matching scheduler; `step_done` is called after each step."""
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
    for index, timestep in enumerate(scheduler.timesteps):
        time = timestep.expand(len(latents)).to(latents.dtype) / 1000
        latents = scheduler.step(velocity(latents, time), timestep, latents, return_dict=False)[0]
        step_done(pipeline, index, timestep, {})
    return latents


def draw_noise(
    size: tuple[int, int, int], generators: Sequence[torch.Generator], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Draw noise `[b, *size]`, each request's from its own generator, as the pipelines draw it."""
    draw = library("diffusers.utils.torch_utils").randn_tensor
    noise: Tensor = draw((len(generators), *size), generator=list(generators), device=device, dtype=dtype)
    return noise


def token_rows(latents: Tensor) -> Tensor:
    """Flatten a map `[b, C, h, w]` to tokens `[b, h * w, C]`, row by row."""
    return latents.flatten(2).transpose(1, 2)


def patches(latents: Tensor, size: int = 2) -> Tensor:
    """Fold patches of a map `[b, C, h, w]` into channels: `[b, C * size^2, h / size, w / size]`."""
    return nn.functional.pixel_unshuffle(latents, size)


def coordinates(latents: Tensor, number: int) -> Tensor:
    """Return `[h * w, COORDINATES]` for a map `[1, C, h, w]`: the picture's number, and row and column from -1 to 1."""
    height, width = latents.shape[2:]
    y = torch.linspace(-1, 1, height).view(-1, 1).expand(height, width)
    x = torch.linspace(-1, 1, width).view(1, -1).expand(height, width)
    which = torch.full_like(y, float(number))
    return torch.stack([which, y, x], dim=-1).flatten(0, 1).to(latents)


def rotary_ids(shape: Sequence[int], number: int, start: int = 0) -> Tensor:
    """Return rotary position ids `[h * w, 3]` of a map of `shape` (h, w): `number`, row and column from `start`."""
    y, x = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    return torch.stack([torch.full_like(y, number), y + start, x + start], dim=-1).flatten(0, 1)


def working_size(width: int, height: int, pixels: int, multiple: int) -> tuple[int, int]:
    """Return width and height of at most `pixels` in the same proportion, both multiples of `multiple`.

    Sides are at least MIN_SIDE, so a long and narrow picture may exceed `pixels`.
    """
    scale, least = math.sqrt(pixels / (width * height)), math.ceil(MIN_SIDE / multiple)
    sides = [max(least, math.floor(side * scale / multiple + 1e-6)) * multiple for side in (width, height)]
    return sides[0], sides[1]


def resized(picture: Image.Image, pixels: int, multiple: int, max_ratio: int = 8) -> Image.Image:
    """Resize a picture to its working size. Raises PictureError if one side is over `max_ratio` times the other."""
    width, height = picture.size
    if max(width, height) > max_ratio * min(width, height):
        raise PictureError(
            f"picture: expected sides of at most {max_ratio} to 1 for a large base, got {width} x {height}"
        )
    size = working_size(width, height, pixels, multiple)
    picture = picture.convert("RGB")
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def picture_digest(pictures: Sequence[Image.Image]) -> object:
    """Return a key that is equal for the same pictures in the same order."""
    return tuple(picture.size for picture in pictures), of_bytes(picture.tobytes() for picture in pictures).digest()


def as_tensor(picture: Image.Image) -> Tensor:
    """Convert an RGB picture to `[3, h, w]` in 0..1."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)
