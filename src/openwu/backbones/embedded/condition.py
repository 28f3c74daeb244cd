"""The condition encoder of the embedded base: a request's pictures and instruction -> condition tokens.

From whole pictures `[b, 3, h, w]` in 0..1 of any size, instruction tokens `[b, K, text_dim]`, and where a request has
one, its reference picture, it makes a Condition of tokens `[b, L, width]`: the instruction's, and for either picture
its statistics, a thumbnail's patches (what the scene is, its light and palette) and small details at full resolution
(its noise, blur and blocks, which a thumbnail loses).

Shapes: b requests, K instruction tokens, V = 1 + thumbnail patches + details tokens of a picture, L = K + 2 V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.backbones.embedded.features import (
    DIFFERENCES,
    NUM_STATISTICS,
    colour_statistics,
    cut_details,
    detail_energy,
)
from openwu.backbones.embedded.piecewise.pieces import as_unit
from openwu.backbones.embedded.shown import encoder
from openwu.errors import OpenwuError
from openwu.images import Photo
from openwu.images.colour import Pixels
from openwu.kernels.norm import RMSNorm
from openwu.types import Condition

SHOWN = "shown"
"""Branch of the generator that reads examples."""
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
    examples: bool = False
    """Whether pairs before and after are read, for edits that are shown; see `shown/encoder.py`."""

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
        self.example = encoder.ExampleEncoder(config.width) if config.examples else None
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

    def shown(self, pairs: Sequence[Tensor], text: Tensor, pictures: Tensor | None = None) -> Condition:
        """The condition of an edit that is shown by pairs of pictures before and after, `[b, 2, 3, h, w]` each.

        `text` `[b, K, text_dim]`: words, if there are any. `pictures` `[b, 3, h, w]`: the photographs to edit, for an
        adapter of each one's own; None: the adapter serves a whole series.

        The layers that join words and picture stay out of it: they belong to edits that are asked for in words.
        """
        if self.example is None:
            raise OpenwuError("example: expected none, since this model was not trained on examples; say what to do")
        text = text.to(self.from_text.weight.dtype)
        place = self.place.to(text.dtype)
        tokens, summary = self.example(pairs)
        parts = [self.from_text(text) + place[: text.shape[1]], tokens]
        if pictures is not None:
            seen = self.see(pictures)
            parts.append(seen + place[text.shape[1] : text.shape[1] + seen.shape[1]])
        sentence = self.from_sentence(text.flatten(1))[:, None]
        return Condition(torch.cat(parts, dim=1) + sentence + summary, branch=SHOWN)

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
