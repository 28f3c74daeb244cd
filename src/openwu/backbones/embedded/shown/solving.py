"""The last layer's update of an edit that is shown, solved by least squares on the example itself.

The generator writes the update B A of every adapted layer. Of the last one its A says which eight features of a pixel
matter, and its B is a guess: what a pixel becomes is linear in B, so that the B under which the picture before comes
closest to the picture after, and stays near the guess, has a closed form. A generator that is trained through it writes
features from which little is left to guess (Bertinetto et al. 2019, "Meta-learning with differentiable closed-form
solvers"). The base's weights stay as they are, and the pictures that are edited later are not read.

Shapes: b requests, h and w the sides of a picture, c pixel channels, r rank, f = 4 r regressors of a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.backbones.embedded.network import TinyEditor, pad_mirrored, recolour
from openwu.kernels.modules import without_weights
from openwu.types import LORA, LORA_A, LORA_B, Adapter, Target

HEAD = "pixels.out"
"""The layer that is solved for."""
RIDGE = 1e-2
"""Weight of the distance from the generated B, each number in units of what its regressor varies by. Without the units,
generators that are trained through it make features larger and larger, until nothing holds B near the guess.
"""
TINY = 1e-8

Scope = Callable[[Adapter], AbstractContextManager[None]]
"""Applies an adapter to a network, such as `AdapterHandle.applied`."""


@dataclass(frozen=True)
class ShownView:
    """A picture before and after the edit for each request, on the network's grid."""

    x: Tensor
    """The network's channels `[b, 8, h, w]`, padded to whole attention windows."""
    scene: tuple[Tensor, tuple[int, int]]
    """What the blocks see, and the grid of patches."""
    before: Tensor
    """[b, 3, h, w] in 0..1"""
    after: Tensor
    """[b, 3, h, w]"""
    counted: Tensor
    """Pixels that count `[h, w]` bool."""


@torch.no_grad()
def read_view(network: TinyEditor, pair: tuple[Tensor, Tensor], planes: Tensor, text: Tensor) -> ShownView:
    """Read a picture before and one after, `[b, 3, h, w]` each; planes alike, text `[b, K, text_dim]`.

    All pixels count but those at whose border convolutions see zeros, unless the picture is hardly larger.
    """
    before, after = pair
    (height, width), cell, reach = before.shape[-2:], network.config.cell, network.pixels.reach
    x = pad_mirrored(network.inputs(before, planes), -height % cell, -width % cell)
    frame = reach if min(height, width) > 3 * reach else 0
    counted = torch.zeros(height, width, dtype=torch.bool)
    counted[frame : height - frame, frame : width - frame] = True
    return ShownView(x, network.read_scene(x, text.to(x.dtype)), before, after, counted)


def pixel_replica(network: TinyEditor) -> TinyEditor:
    """Return a frozen network that shares another's weights and has none of its hooks."""
    with without_weights():
        replica = TinyEditor(network.config)
    replica.load_state_dict(network.state_dict(), assign=True)
    return replica.requires_grad_(False)


def solvable(targets: Sequence[Target]) -> bool:
    """Whether adapters of these targets have a LoRA for the last layer, which is what is solved for."""
    return any(target.name == HEAD and target.operator == LORA for target in targets)


def solve_head(network: TinyEditor, applied: Scope, adapter: Adapter, views: Sequence[ShownView]) -> Adapter:
    """Return the adapter `[b]` with B of the last layer solved for on all views. Gradients reach all factors.

    `applied`: for this network and the adapter's targets, which are layers of the full-resolution path.
    """
    head = adapter.factors[HEAD]
    a = head[LORA_A].float()
    f = 4 * a.shape[1]
    normal, aim, pixels = a.new_zeros(len(a), f, f), a.new_zeros(len(a), f, 3), 0
    for view in views:
        (height, width), counted = view.before.shape[-2:], view.counted.to(a)
        with applied(adapter):
            hidden = network.pixels.hidden(view.x, *view.scene)
            affine = network.pixels.out(hidden)
        edited = recolour(view.before, affine[..., :height, :width].float())
        features = _features(hidden, a, network.pixels.out.kernel_size)[..., :height, :width].float()
        colours = counted * torch.cat([view.before - 0.5, torch.ones_like(view.before[:, :1])], dim=1)
        regressors = (colours[:, :, None] * features[:, None]).flatten(1, 2).flatten(2)  # [b, f, h w]
        left = (view.after - edited).flatten(2)
        with torch.autocast("cpu", enabled=False):  # bfloat16 would round the products of thousands of pixels
            normal = normal + regressors @ regressors.transpose(1, 2)
            aim = aim + regressors @ left.transpose(1, 2)
        pixels += int(view.counted.sum())
    sizes = torch.diag_embed(normal.diagonal(dim1=1, dim2=2) + TINY * pixels)
    change = torch.linalg.solve((normal + RIDGE * sizes).double(), aim.double())  # [b, f, 3]
    solved = head[LORA_B] + (_as_factor(change) / adapter.scale).to(head[LORA_B])
    return replace(adapter, factors={**adapter.factors, HEAD: {**head, LORA_B: solved}})


def _features(hidden: Tensor, a: Tensor, kernel: Sequence[int]) -> Tensor:
    """A of every request on its own features: `[b, c, h, w]` and `[b, r, c * k * k]` -> `[b, r, h, w]`."""
    b, c, h, w = hidden.shape
    weight = a.to(hidden.dtype).reshape(-1, c, *kernel)
    found = F.conv2d(hidden.reshape(1, b * c, h, w), weight, padding=kernel[0] // 2, groups=b)
    return found.view(b, -1, h, w)


def _as_factor(change: Tensor) -> Tensor:
    """Weights of regressors `[b, 4 r, 3]`, a colour's r features side by side -> B `[b, 12, r]`, see `recolour`."""
    weights = change.view(len(change), 4, -1, 3).permute(0, 3, 1, 2)  # [b, 3 to, 4 from, r]
    return torch.cat([weights[:, :, :3].flatten(1, 2), weights[:, :, 3]], dim=1)
