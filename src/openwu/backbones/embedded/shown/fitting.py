"""The loss of an example's pairs under whatever adapter is applied to a replica of the network, window by window.

Where adapters change the full-resolution path alone, what the blocks see of a pair is computed once.

Shapes: h and w the sides of a picture, c those of its padding to whole attention windows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openwu.backbones.embedded.config import PIXELS
from openwu.backbones.embedded.network import TinyEditor, pad_mirrored, place_planes, recolour
from openwu.backbones.embedded.shown.solving import Scope, ShownView, pixel_replica, solvable, solve_head
from openwu.types import Adapter

WINDOW = 96
"""Side of the window that a step computes."""
CELL = 16
"""Side of the squares of a picture that are trained on or held out."""
FIRST_FLOOR, FLOOR, ANNEALED = 1e-2, 1e-4, 0.6
"""Mean squared error below which the loss hardly falls: at first, at the end, and the share of the steps between."""

Span = tuple[slice, slice]


@dataclass(frozen=True)
class FitPair:
    """A picture before and after, on the network's grid."""

    x: Tensor
    """The network's channels `[1, 8, c, c]`."""
    before: Tensor
    """[1, 3, c, c]"""
    after: Tensor
    """[1, 3, h, w]"""
    trained: Tensor
    """Pixels that are trained on `[h, w]` bool; neither the frame nor what is held out."""
    held: Tensor
    """Pixels that are held out `[h, w]` bool."""
    scene: tuple[Tensor, tuple[int, int]] | None
    """What the blocks see, and the grid of patches; None where adapters change it."""


class EmbeddedFit:
    """The loss of an example on a replica of the network that shares its weights; see `protocol.ExampleFit`."""

    def __init__(
        self,
        network: TinyEditor,
        pairs: Sequence[tuple[Tensor, Tensor, Tensor]],
        text: Tensor,
        *,
        adapted: Collection[str],
        frame: int = 0,
    ) -> None:
        """`pairs`: before, after `[3, h, w]` in 0..1 and noise `[1, h, w]`. `text`: tokens `[1, K, text_dim]`.

        `adapted`: paths of the modules that adapters change. `frame`: pixels at each border that do not count.
        """
        self.network = pixel_replica(network)
        self.denoiser: nn.Module = self.network
        self.text = text
        within = all(name.split(".")[0] == PIXELS for name in adapted)
        self.pairs = [self._pair(*pair, frame, within) for pair in pairs]

    @torch.no_grad()
    def _pair(self, before: Tensor, after: Tensor, noise: Tensor, frame: int, within: bool) -> FitPair:
        network, (height, width) = self.network, before.shape[-2:]
        planes = torch.cat([noise.float(), place_planes(height, width, frame=frame)])[None]
        padding = -height % network.config.cell, -width % network.config.cell
        x = pad_mirrored(network.inputs(before[None], planes), *padding).contiguous(memory_format=torch.channels_last)
        counted = torch.zeros(height, width, dtype=torch.bool)
        counted[frame : height - frame, frame : width - frame] = True
        held = counted & _held_out(height, width)
        scene = network.read_scene(x, self.text.to(x.dtype)) if within else None
        return FitPair(x, pad_mirrored(before[None], *padding), after[None], counted & ~held, held, scene)

    @torch.no_grad()
    def solve(self, applied: Scope, adapter: Adapter) -> Adapter:
        """Solve for the last layer's update on all pixels that count; see `solve_head`.

        An adapter without a LoRA for the last layer, or one that changes the blocks, too, is returned as it is.
        """
        if not solvable(adapter.targets) or any(pair.scene is None for pair in self.pairs):
            return adapter
        views = []
        for pair in self.pairs:
            assert pair.scene is not None
            before = pair.before[..., : pair.after.shape[-2], : pair.after.shape[-1]]
            views.append(ShownView(pair.x, pair.scene, before, pair.after, pair.trained | pair.held))
        dtype = self.network.embed.weight.dtype
        return solve_head(self.network, lambda each: applied(each.to(dtype)), adapter, views)

    def loss(self, step: int, steps: int) -> Tensor:
        """Return log(mse + floor) in a window of a pair, the pairs by turns; windows are drawn by `step` alone."""
        pair = self.pairs[step % len(self.pairs)]
        window = self._window(pair, step)
        remaining = max(0.0, 1 - step / steps / ANNEALED)
        floor = FLOOR * (FIRST_FLOOR / FLOOR) ** remaining
        return torch.log(self._error(pair, window, pair.trained) + floor)

    @torch.no_grad()
    def held_out(self) -> float:
        """Return the mean squared error on the held-out squares of all pairs; of all pixels where there are none."""
        errors = []
        for pair in self.pairs:
            counted = pair.held if bool(pair.held.any()) else pair.trained
            errors.append(float(self._error(pair, (slice(0, pair.x.shape[-2]), slice(0, pair.x.shape[-1])), counted)))
        return sum(errors) / len(errors)

    def _window(self, pair: FitPair, step: int) -> Span:
        draws = torch.Generator().manual_seed(step)
        reach = self.network.pixels.reach
        spans = []
        for whole, real in zip(pair.x.shape[-2:], pair.after.shape[-2:], strict=True):
            side, last = min(WINDOW, whole), min(whole, real + reach)
            top = int(torch.randint(max(0, last - side) + 1, (), generator=draws))
            spans.append(slice(top, top + side))
        return spans[0], spans[1]

    def _error(self, pair: FitPair, window: Span, counted: Tensor) -> Tensor:
        """Mean squared error in a window, of the pixels that count there."""
        network = self.network
        tokens, grid = pair.scene or network.read_scene(pair.x, self.text.to(pair.x.dtype))
        edited = recolour(pair.before[..., *window], network.pixels(pair.x[..., *window], tokens, grid, window))
        # At a window's border convolutions see zeros where the picture has pixels; what pads the picture has no target.
        (top, bottom), (left, right) = (
            _clear(span, whole, real, network.pixels.reach)
            for span, whole, real in zip(window, pair.x.shape[-2:], counted.shape, strict=True)
        )
        chosen = counted[top:bottom, left:right]
        rows = slice(top - window[0].start, bottom - window[0].start)
        columns = slice(left - window[1].start, right - window[1].start)
        error: Tensor = (edited[..., rows, columns] - pair.after[..., top:bottom, left:right])[..., chosen]
        return error.float().square().mean()


def _clear(span: slice, whole: int, real: int, reach: int) -> tuple[int, int]:
    """First and last pixel of a span that are right and inside the picture (`real` of `whole` pixels)."""
    stop = span.stop - (reach if span.stop < whole else 0)
    return span.start + (reach if span.start else 0), min(stop, real)


def _held_out(height: int, width: int) -> Tensor:
    """Every fifth square of CELL pixels, along a knight's move: `[h, w]` bool."""
    row, column = torch.arange(height)[:, None] // CELL, torch.arange(width)[None, :] // CELL
    return (row + 2 * column) % 5 == 3
