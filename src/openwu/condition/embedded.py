"""The embedded condition encoder: one request's picture and instruction -> what the parameter generator reads.

Enters: whole pictures `[b, 3, h, w]` in 0..1 of any size, and instruction tokens `[b, K, text_dim]`. Leaves: a
Condition whose tokens `[b, L, width]` are the instruction's, a thumbnail's patches (what the scene is, its light and
palette) and small details at full resolution (its noise, blur and blocks, which a thumbnail loses).

Shapes: b requests, K instruction tokens, L = K + thumbnail patches + details.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.norm import RMSNorm
from openwu.types import Condition


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
    patch: int = 8
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

    @property
    def num_tokens(self) -> int:
        """L"""
        return self.num_text_tokens + (self.thumbnail // self.patch) ** 2 + self.detail_grid**2


class EmbeddedConditionEncoder(nn.Module):
    """Trained together with the generator, from the downstream loss."""

    def __init__(self, config: EmbeddedConditionConfig) -> None:
        super().__init__()
        self.config = config
        self.from_text = nn.Linear(config.text_dim, config.width)
        self.from_sentence = nn.Linear(config.num_text_tokens * config.text_dim, config.width)
        self.from_patch = nn.Linear(3 * config.patch**2, config.width)
        self.from_detail = nn.Linear(3 * config.detail**2, config.width)
        self.place = nn.Parameter(torch.randn(config.num_tokens, config.width) * 0.1)
        self.layers = nn.ModuleList(JointLayer(config.width, config.heads) for _ in range(config.num_layers))

    def forward(self, pictures: Tensor, text: Tensor) -> Condition:
        """pictures `[b, 3, h, w]`, text `[b, K, text_dim]` -> Condition with tokens `[b, L, width]`"""
        dtype = self.from_patch.weight.dtype
        small, details = self.look(pictures)
        parts = (
            self.from_text(text.to(dtype)),
            self.from_patch(small.to(dtype)),
            self.from_detail(details.to(dtype)),
        )
        # Every token carries the whole instruction. Attention that has not learned where to look yet is an average, and
        # in the average over all tokens the few of the instruction would drown: the generator then ignores it.
        sentence = self.from_sentence(text.to(dtype).flatten(1))[:, None]
        x = torch.cat(parts, dim=1) + sentence
        x = x + self.place.to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return Condition(x)

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures -> thumbnail patches `[b, patches, 3 p p]` and contrast-scaled details `[b, details, 3 k k]`."""
        side, patch, k = self.config.thumbnail, self.config.patch, self.config.detail
        small = F.interpolate(pictures.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)
        patches = F.unfold(4 * (small - 0.5), patch, stride=patch).transpose(1, 2)
        height, width = pictures.shape[-2:]
        if min(height, width) < k:
            pictures = F.interpolate(pictures, (max(height, k), max(width, k)), mode="bilinear", align_corners=False)
            height, width = pictures.shape[-2:]
        tops = torch.linspace(0, height - k, self.config.detail_grid).round().int().tolist()
        lefts = torch.linspace(0, width - k, self.config.detail_grid).round().int().tolist()
        cut = torch.stack([pictures[:, :, t : t + k, left : left + k] for t in tops for left in lefts], dim=1).float()
        # Structure matters here, not brightness: the mean is in the thumbnail already.
        cut = 8 * (cut - cut.mean((-1, -2), keepdim=True))
        return patches, cut.flatten(2)


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
