"""The network of the embedded base: a small, instruction-conditioned editor of pictures `[b, 3, h, w]` in 0..1.

It also reads three planes `[b, 3, h, w]` (noise, the only source of randomness, and every pixel's y and x in the whole
picture) and the instruction's tokens `[b, K, text_dim]`.

A stack of identical blocks on 8 x 8 pixel patches reads the scene and the instruction; a shallow convolutional path at
full resolution keeps the pixels and ends in an affine map of every pixel's colour; what the patches leave as a grid in
smooth areas is taken out (`pattern.py`). Almost all of the work is dense products, which is what two CPU cores do well.

Shapes: b pictures, n patches, d width, K instruction tokens, w windows, s patches in a window, c pixel channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.backbones.embedded.pattern import without_pattern
from openwu.kernels.norm import RMSNorm

ROWS_AT_ONCE = 128


def noise_plane(width: int, height: int, seed: int) -> Tensor:
    """Standard normal `[1, h, w]` in float16, the same for one seed and size."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.empty(1, height, width, dtype=torch.float16)
    for top in range(0, height, ROWS_AT_ONCE):
        rows = plane[:, top : top + ROWS_AT_ONCE]
        rows.copy_(torch.randn(rows.shape, generator=generator))
    return plane


def place_planes(height: int, width: int, window: tuple[slice, slice] | None = None, *, frame: int = 0) -> Tensor:
    """`[2, h, w]`: y and x of every pixel's centre from -1 to 1, of the whole picture or of a window in it.

    `frame`: pixels at each border that continue the picture, and so lie beyond -1 and 1; height and width have them.
    """
    y = (2 * (torch.arange(height) - frame) + 1) / (height - 2 * frame) - 1
    x = (2 * (torch.arange(width) - frame) + 1) / (width - 2 * frame) - 1
    if window is not None:
        y, x = y[window[0]], x[window[1]]
    return torch.stack([y[:, None].expand(-1, len(x)), x[None, :].expand(len(y), -1)])


INPUT_CHANNELS = 8
"""The picture's three channels, noise, y, x, and the squares of y and x."""
OUTPUT_CHANNELS = 12
"""What the network says of a pixel: a 3 x 3 matrix for its colour and an offset, both added to the identity."""


@dataclass(frozen=True)
class TinyEditorConfig:
    """Sizes of the embedded base model."""

    d_model: int = 192
    """Width of a patch token."""
    num_layers: int = 6
    """Number of identical blocks."""
    head_dim: int = 32
    """Width of one attention head; heads = d_model / head_dim."""
    ffn_dim: int = 576
    """Hidden width of a block's feed-forward layer."""
    text_dim: int = 128
    """Width of an instruction token."""
    patch: int = 8
    """Side of a patch in pixels."""
    window: int = 8
    """Side of an attention window in patches; every second block shifts its windows by half a side."""
    pixel_channels: int = 32
    """Channels of the full-resolution path."""
    pixel_layers: int = 4
    """Number of 3 x 3 convolutions after the two paths have met."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(self, name)}")
        if self.d_model % self.head_dim:
            raise ValueError(f"d_model: expected a multiple of head_dim={self.head_dim}, got {self.d_model}")
        if self.pixel_channels % 2:
            raise ValueError(f"pixel_channels: expected an even number (half are gated), got {self.pixel_channels}")
        if self.window % 2:
            raise ValueError(f"window: expected an even number of patches (half of it is the shift), got {self.window}")

    @property
    def cell(self) -> int:
        """Side in pixels of an attention window: both sides of a picture are padded to multiples of it."""
        return self.patch * self.window


class TinyEditor(nn.Module):
    """The frozen base. It knows instructions and pictures, and nothing of adapters."""

    def __init__(self, config: TinyEditorConfig) -> None:
        super().__init__()
        self.config = config
        d, p = config.d_model, config.patch
        # Patches overlap by half a patch on every side, so that a token sees across the border of its own pixels.
        self.embed = nn.Linear(INPUT_CHANNELS * (2 * p) ** 2, d)
        self.text_norm = RMSNorm(config.text_dim)
        self.blocks = nn.ModuleList(
            Block(config, shift=(config.window // 2) * (index % 2)) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(d)
        self.pixels = PixelPath(config)

    def forward(self, picture: Tensor, planes: Tensor, text: Tensor, raw: bool = False) -> Tensor:
        """Picture and planes `[b, 3, h, w]`, text `[b, K, text_dim]` -> the edited picture `[b, 3, h, w]` in 0..1.

        `raw`: as trainings compare it, neither cut to 0..1 nor rid of the patches' pattern.
        """
        height, width = picture.shape[-2:]
        cell = self.config.cell
        x = pad_mirrored(self.inputs(picture, planes), -height % cell, -width % cell)
        x = x.contiguous(memory_format=torch.channels_last)
        tokens, grid = self.read_scene(x, text.to(x.dtype))
        whole = pad_mirrored(picture, -height % cell, -width % cell)
        edited = recolour(whole, self.pixels(x, tokens, grid))
        if not raw:
            edited = without_pattern(edited, whole, self.config.patch)
        return edited[:, :, :height, :width]

    def inputs(self, picture: Tensor, planes: Tensor) -> Tensor:
        """Picture and planes, `[b, 3, h, w]` each -> the network's channels `[b, 8, h, w]` in its dtype."""
        centred = 4 * (picture - 0.5)
        return torch.cat([centred, with_squares(planes.to(picture))], dim=1).to(self.embed.weight.dtype)

    def read_scene(self, x: Tensor, text: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x `[b, 8, h, w]`, text `[b, K, text_dim]` -> what every patch shows `[b, n, d]`, and the grid of patches."""
        h, w = x.shape[-2] // self.config.patch, x.shape[-1] // self.config.patch
        tokens = self.embed(overlapping_patches(x, self.config.patch))  # [b, n, d]
        text = self.text_norm(text)
        seen = visible((h, w), self.config.window, text.shape[1]).to(x.device)
        for block in self.blocks:
            tokens = block(tokens, text, (h, w), seen if block.shift else None)
        return self.norm(tokens), (h, w)


class Block(nn.Module):
    """Pre-norm attention inside windows, with the instruction's tokens present in each, then a feed-forward layer."""

    def __init__(self, config: TinyEditorConfig, shift: int) -> None:
        super().__init__()
        d = config.d_model
        self.window, self.shift, self.head_dim = config.window, shift, config.head_dim
        self.place = nn.Parameter(torch.zeros(config.window**2, d))
        self.norm1 = RMSNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.text_kv = nn.Linear(config.text_dim, 2 * d)
        self.out = nn.Linear(d, d)
        self.norm2 = RMSNorm(d)
        self.fc1 = nn.Linear(d, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, d)

    def forward(self, x_bnd: Tensor, text: Tensor, grid: tuple[int, int], seen: Tensor | None) -> Tensor:
        """x `[b, n, d]`, text `[b, K, text_dim]`, seen: `visible` of shifted windows, else None -> `[b, n, d]`"""
        b, n, d = x_bnd.shape
        windows = to_windows(x_bnd.view(b, *grid, d), self.window, self.shift)
        return from_windows(self.on_windows(windows, text, seen), grid, self.window, self.shift).view(b, n, d)

    def on_windows(self, x_bwsd: Tensor, text: Tensor, seen: Tensor | None) -> Tensor:
        """Any windows of the grid, which do not depend on one another: x `[b, w, s, d]` -> `[b, w, s, d]`.

        Every linear layer sees one row block per picture, `[b, w * s, d]`.
        """
        shape = x_bwsd.shape
        x_bnd = x_bwsd.flatten(1, 2)
        x_bnd = x_bnd + self.attend(self.norm1(x_bnd).view(shape), text, seen).flatten(1, 2)
        out: Tensor = x_bnd + self.fc2(F.silu(self.fc1(self.norm2(x_bnd))))
        return out.view(shape)

    def attend(self, x_bwsd: Tensor, text: Tensor, seen: Tensor | None) -> Tensor:
        """Attention inside windows: x `[b, w, s, d]` -> `[b, w, s, d]`."""
        b, w, s, d = x_bwsd.shape
        heads = d // self.head_dim
        qkv = self.qkv((x_bwsd + self.place.to(x_bwsd.dtype)).flatten(1, 2))
        q, k, v = qkv.view(b * w, s, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4)
        text_kv = self.text_kv(text).view(b, 1, -1, 2, heads, self.head_dim).expand(b, w, -1, -1, -1, -1)
        text_k, text_v = text_kv.flatten(0, 1).permute(2, 0, 3, 1, 4)
        mask = None if seen is None else seen.repeat(b, 1, 1, 1)
        k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b, w * s, d))
        return out.view(b, w, s, d)


class PixelPath(nn.Module):
    """Full resolution: 3 x 3 convolutions that join what the blocks saw with the pixels themselves.

    What the blocks saw gates one half of the pixel features and is added to the other: a change of tone or colour is a
    product of pixels with a decision, and took far longer to learn from sums.
    """

    def __init__(self, config: TinyEditorConfig) -> None:
        super().__init__()
        c = config.pixel_channels
        self.patch = config.patch
        self.reach = config.pixel_layers + 2  # pixels that the convolutions see to each side
        self.scene = nn.Linear(config.d_model, c * config.patch**2)
        self.stem = nn.Conv2d(INPUT_CHANNELS, c, 3, padding=1)
        self.mix = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(config.pixel_layers))
        self.out = nn.Conv2d(c, OUTPUT_CHANNELS, 3, padding=1)
        # The untrained editor changes nothing.
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, tokens: Tensor, grid: Sequence[int], shown: tuple[slice, slice] | None = None
    ) -> Tensor:
        """x `[b, 8, h, w]`, tokens `[b, n, d]` -> what to do with every pixel `[b, 12, h, w]`, see `recolour`.

        `shown`: which rows and columns of the grid's pixels x holds; None: all.
        """
        affine: Tensor = self.out(self.hidden(x, tokens, grid, shown))
        return affine

    def hidden(
        self, x: Tensor, tokens: Tensor, grid: Sequence[int], shown: tuple[slice, slice] | None = None
    ) -> Tensor:
        """Return what the last layer reads `[b, c, h, w]`; arguments as of `forward`."""
        scene = unpatchify(self.scene(tokens), grid, self.patch)
        if shown is not None:
            scene = scene[:, :, *shown]
        features = gated(self.stem(x), scene)
        for convolution in self.mix:
            features = features + convolution(F.silu(features))
        return F.silu(features)


def gated(features: Tensor, scene: Tensor) -> Tensor:
    """Return features f with the scene s joined: f * (1 + s) in the first half of the channels, f + s in the second.

    Of `[b, c, h, w]` in channels-last memory, operations on half of the channels would go through memory in runs of
    c / 2 numbers; these go through whole rows, as f * (1 + s * mask) + s * (1 - mask).
    """
    b, c, h, w = features.shape
    first = torch.arange(c, device=features.device) < c // 2
    mask = first.to(features.dtype).repeat(w)
    f, s = (each.permute(0, 2, 3, 1).reshape(b, h, w * c) for each in (features, scene))
    joined = torch.addcmul(s * (1 - mask), f, 1 + s * mask)
    return joined.view(b, h, w, c).permute(0, 3, 1, 2)


def with_squares(planes: Tensor) -> Tensor:
    """Noise, y, x `[b, 3, h, w]` -> noise, y, x, squares of y and x `[b, 5, h, w]`, all of mean near 0 and size near 1.

    What fades towards the borders depends on the distance from the middle, and that is a sum of the two squares.
    """
    noise, place = planes[:, :1], planes[:, 1:]
    return torch.cat([noise, 2 * place, 2 * place.square() - 2 / 3], dim=1)


def recolour(picture: Tensor, affine: Tensor) -> Tensor:
    """Every pixel's colour c (about middle grey) becomes c + M c + o: picture `[b, 3, h, w]`, affine `[b, 12, h, w]`.

    Tone and colour edits are products of colours: a sum alone would have to imitate them (as in bilateral learning,
    Gharbi et al. 2017).
    """
    affine = affine.to(picture.dtype)
    centred = picture - 0.5
    rows = torch.stack([(affine[:, i : i + 3] * centred).sum(1) for i in (0, 3, 6)], dim=1)
    recoloured: Tensor = picture + rows + affine[:, 9:]
    return recoloured


def visible(grid: tuple[int, int], window: int, num_text: int) -> Tensor:
    """Which keys the queries of shifted windows may see: `[windows, 1, s, s + K]` bool.

    Rolling the grid brings opposite borders of the picture into one window; they are no neighbours. The instruction's
    tokens are seen by all.
    """
    shift = window // 2
    side = torch.zeros(1, *grid, 1, dtype=torch.int32)
    side[:, :shift] += 1
    side[:, :, :shift] += 2
    return same_side(to_windows(side, window, shift)[0, :, :, 0], num_text)


def same_side(side: Tensor, num_text: int) -> Tensor:
    """Which side of the picture every patch of every window is from, `[w, s]` -> who sees whom `[w, 1, s, s + K]`."""
    near = side[:, :, None] == side[:, None, :]
    return F.pad(near, (0, num_text), value=True)[:, None]


def pad_mirrored(x: Tensor, down: int, right: int) -> Tensor:
    """Pad `[b, c, h, w]` at the bottom and right by mirroring, also where the picture is smaller than the padding."""
    while down or right:
        step_down, step_right = min(down, x.shape[-2] - 1), min(right, x.shape[-1] - 1)
        if (down and not step_down) or (right and not step_right):  # One pixel high or wide: nothing to mirror.
            return F.pad(x, (0, right, 0, down), mode="replicate")
        x = F.pad(x, (0, step_right, 0, step_down), mode="reflect")
        down, right = down - step_down, right - step_right
    return x


def to_windows(x: Tensor, window: int, shift: int) -> Tensor:
    """`[b, h, w, d]` -> `[b, windows, window * window, d]`, the grid rolled by `shift` first."""
    b, h, w, d = x.shape
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    x = x.view(b, h // window, window, w // window, window, d)
    return x.transpose(2, 3).reshape(b, -1, window * window, d)


def from_windows(x: Tensor, grid: tuple[int, int], window: int, shift: int) -> Tensor:
    """The inverse of `to_windows`: `[b, windows, window * window, d]` -> `[b, h, w, d]`."""
    b, d = x.shape[0], x.shape[-1]
    h, w = grid
    x = x.view(b, h // window, w // window, window, window, d).transpose(2, 3).reshape(b, h, w, d)
    return x.roll((shift, shift), (1, 2)) if shift else x


def overlapping_patches(x: Tensor, patch: int) -> Tensor:
    """Every patch with half a patch around it, zeros outside: `[b, c, h, w]` -> `[b, n, 4 * c * p * p]`.

    Four quarters, each as large as a patch of the picture moved by half a patch. This and a linear layer, not a strided
    convolution: in bfloat16 those are wrong for some shapes on processors with AMX, this one among them (docs/log.md).
    """
    half = patch // 2
    return surrounded_patches(F.pad(x, (half, patch - half, half, patch - half)), patch)


def surrounded_patches(x: Tensor, patch: int) -> Tensor:
    """Return `overlapping_patches` of what x surrounds by half a patch: `[b, c, h + p, w + p]`.

    The result: `[b, n, 4 * c * p * p]`.
    """
    b, c, h, w = x.shape
    rows, columns = h // patch - 1, w // patch - 1
    cells = x.reshape(b, c, rows + 1, patch, columns + 1, patch).permute(0, 2, 4, 3, 5, 1).flatten(3)
    quarters = [cells[:, i : i + rows, j : j + columns] for i in (0, 1) for j in (0, 1)]
    return torch.cat(quarters, dim=-1).flatten(1, 2)


def unpatchify(cells: Tensor, grid: Sequence[int], patch: int) -> Tensor:
    """`[b, n, c * p * p]` -> `[b, c, h * p, w * p]` in channels-last memory; a cell is laid out as p x p x c."""
    b = cells.shape[0]
    h, w = grid
    x = cells.view(b, h, w, patch, patch, -1).transpose(2, 3)
    return x.reshape(b, h * patch, w * patch, -1).permute(0, 3, 1, 2)
