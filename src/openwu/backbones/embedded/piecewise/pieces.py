"""Edit photos of any size in pieces, with the result of one pass of the network over the whole picture: no seams.

Inside a block of the network no window depends on another one, so the tokens of the whole picture are changed in place,
block after block and some windows at a time. Only the convolutions of the full-resolution path reach across: its pieces
are computed with a few pixels around them. What takes out the pattern of patches sees further, and is a stage of its
own. How a picture is cut depends on its size alone, and every piece is computed by one thread, so that the same bytes
come out on any number of threads.

Shapes: b photos of equal size, h and w the sides of a piece, H and W the sides of the grid of patches, d width, s
patches in a window, K instruction tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.backbones.embedded.network import (
    Block,
    TinyEditor,
    TinyEditorConfig,
    from_windows,
    noise_plane,
    pad_mirrored,
    place_planes,
    recolour,
    same_side,
    surrounded_patches,
    to_windows,
)
from openwu.backbones.embedded.pattern import SEEN, without_pattern
from openwu.errors import OpenwuError
from openwu.images import Photo
from openwu.images.colour import Pixels
from openwu.kernels.threads import Task

WHOLE = 256 * 256
"""Pictures of at most so many pixels are one piece."""

TOGETHER = 1536 * 1024
"""How many pixels a pass of several pictures has at most; bounds its memory."""

WINDOWS = 16
"""How many windows of one row a piece of a block has at most."""

HEIGHT, WIDTH = 128, 256
"""Sides of a piece of the full-resolution path in pixels. Larger ones compute fewer pixels twice, but the system takes
back and clears the memory of their features in every operation: up to a third of the time."""


@dataclass(frozen=True)
class Span:
    """A range of pixels along one side of the padded picture."""

    start: int
    stop: int

    def grown(self, before: int, after: int, side: int) -> Span:
        """With pixels around it, where the side has any."""
        return Span(max(0, self.start - before), min(side, self.stop + after))

    @property
    def pixels(self) -> slice:
        return slice(self.start, self.stop)

    def patches(self, patch: int) -> slice:
        """The patches that hold it."""
        return slice(self.start // patch, -(-self.stop // patch))

    def inside(self, start: int) -> slice:
        """Where it lies in a range that begins at `start`."""
        return slice(self.start - start, self.stop - start)


Rectangle = tuple[Span, Span]
"""Rows and columns of pixels."""


def pictures_per_pass(width: int, height: int) -> int:
    """How many pictures of this size share a pass of the base, at most."""
    return max(1, TOGETHER // (width * height))


def as_unit(pixels: Pixels) -> Tensor:
    """`[h, w, 3]` of 8 or 16 bits -> `[3, h, w]` float32 in 0..1"""
    peak = np.iinfo(pixels.dtype).max
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / peak


def edited_whole(
    network: nn.Module, photos: Sequence[Photo], seeds: Sequence[int], text: Tensor, frame: int = 0
) -> list[Photo]:
    """Edit photos of equal size in one pass; text: instruction tokens `[b, K, text_dim]`; frame: see `place_planes`."""
    width, height = photos[0].size
    picture = torch.stack([as_unit(photo.pixels) for photo in photos])
    place = place_planes(height, width, frame=frame)
    planes = torch.stack([torch.cat([noise_plane(width, height, seed).float(), place]) for seed in seeds])
    edited = network(picture, planes, text)
    return [photo.with_pixels(as_pixels(each, photo.pixels)) for photo, each in zip(photos, edited, strict=True)]


def as_pixels(picture: Tensor, like: Pixels) -> Pixels:
    """`[3, h, w]` in 0..1 -> `[h, w, 3]` in the depth of `like`; raises OpenwuError for numbers that are not finite."""
    if not bool(picture.isfinite().all()):
        raise OpenwuError("edit: the result holds numbers that are not finite; ask for a smaller strength")
    whole = picture.float().clamp(0, 1).mul(np.iinfo(like.dtype).max).round().permute(1, 2, 0)
    pixels = np.empty_like(like, shape=tuple(whole.shape))
    pixels[...] = whole.numpy()
    return pixels


def is_whole(width: int, height: int) -> bool:
    """Whether a picture of this size is one piece."""
    return width * height <= WHOLE


def number_of_pieces(config: TinyEditorConfig, width: int, height: int) -> int:
    """How many pieces a pass over pictures of this size has, in all stages."""
    if is_whole(width, height):
        return 1
    strips, rectangles = cut(config, width, height)
    return (1 + config.num_layers) * len(strips) + 2 * len(rectangles)


def cut(config: TinyEditorConfig, width: int, height: int) -> tuple[list[Rectangle], list[Rectangle]]:
    """Cut the padded picture: windows of one row for the blocks, squares for the full-resolution path."""
    cell = config.cell
    high, wide = height + -height % cell, width + -width % cell
    tall, broad = max(1, HEIGHT // cell) * cell, max(1, WIDTH // cell) * cell
    return (
        [(rows, columns) for rows in spans(high, cell) for columns in spans(wide, WINDOWS * cell)],
        [(rows, columns) for rows in spans(high, tall) for columns in spans(wide, broad)],
    )


def spans(side: int, length: int) -> list[Span]:
    """Cut a side into ranges of at most this length."""
    return [Span(start, min(side, start + length)) for start in range(0, side, length)]


def wrapped(start: int, length: int, side: int) -> Iterator[tuple[slice, slice]]:
    """A range that goes on at 0 past the side: (where in the range, where in the side), one pair or two."""
    first = min(length, side - start)
    yield slice(0, first), slice(start, start + first)
    if first < length:
        yield slice(first, length), slice(0, length - first)


class PiecewiseEdit:
    """One pass of the network over photos of equal size, as `stages` of pieces that may run at the same time."""

    def __init__(
        self, network: TinyEditor, photos: Sequence[Photo], seeds: Sequence[int], text: Tensor, frame: int = 0
    ) -> None:
        """text: instruction tokens `[b, K, text_dim]`; frame: see `place_planes`."""
        self.network, self.photos = network, photos
        self.patch, cell = network.config.patch, network.config.cell
        self.width, self.height = photos[0].size
        self.padded_width, self.padded_height = self.width + -self.width % cell, self.height + -self.height % cell
        self.noises = [noise_plane(self.width, self.height, seed) for seed in seeds]
        self.y, self.x = (_column(side, frame).contiguous() for side in (self.height, self.width))
        self.rows, self.columns = _mirrored(self.height, self.padded_height), _mirrored(self.width, self.padded_width)
        dtype = network.embed.weight.dtype
        self.text = network.text_norm(text.to(dtype))
        grid = self.padded_height // self.patch, self.padded_width // self.patch
        self.tokens = torch.empty(len(photos), *grid, network.config.d_model, dtype=dtype)
        # What the network changes, within -1..1, with the patches' pattern: float16 is enough for bytes.
        exact = torch.float16 if photos[0].pixels.dtype == np.uint8 else torch.float32
        self.changes = torch.empty(len(photos), 3, self.padded_height, self.padded_width, dtype=exact)
        self.outputs = [np.empty_like(photo.pixels) for photo in photos]

    def stages(self) -> list[list[Task]]:
        """All pieces: those of a stage in any order, after all of the stage before."""
        strips, rectangles = cut(self.network.config, self.width, self.height)
        first: list[Task] = [partial(self._embed, *strip) for strip in strips]
        blocks: list[list[Task]] = [
            [partial(self._through, block, *strip) for strip in strips] for block in self.network.blocks
        ]
        last: list[list[Task]] = [
            [partial(step, *rectangle) for rectangle in rectangles] for step in (self._paint, self._finish)
        ]
        return [first, *blocks, *last]

    def edited(self) -> list[Photo]:
        """The photos with their new pixels, in the depth in which they were read; after all stages."""
        return [photo.with_pixels(pixels) for photo, pixels in zip(self.photos, self.outputs, strict=True)]

    def _embed(self, rows: Span, columns: Span) -> None:
        """Patches of some pixels -> their tokens."""
        before, after = self.patch // 2, self.patch - self.patch // 2
        down = rows.grown(before, after, self.padded_height)
        right = columns.grown(before, after, self.padded_width)
        beyond = [
            *(before - columns.start, columns.stop + after - self.padded_width),
            *(before - rows.start, rows.stop + after - self.padded_height),
        ]
        surrounded = F.pad(self._inputs(down, right), [max(0, pixels) for pixels in beyond])
        tokens = self.network.embed(surrounded_patches(surrounded, self.patch))
        here = self.tokens[:, rows.patches(self.patch), columns.patches(self.patch)]
        here.copy_(tokens.view(here.shape))

    def _through(self, block: nn.Module, rows: Span, columns: Span) -> None:
        """Change the tokens of some windows of one row, moved by the block's shift, in place."""
        assert isinstance(block, Block)
        b, high, wide, d = self.tokens.shape
        grid = (rows.stop - rows.start) // self.patch, (columns.stop - columns.start) // self.patch
        down = list(wrapped(rows.start // self.patch + block.shift, grid[0], high))
        right = list(wrapped(columns.start // self.patch + block.shift, grid[1], wide))
        places = [((part_y, part_x), (y, x)) for part_y, y in down for part_x, x in right]
        tokens = self.tokens.new_empty(b, *grid, d)
        side = torch.zeros(grid, dtype=torch.int32)
        for number, ((part_y, part_x), (y, x)) in enumerate(places):
            tokens[:, part_y, part_x] = self.tokens[:, y, x]
            side[part_y, part_x] = number
        seen = None
        if len(places) > 1:
            seen = same_side(to_windows(side[None, ..., None], block.window, 0)[0, :, :, 0], self.text.shape[1])
        changed = block.on_windows(to_windows(tokens, block.window, 0), self.text, seen)
        changed = from_windows(changed, grid, block.window, 0)
        for (part_y, part_x), (y, x) in places:
            self.tokens[:, y, x] = changed[:, part_y, part_x]

    def _paint(self, rows: Span, columns: Span) -> None:
        """Change the pixels of a rectangle; what the convolutions see around it is computed and dropped."""
        reach = self.network.pixels.reach
        down, right = rows.grown(reach, reach, self.padded_height), columns.grown(reach, reach, self.padded_width)
        patches = down.patches(self.patch), right.patches(self.patch)
        tokens = self.network.norm(self.tokens[:, *patches])
        shown = down.inside(patches[0].start * self.patch), right.inside(patches[1].start * self.patch)
        affine = self.network.pixels(self._inputs(down, right), tokens.flatten(1, 2), tokens.shape[1:3], shown)
        picture = self._picture(rows, columns)
        edited = recolour(picture, affine[:, :, rows.inside(down.start), columns.inside(right.start)])
        self.changes[:, :, rows.pixels, columns.pixels] = (edited.clamp(0, 1) - picture).to(self.changes.dtype)

    def _finish(self, rows: Span, columns: Span) -> None:
        """Write the edited pixels of a rectangle, without the pattern of patches around it."""
        reach = SEEN * self.patch
        down, right = rows.grown(reach, reach, self.padded_height), columns.grown(reach, reach, self.padded_width)
        picture = self._picture(down, right)
        edited = without_pattern(picture + self.changes[:, :, down.pixels, right.pixels], picture, self.patch)
        rows, columns = (
            Span(rows.start, min(rows.stop, self.height)),
            Span(columns.start, min(columns.stop, self.width)),
        )
        edited = edited[:, :, rows.inside(down.start), columns.inside(right.start)]
        for output, each in zip(self.outputs, edited, strict=True):
            output[rows.pixels, columns.pixels] = as_pixels(each, output)

    def _inputs(self, rows: Span, columns: Span) -> Tensor:
        """The network's channels `[b, 8, h, w]` of a rectangle of the padded picture, channels last."""
        picture, window = self._picture(rows, columns), self._window(rows, columns)
        y, x = self.rows[rows.pixels], self.columns[columns.pixels]
        size = picture.shape[-2:]
        place = torch.stack([self.y[y][:, None].expand(size), self.x[x][None].expand(size)])
        planes = torch.stack([torch.cat([noise[:, *window].float(), place]) for noise in self.noises])
        return self.network.inputs(picture, planes).contiguous(memory_format=torch.channels_last)

    def _picture(self, rows: Span, columns: Span) -> Tensor:
        """A rectangle of the padded picture: `[b, 3, h, w]` in 0..1."""
        window = self._window(rows, columns)
        return torch.stack([as_unit(photo.pixels[window]) for photo in self.photos])

    def _window(self, rows: Span, columns: Span) -> tuple[slice, slice] | tuple[Pixels, Pixels]:
        """Where the pixels of a rectangle of the padded picture are in the picture."""
        if rows.stop <= self.height and columns.stop <= self.width:  # Nothing is mirrored: a view costs nothing.
            return rows.pixels, columns.pixels
        return self.rows[rows.pixels].numpy()[:, None], self.columns[columns.pixels].numpy()[None]


def _column(side: int, frame: int) -> Tensor:
    """Every pixel's place along a side, from -1 to 1."""
    return place_planes(side, 2 * frame + 1, frame=frame)[0, :, 0]


def _mirrored(side: int, padded: int) -> Tensor:
    """Which pixel `pad_mirrored` puts where along a side: `[padded]`."""
    places = torch.arange(side, dtype=torch.float64).view(1, 1, side, 1)
    return pad_mirrored(places, padded - side, 0).flatten().long()
