"""The condition encoder of the embedded base: a request's pictures and instruction -> condition tokens.

From whole pictures `[b, 3, h, w]` in 0..1 of any size, instruction tokens `[b, K, text_dim]`, and where a request has
one, its reference picture, it makes a Condition of tokens `[b, L, width]`: the instruction's, and for either picture
its statistics, a thumbnail's patches (what the scene is, its light and palette) and small details at full resolution
(its noise, blur and blocks, which a thumbnail loses).

Shapes: b requests, K instruction tokens, V = 1 + thumbnail patches + details tokens of a picture, L = K + 2 V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.backbones.embedded.tiles import as_unit
from openwu.images import Photo
from openwu.images.colour import Pixels
from openwu.kernels.norm import RMSNorm
from openwu.types import Condition

CONDITION_SIDE = 1024
"""Longest side of the picture from which the condition is read; details keep their own resolution below it."""


@dataclass(frozen=True)
class EmbeddedConditionConfig:
    """Sizes of the embedded condition encoder."""

    width: int = 192
    """Width of a condition token; the generator's input_dim."""
    text_dim: int = 128
    """Width of an instruction token."""
    num_text_tokens: int = 8
    """K, the instruction tokens of a request."""
    num_layers: int = 2
    """Number of transformer layers that join picture and instruction."""
    heads: int = 6
    """Attention heads of each layer."""
    thumbnail: int = 64
    """Side of the thumbnail in pixels."""
    patch: int = 16
    """Side of a thumbnail patch in pixels."""
    detail_grid: int = 4
    """Details are taken at the crossings of a grid with so many lines each way."""
    detail: int = 16
    """Side of a detail in pixels."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads={self.heads}, got {self.width}")
        if self.thumbnail % self.patch:
            raise ValueError(f"thumbnail: expected a multiple of patch={self.patch}, got {self.thumbnail}")
        farthest = max(max(steps) for steps in DIFFERENCES)
        if self.detail <= farthest:
            raise ValueError(f"detail: expected more than the {farthest} pixels it is compared over, got {self.detail}")

    @property
    def num_picture_tokens(self) -> int:
        """V"""
        return 1 + (self.thumbnail // self.patch) ** 2 + self.detail_grid**2

    @property
    def num_tokens(self) -> int:
        """L"""
        return self.num_text_tokens + 2 * self.num_picture_tokens


class EmbeddedConditionEncoder(nn.Module):
    """Trained together with the generator, from the downstream loss."""

    def __init__(self, config: EmbeddedConditionConfig) -> None:
        super().__init__()
        self.config = config
        self.from_text = nn.Linear(config.text_dim, config.width)
        self.from_sentence = nn.Linear(config.num_text_tokens * config.text_dim, config.width)
        self.from_patch = nn.Linear(3 * config.patch**2, config.width)
        self.from_detail = nn.Linear(3 * config.detail**2, config.width)
        self.from_energy = nn.Linear(len(DIFFERENCES), config.width)
        self.from_statistics = nn.Linear(NUM_STATISTICS, config.width)
        self.absent = nn.Parameter(torch.randn(config.num_picture_tokens, config.width) * 0.1)
        self.place = nn.Parameter(torch.randn(config.num_tokens, config.width) * 0.1)
        self.layers = nn.ModuleList(JointLayer(config.width, config.heads) for _ in range(config.num_layers))

    def forward(
        self, pictures: Tensor, text: Tensor, references: Tensor | None = None, present: Tensor | None = None
    ) -> Condition:
        """The condition `[b, L, width]` of pictures `[b, 3, h, w]` and text `[b, K, text_dim]`.

        `references` `[b, 3, p, q]` are second pictures; `present` `[b]` bool says which requests have one (None: all).
        """
        dtype = self.from_patch.weight.dtype
        second = self.absent.to(dtype).expand(len(text), -1, -1)
        if references is not None:
            seen = self.see(references)
            second = seen if present is None else torch.where(present[:, None, None], seen, second)
        # Every token carries the whole instruction. Attention that has not learned where to look yet is an average, and
        # in the average over all tokens the few of the instruction would drown: the generator then ignores it.
        sentence = self.from_sentence(text.to(dtype).flatten(1))[:, None]
        x = torch.cat([self.from_text(text.to(dtype)), self.see(pictures), second], dim=1) + sentence
        x = x + self.place.to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return Condition(x)

    def see(self, pictures: Tensor) -> Tensor:
        """Pictures `[b, 3, h, w]` -> `[b, V, width]`"""
        dtype = self.from_patch.weight.dtype
        config = self.config
        small = F.interpolate(
            pictures.float(), (config.thumbnail,) * 2, mode="bilinear", antialias=True, align_corners=False
        )
        patches = F.unfold(4 * (small - 0.5), config.patch, stride=config.patch).transpose(1, 2)
        details = cut_details(pictures, config.detail_grid, config.detail)
        # Structure matters here, not brightness: the mean is in the thumbnail already.
        structure = 8 * (details - details.mean((-1, -2), keepdim=True)).flatten(2)
        parts = (
            self.from_statistics(colour_statistics(small).to(dtype))[:, None],
            self.from_patch(patches.to(dtype)),
            self.from_detail(structure.to(dtype)) + self.from_energy(detail_energy(details).to(dtype)),
        )
        return torch.cat(parts, dim=1)


def condition_view(photo: Photo) -> Tensor:
    """The whole photo `[1, 3, h, w]` in 0..1, its longest side at most about CONDITION_SIDE by skipping pixels.

    Skipping keeps the noise and grain of single pixels, which averaging would remove.
    """
    return as_unit(condition_pixels(photo))[None]


def condition_pixels(photo: Photo) -> Pixels:
    """What the condition is read from, as integers `[h, w, 3]`; see `condition_view`."""
    step = max(1, round(max(photo.pixels.shape[:2]) / CONDITION_SIDE))
    return photo.pixels[::step, ::step]


def cut_details(pictures: Tensor, grid: int, side: int) -> Tensor:
    """Squares at the crossings of a grid: `[b, 3, h, w]` -> `[b, grid * grid, 3, side, side]` float32."""
    height, width = pictures.shape[-2:]
    if min(height, width) < side:
        pictures = F.interpolate(pictures, (max(height, side), max(width, side)), mode="bilinear", align_corners=False)
        height, width = pictures.shape[-2:]
    # Where JPEG's blocks begin is the same in every detail: corners lie on multiples of 8. Whole numbers and indices:
    # sizes may be symbols, while the encoder is exported.
    steps, within = torch.arange(grid, device=pictures.device), torch.arange(side, device=pictures.device)
    rows, columns = (
        ((steps * (length - side) // max(1, grid - 1) // 8 * 8)[:, None] + within).flatten()
        for length in (height, width)
    )
    cut = pictures.index_select(2, rows).index_select(3, columns)
    cut = cut.view(*pictures.shape[:2], grid, side, grid, side)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).float()


QUANTILES = 16
NUM_STATISTICS = 4 * QUANTILES + 3 + 6
"""Quantiles of red, green, blue and luma; means and covariances of the channels."""


def colour_statistics(small: Tensor) -> Tensor:
    """What the colours of thumbnails `[b, 3, s, s]` are, wherever they are: `[b, NUM_STATISTICS]`, of size about 1."""
    colours = small.flatten(2)  # [b, 3, n]
    luma = (colours * colours.new_tensor((0.299, 0.587, 0.114))[:, None]).sum(1, keepdim=True)
    ordered = torch.cat([colours, luma], dim=1).sort(dim=-1).values
    at = torch.linspace(0, ordered.shape[-1] - 1, QUANTILES, device=small.device).round().long()
    mean = colours.mean(-1, keepdim=True)
    covariance = (colours - mean) @ (colours - mean).transpose(1, 2) / colours.shape[-1]
    row, column = torch.triu_indices(3, 3)
    spread = covariance[:, row, column]
    spread = spread.sign() * spread.abs().clamp(min=1e-6).sqrt()
    return torch.cat([4 * (ordered[..., at].flatten(1) - 0.5), 4 * (mean[..., 0] - 0.5), 8 * spread], dim=1)


DIFFERENCES = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 4), (4, 0), (0, 8), (8, 0))
"""Steps down and to the right, in pixels: noise differs at every distance, blur only at larger ones."""


def detail_energy(details: Tensor) -> Tensor:
    """How much details `[b, n, 3, k, k]` vary over each of DIFFERENCES: `[b, n, len(DIFFERENCES)]`, a logarithm."""
    side = details.shape[-1]
    energies = [
        (details[..., down:, right:] - details[..., : side - down, : side - right]).square().mean((-1, -2, -3))
        for down, right in DIFFERENCES
    ]
    return 0.5 * torch.log10(torch.stack(energies, dim=-1) + 1e-6) + 1.5


class JointLayer(nn.Module):
    """Pre-norm self-attention over all tokens of a request, then a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = RMSNorm(width)
        self.fc1 = nn.Linear(width, 3 * width)
        self.fc2 = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        x = x + self.out(mixed)
        out: Tensor = x + self.fc2(F.silu(self.fc1(self.norm2(x))))
        return out
