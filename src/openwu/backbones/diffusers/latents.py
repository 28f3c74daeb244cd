"""Pictures and maps of latents: PIL pictures become tensors of sizes that a base works on, maps become rows of tokens.

Shapes: b requests, h and w the sides of a picture or map, C channels, l tokens of one row, L the most in a batch.
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


SHORTEST = 64
"""Sides that the bases work on are never shorter, in pixels."""

PLACE = 3
"""What a picture's token knows of itself beside its latents: the picture's number, and its height and width in it."""


def token_rows(latents: Tensor) -> Tensor:
    """A map `[b, C, h, w]` -> its tokens `[b, h * w, C]`, row by row."""
    return latents.flatten(2).transpose(1, 2)


def patches(latents: Tensor, size: int = 2) -> Tensor:
    """A map `[b, C, h, w]` -> `[b, C * size^2, h / size, w / size]`, every channel's patch side by side."""
    return nn.functional.pixel_unshuffle(latents, size)


def place_of(latents: Tensor, number: int) -> Tensor:
    """`[h' * w', PLACE]` for a map `[1, C, h', w']`: the picture's number, and height and width from -1 to 1."""
    height, width = latents.shape[2:]
    y = torch.linspace(-1, 1, height).view(-1, 1).expand(height, width)
    x = torch.linspace(-1, 1, width).view(1, -1).expand(height, width)
    which = torch.full_like(y, float(number))
    return torch.stack([which, y, x], dim=-1).flatten(0, 1).to(latents)


def padded(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows `[l, width]` of different lengths -> `[b, L, width]` with zeros behind, and the mask `[b, L]`."""
    longest = max(len(row) for row in tokens)
    full = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in tokens])
    lengths = torch.tensor([len(row) for row in tokens], device=full.device)
    return full, torch.arange(longest, device=full.device) < lengths[:, None]


def working_size(width: int, height: int, pixels: int, multiple: int) -> tuple[int, int]:
    """Width and height of about `pixels` in all, never more, in the same proportion, both multiples of `multiple`.

    At least SHORTEST a side, which may exceed `pixels` for a long and narrow picture.
    """
    scale, least = math.sqrt(pixels / (width * height)), math.ceil(SHORTEST / multiple)
    sides = [max(least, math.floor(side * scale / multiple + 1e-6)) * multiple for side in (width, height)]
    return sides[0], sides[1]


def resized(picture: Image.Image, pixels: int, multiple: int, longest: int = 8) -> Image.Image:
    """The picture at its working size. Raises PictureError for sides more than `longest` to one."""
    width, height = picture.size
    if max(width, height) > longest * min(width, height):
        raise PictureError(
            f"picture: expected sides of at most {longest} to 1 for a large base, got {width} x {height}"
        )
    size = working_size(width, height, pixels, multiple)
    picture = picture.convert("RGB")
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def picture_digest(pictures: Sequence[Image.Image]) -> object:
    """Equal for the very same pictures in the same order."""
    return tuple(picture.size for picture in pictures), of_bytes(picture.tobytes() for picture in pictures).digest()


def as_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture -> `[3, h, w]` in 0..1."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)
