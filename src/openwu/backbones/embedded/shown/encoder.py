"""What pairs of pictures before and after an edit show of it: tokens for the embedded condition encoder.

Colours: a cubic fit of the change and its local means, at the colours of a grid, with how often the example has each.
Places: a thumbnail of what the fit leaves unexplained, and its profiles from the middle, down and across. Detail: the
energy of differences over several distances, and how much of every band of frequencies is kept. Estimates are cues in
the condition; what happens to a photograph is up to the network.

Shapes: b requests, p pairs of each, h and w the sides of their pictures, n sampled pixels, V example tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.backbones.embedded.features import DIFFERENCES, NUM_STATISTICS, colour_statistics, cut_details

SAMPLED = 40
"""Side of the reduced pictures whose pixels are sampled for colours."""
GRID = 4
"""Colours per channel of the grid at which a change of colour is described."""
GROUP = 8
"""Grid colours of one token."""
RIDGE = 3e-4
"""Weight that keeps the fit small where the example has no colours."""
REACH = 0.18
"""Standard deviation of the neighbourhood in which a grid colour's mean change is taken."""
THUMBNAIL, PATCH = 32, 8
"""Sides in pixels of the thumbnail of changes, and of its patches."""
BINS = 8
"""Steps of a profile."""
TILE_GRID, TILE = 4, 32
"""Frequencies are measured in squares at the crossings of a grid; their side in pixels."""
GAIN = 2.0
"""Factor on all features, so that tokens of an untrained encoder are as large as those of the photograph."""
HIDDEN = 192
"""Width of the summary's hidden layer."""
BANDS = 4
"""Bands of frequencies, an octave each, from the finest."""

NUM_TOKENS = GRID**3 // GROUP + 1 + (THUMBNAIL // PATCH) ** 2 + 1
"""V"""


class ExampleEncoder(nn.Module):
    """Pairs before and after -> tokens. Several pairs of one request show the same edit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.from_colours = nn.Linear(7 * GROUP, width)
        self.from_statistics = nn.Linear(2 * NUM_STATISTICS + 9, width)
        self.from_places = nn.Linear(9 * PATCH**2, width)
        self.from_profiles = nn.Linear(3 * 4 * BINS + 6 * BANDS + 3 * len(DIFFERENCES), width)
        known = sum(each.in_features for each in (self.from_statistics, self.from_profiles))
        self.summary = nn.Sequential(nn.Linear(7 * GRID**3 + known, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, width))
        self.place = nn.Parameter(torch.randn(NUM_TOKENS, width) * 0.1)

    def forward(self, pairs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """p tensors `[b, 2, 3, h, w]` in 0..1, before and after, of any sizes -> tokens `[b, V, width]`, and a summary
        `[b, 1, width]` that every token of the request is to carry: in the average of attention that has not learned
        where to look, single tokens drown.
        """
        dtype = self.place.dtype
        # The mean over pairs, where there is one for each.
        known = [each.mean(1) if each.ndim == 4 else each for each in features(pairs)]
        known = [(GAIN * each).clamp(-16, 16).to(dtype) for each in known]
        layers = (self.from_colours, self.from_statistics, self.from_places, self.from_profiles)
        tokens = torch.cat([layer(each) for layer, each in zip(layers, known, strict=True)], dim=1)
        shapes, statistics, _, profiles = known
        summary = self.summary(torch.cat([each.flatten(1) for each in (shapes, statistics, profiles)], dim=1))
        return tokens + self.place, summary[:, None]


@torch.no_grad()
def features(pairs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What p pairs `[b, 2, 3, h, w]` show, in four parts `[b, (p,) v, f]`."""
    both = [pair.float()[:, None].unbind(2) for pair in pairs]
    samples = [torch.cat([reduced(pair[side]) for pair in both], dim=1) for side in (0, 1)]
    weights = fit(samples[0], samples[1])
    parts = [
        (
            statistics(before, after, weights),
            places(before, after, weights),
            profiles(before, after, weights),
        )
        for before, after in both
    ]
    known = [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]
    return colours(samples[0], samples[1], weights), *known


def reduced(pictures: Tensor) -> Tensor:
    """Pictures `[b, p, 3, h, w]` -> colours `[b, n, 3]` of reduced ones: means, so that noise does not count."""
    b, p = pictures.shape[:2]
    small = F.interpolate(pictures.flatten(0, 1), (SAMPLED, SAMPLED), mode="area")
    return small.view(b, p, 3, -1).transpose(2, 3).flatten(1, 2)


def cubic(colour: Tensor) -> Tensor:
    """All 20 products of at most three of red, green and blue, about the middle: `[..., 3]` -> `[..., 20]`."""
    c = torch.cat([torch.ones_like(colour[..., :1]), 2 * colour - 1], dim=-1)
    index = [(i, j, k) for i in range(4) for j in range(i, 4) for k in range(j, 4)]
    first, second, third = (list(each) for each in zip(*index, strict=True))
    return c[..., first] * c[..., second] * c[..., third]


def fit(before: Tensor, after: Tensor) -> Tensor:
    """Least squares for the change of colours `[b, n, 3]` as a cubic polynomial of them: weights `[b, 20, 3]`."""
    features = cubic(before)
    normal = features.transpose(1, 2) @ features / features.shape[1]
    aim = features.transpose(1, 2) @ (after - before) / features.shape[1]
    solved: Tensor = torch.linalg.solve(normal + RIDGE * torch.eye(normal.shape[-1]), aim)
    return solved


def predicted(pictures: Tensor, weights: Tensor) -> Tensor:
    """Pictures `[b, p, 3, h, w]` with the fit's change of colour."""
    change = cubic(pictures.movedim(2, -1)) @ weights[:, None, None]
    return (pictures + change.movedim(-1, 2)).clamp(0, 1)


def grid_colours() -> Tensor:
    """The colours of the grid `[GRID ** 3, 3]`."""
    line = (torch.arange(GRID) + 0.5) / GRID
    return torch.cartesian_prod(line, line, line)


def colours(before: Tensor, after: Tensor, weights: Tensor) -> Tensor:
    """Return the change at the grid's colours, fitted and as local means, and their density: `[b, v, 7 GROUP]`."""
    grid = grid_colours()
    fitted = (grid + cubic(grid) @ weights).clamp(0, 1) - grid  # [b, g, 3]
    near = torch.exp(-torch.cdist(grid.expand(len(before), -1, -1), before).square() / (2 * REACH**2))  # [b, g, n]
    count = near.sum(-1, keepdim=True)
    local = near @ (after - before) / (count + 1e-3 * near.shape[-1])
    density = 0.5 * (count / near.shape[-1] + 1e-4).log10() + 1
    return torch.cat([4 * fitted, 4 * local, density], dim=-1).view(len(before), -1, 7 * GROUP)


def statistics(before: Tensor, after: Tensor, weights: Tensor) -> Tensor:
    """Colour statistics before and after, and how much of the change the fit explains: `[b, p, 1, ...]`."""
    b, p = before.shape[:2]
    both = [F.interpolate(each.flatten(0, 1), (64, 64), mode="area") for each in (before, after)]
    known = torch.cat([colour_statistics(each) for each in both], dim=1).view(b, p, -1)
    small_before, small_after = (each.view(b, p, *each.shape[1:]) for each in both)
    change = small_after - small_before
    left = small_after - predicted(small_before, weights)
    spread = [4 * change.mean((-1, -2)), *(_decibel(each.square().mean((-1, -2))) for each in (change, left))]
    return torch.cat([known, *spread], dim=-1)[:, :, None]


def places(before: Tensor, after: Tensor, weights: Tensor) -> Tensor:
    """Patches of thumbnails: before, after, and what the fit leaves: `[b, p, v, 9 PATCH^2]`."""
    b, p = before.shape[:2]
    small = [F.interpolate(each.flatten(0, 1), (THUMBNAIL, THUMBNAIL), mode="area") for each in (before, after)]
    left = small[1] - predicted(small[0].view(b, p, *small[0].shape[1:]), weights).flatten(0, 1)
    maps = torch.cat([2 * (small[0] - 0.5), 2 * (small[1] - 0.5), 8 * left], dim=1)
    return F.unfold(maps, PATCH, stride=PATCH).transpose(1, 2).view(b, p, -1, 9 * PATCH**2)


def profiles(before: Tensor, after: Tensor, weights: Tensor) -> Tensor:
    """What changes from the middle outwards, down and across, and in every band of frequencies: `[b, p, 1, ...]`."""
    b, p = before.shape[:2]
    small = [F.interpolate(each.flatten(0, 1), (THUMBNAIL,) * 2, mode="area") for each in (before, after)]
    expected = predicted(small[0].view(b, p, *small[0].shape[1:]), weights).flatten(0, 1)
    tiles = [cut_details(each.flatten(0, 1), TILE_GRID, TILE).transpose(1, 2).flatten(2, 3) for each in (before, after)]
    first, second = predicted(tiles[0].view(b, p, *tiles[0].shape[1:]), weights).flatten(0, 1), tiles[1]
    kept = [_kept(*both) for both in zip(_bands(first), _bands(second), strict=True)]
    energies = [_energies(each) for each in (tiles[0], second, second - first)]
    return torch.cat([_profiles(expected, small[1]), *kept, *energies], dim=-1).view(b, p, 1, -1)


def _profiles(expected: Tensor, after: Tensor) -> Tensor:
    """Mean remainders and gains in rings, rows and columns: `[b, 3, s, s]` twice -> `[b, 3 * 4 * BINS]`."""
    line = (2 * torch.arange(THUMBNAIL) + 1) / THUMBNAIL - 1
    y, x = line[:, None].expand(-1, THUMBNAIL), line.expand(THUMBNAIL, -1)
    radius = ((y.square() + x.square()) / 2).sqrt()
    found = []
    for place in (radius, (y + 1) / 2, (x + 1) / 2):
        bins = F.one_hot((place * BINS).long().clamp(max=BINS - 1), BINS).float()  # [s, s, BINS]
        bins = bins / bins.sum((0, 1))
        left = torch.einsum("bchw,hwk->bck", after - expected, bins)
        light = [torch.einsum("bhw,hwk->bk", each.mean(1), bins) for each in (expected, after)]
        gain = ((light[1] + 0.02) / (light[0] + 0.02)).log()
        found.append(torch.cat([6 * left, 2 * gain[:, None]], dim=1).flatten(1))
    return torch.cat(found, dim=1)


def _bands(tiles: Tensor) -> list[Tensor]:
    """Luma and the red-blue difference of tiles `[b, 3, n * TILE, TILE]` in every band `[b * n, 2, TILE, TILE]`.

    The bands of an undecimated wavelet transform (a trous, with the kernel 1 2 1).
    """
    red, green, blue = tiles.unbind(1)
    x = torch.stack([0.3 * red + 0.59 * green + 0.11 * blue, red - blue], dim=1)
    x = x.view(len(x), 2, -1, TILE, x.shape[-1]).transpose(1, 2).flatten(0, 1)
    found = []
    for step in (2**level for level in range(BANDS)):
        padded = F.pad(x, (step,) * 4, mode="reflect")
        rows = 0.5 * padded[..., step:-step, :] + 0.25 * (padded[..., : -2 * step, :] + padded[..., 2 * step :, :])
        wide = 0.5 * rows[..., step:-step] + 0.25 * (rows[..., : -2 * step] + rows[..., 2 * step :])
        found.append(x - wide)
        x = wide
    return found


def _kept(expected: Tensor, after: Tensor) -> Tensor:
    """The share of a band that is kept, its growth, and what is new in it, of both planes: `[b, 6]`."""
    expected, after = (x.view(-1, TILE_GRID**2, *x.shape[1:]) for x in (expected, after))
    axes = (1, 3, 4)
    power, other = expected.square().mean(axes) + 1e-7, after.square().mean(axes) + 1e-7
    share = (expected * after).mean(axes) / power
    new = (after - share[:, None, :, None, None] * expected).square().mean(axes) + 1e-7
    return torch.cat([share.clamp(-2, 4), 0.5 * (other / power).log(), _decibel(new)], dim=1)


def _energies(tiles: Tensor) -> Tensor:
    """How much tiles `[b, 3, n * TILE, TILE]` vary over each of DIFFERENCES: `[b, len(DIFFERENCES)]`, a logarithm."""
    x = tiles.view(len(tiles), 3, -1, TILE, tiles.shape[-1])
    found = [
        (x[..., down:, right:] - x[..., : TILE - down, : TILE - right]).square().mean((1, 2, 3, 4))
        for down, right in DIFFERENCES
    ]
    return _decibel(torch.stack(found, dim=1))


def _decibel(power: Tensor) -> Tensor:
    """A logarithm of mean squares, of size about 1."""
    return 0.5 * (power + 1e-7).log10() + 1.5
