"""The grid of patches in smooth areas: taken out, and nothing else with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import openwu
from openwu.backbones.embedded.pattern import MEANT, _about_neighbours, _about_plane, _to_patches, without_pattern
from openwu.data.suite import EDITS
from openwu.data.suite.photographs import load_test_photographs

PATCH = 8


def _sky(height: int = 96, width: int = 128) -> Tensor:
    """A smooth picture `[1, 3, h, w]` in 0..1."""
    down, right = torch.linspace(0.2, 0.5, height), torch.linspace(0.0, 0.3, width)
    return (down[:, None] + right)[None, None].expand(1, 3, -1, -1).contiguous()


def _tiled(cell: Tensor, like: Tensor) -> Tensor:
    """A pattern `[p, p]` repeated over a picture."""
    return cell.repeat(like.shape[-2] // PATCH, like.shape[-1] // PATCH)


def _cell(levels: float) -> Tensor:
    """A pattern of a patch with this root mean square in levels of 255, without slope."""
    cell = torch.zeros(PATCH, PATCH)
    cell[::2, ::2] += 1
    cell[1::2, 1::2] += 1
    cell -= cell.mean()
    return cell / cell.square().mean().sqrt() * levels / 255


def test_a_grid_on_a_smooth_picture_goes() -> None:
    picture = _sky()
    edited = 1.2 * picture + _tiled(_cell(2), picture)
    mended = without_pattern(edited, picture, PATCH)
    before, after = ((each - 1.2 * picture).abs().max() * 255 for each in (edited, mended))
    assert before > 1.9
    assert after < 0.1


def test_structure_noise_and_strong_patterns_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = _sky()
    textured = (picture + 0.1 * torch.randn(picture.shape, generator=generator)).clamp(0, 1)
    grid = _tiled(_cell(2), picture)
    torch.testing.assert_close(without_pattern(textured + grid, textured, PATCH), (textured + grid).clamp(0, 1))
    dots = picture + _tiled(_cell(2.1 * MEANT * 255), picture)
    torch.testing.assert_close(without_pattern(dots, picture, PATCH), dots)
    grain = picture + 0.03 * torch.randn(picture.shape, generator=generator)
    change = without_pattern(grain, picture, PATCH) - grain
    assert change.square().mean() < 2e-3 * (grain - picture).square().mean()


def test_slopes_and_the_untouched_picture_stay() -> None:
    picture = _sky()
    vignette = picture * torch.linspace(1, 0.6, picture.shape[-1])
    assert (without_pattern(vignette, picture, PATCH) - vignette).abs().max() < 0.2 / 255
    assert torch.equal(without_pattern(picture, picture, PATCH), picture)


def test_a_pattern_is_that_of_its_neighbourhood() -> None:
    """Pieces of a picture with their surroundings compute what the whole does."""
    generator = torch.Generator().manual_seed(1)
    picture = _sky(160, 192)
    edited = picture + _tiled(_cell(3), picture) * torch.rand(1, 1, 1, 192, generator=generator)
    whole = without_pattern(edited, picture, PATCH)
    rows, columns = slice(24, 160), slice(48, 192)
    part = without_pattern(edited[..., rows, columns], picture[..., rows, columns], PATCH)
    torch.testing.assert_close(part[..., 40:, 40:], whole[..., 64:160, 88:192])


@pytest.mark.parametrize("like", ["smooth", "textured"])
def test_gradients_are_finite(like: str) -> None:
    picture = _sky() if like == "smooth" else torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    edited = picture.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(without_pattern(edited, picture, PATCH).square().sum(), edited)
    assert bool(gradient.isfinite().all())


# The shipped model, on a photograph with a sky


def _pattern(picture: Tensor, where: Tensor) -> float:
    """From trough to peak of what patches `where` [patches] share, steps between them included, in levels of 255."""
    common = _about_neighbours(picture, PATCH).flatten(-2)[0, :, :, where].mean(-1) * 255  # [3, m]
    return float((common.amax(-1) - common.amin(-1)).max())


def _smooth(picture: Tensor) -> Tensor:
    """Which patches differ from a plane by less than two levels: `[patches]`."""
    return (_about_plane(PATCH) @ _to_patches(picture, PATCH)[0]).std(1).amax(0) < 2 / 255


DRAWN = {"halftone", "pixel_art", "cross_stitch", "stained_glass", "add_jpeg", "pencil", "blueprint"}
"""Edits whose answers have a grid or strokes of their own."""
GRAINY = {"add_noise", "salt_pepper", "age", "take_grain"}
"""Edits that leave grain in the sky, of which the mean of some hundred patches is not zero."""

STEEP = {"unfade", "invert", "restore"}
"""Edits that leave up to one level: most of the sky lands beyond black or white, or they draw there."""


@pytest.mark.parametrize(
    "edit",
    [
        "darken",
        "tint_green",
        *(pytest.param(name, marks=pytest.mark.slow) for name in EDITS if name not in DRAWN | GRAINY),
    ],
)
def test_an_edit_leaves_no_grid_in_the_sky(edit: str, shipped: openwu.Editor) -> None:
    photographs = load_test_photographs(384)
    picture = photographs["rocket"][:, :256, :256]
    smooth = _smooth(picture[None])
    assert int(smooth.sum()) > 300
    images = [picture, photographs["coffee"]] if EDITS[edit].needs_reference else picture
    edited = torch.from_numpy(
        np.asarray(shipped.edit(images, edit=edit, seed=0, allow_out_of_scope=True).image.convert("RGB")).copy()
    )
    grid = _pattern(edited.permute(2, 0, 1)[None].float() / 255, smooth)
    assert grid < _pattern(picture[None], smooth) + (1 if edit in STEEP else 0.5)


@pytest.fixture(scope="module")
def shipped() -> openwu.Editor:
    return openwu.Editor.from_pretrained()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_pattern_of_nothing_is_finite_in_onnx(tmp_path: Path) -> None:
    """The exporter drops a tiny summand, and a flat picture then divides nothing by nothing."""
    runtime = pytest.importorskip("onnxruntime")

    class Without(nn.Module):
        def forward(self, edited: Tensor, picture: Tensor) -> Tensor:
            return without_pattern(edited, picture, PATCH)

    picture = torch.full((1, 3, 32, 32), 0.5)
    program = torch.onnx.export(Without().eval(), (picture, picture), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "pattern.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "pattern.onnx"))
    (found,) = session.run(None, {each.name: picture.numpy() for each in session.get_inputs()})
    assert np.array_equal(found, picture.numpy())
