"""Classical operators on pictures `[c, h, w]` in 0..1, from which training pairs are made."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
"""Rec. 601 weights of red, green and blue."""


def colour(x: Tensor, red: float, green: float, blue: float) -> Tensor:
    """`[3, 1, 1]`, to multiply or add to pictures like x."""
    return x.new_tensor((red, green, blue)).view(3, 1, 1)


def luma(x: Tensor) -> Tensor:
    """`[3, h, w]` -> `[1, h, w]`"""
    return (x * colour(x, *LUMA)).sum(0, keepdim=True)


def linear_light(x: Tensor) -> Tensor:
    """Undo the sRGB curve of a picture in 0..1."""
    return torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encoded_light(x: Tensor) -> Tensor:
    """Apply the sRGB curve to linear light, cut to 0..1 as a file cuts it."""
    x = x.clamp(0, 1)
    return torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x.clamp(min=1e-6) ** (1 / 2.4) - 0.055)


def saturation(x: Tensor, factor: float) -> Tensor:
    grey = luma(x)
    return grey + factor * (x - grey)


def mirrored(x: Tensor, rows: int, columns: int) -> Tensor:
    """Pad on every side by mirroring, again and again where the picture is smaller than the padding."""
    height, width = x.shape[-2:]
    return x[:, _mirror(height, rows)][:, :, _mirror(width, columns)]


def _mirror(side: int, padding: int) -> Tensor:
    """Where the pixels of a padded side come from."""
    period = max(1, 2 * (side - 1))
    places = torch.arange(-padding, side + padding) % period
    return torch.minimum(places, period - places)


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur, mirrored at the borders."""
    radius = max(1, round(3 * sigma))
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    padded = mirrored(x, radius, radius)[:, None]
    return F.conv2d(F.conv2d(padded, kernel[..., None, :]), kernel[..., :, None])[:, 0]


def box(x: Tensor, height: int, width: int) -> Tensor:
    """Mean over a rectangle of odd sides, mirrored at the borders."""
    padded = mirrored(x, height // 2, width // 2)
    return F.avg_pool2d(padded[None], (height, width), stride=1)[0]


def widest(x: Tensor, height: int, width: int) -> Tensor:
    """Maximum over a rectangle of odd sides."""
    return F.max_pool2d(x[None], (height, width), stride=1, padding=(height // 2, width // 2))[0]


def edges(x: Tensor) -> Tensor:
    """Length of the gradient (Sobel) of each channel; a step from 0 to 1 has length 1."""
    padded = F.pad(x[:, None], (1, 1, 1, 1), mode="replicate")
    across = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    both = torch.stack([across, across.t()])[:, None]
    return F.conv2d(padded, both).square().sum(1).clamp(min=1e-8).sqrt()


def kuwahara(x: Tensor, radius: int) -> Tensor:
    """Every pixel becomes the mean of the least varied of the four squares that it is a corner of: strokes of paint."""
    side = radius + 1
    grey = luma(x)
    padded = mirrored(torch.cat([x, grey.square(), grey]), radius, radius)
    means = F.avg_pool2d(padded[None], side, stride=1)[0]  # [5, h + radius, w + radius]
    height, width = x.shape[-2:]
    corners = [means[:, i : i + height, j : j + width] for i in (0, radius) for j in (0, radius)]
    stacked = torch.stack(corners)  # [4, 5, h, w]
    varied = stacked[:, 3] - stacked[:, 4].square()
    best = varied.argmin(0)[None, None].expand(1, 3, -1, -1)
    return stacked[:, :3].gather(0, best)[0]


def cells(x: Tensor, side: int) -> Tensor:
    """Every square of a grid that starts at the top left becomes its mean."""
    height, width = x.shape[-2:]
    padded = F.pad(x[None], (0, -width % side, 0, -height % side), mode="replicate")
    means = F.avg_pool2d(padded, side)
    return means.repeat_interleave(side, 2).repeat_interleave(side, 3)[0, :, :height, :width]


def in_cell(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel of x inside its square of the grid, `[h, w]` each."""
    height, width = x.shape[-2:]
    rows, columns = torch.arange(height) % side, torch.arange(width) % side
    return rows[:, None].expand(-1, width), columns[None, :].expand(height, -1)


def jpeg(x: Tensor, quality: int) -> Tensor:
    """There and back through a JPEG file."""
    return _through_a_file(x, "JPEG", quality)


def webp(x: Tensor, quality: int) -> Tensor:
    """There and back through a WebP file."""
    return _through_a_file(x, "WEBP", quality)


def _through_a_file(x: Tensor, kind: str, quality: int) -> Tensor:
    pixels = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=quality)
    with Image.open(file) as decoded:
        return torch.from_numpy(np.array(decoded)).permute(2, 0, 1).to(x) / 255
