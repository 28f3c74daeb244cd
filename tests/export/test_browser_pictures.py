"""The page's JavaScript prepares and finishes pictures as Python does: noise, tiles, padding, exact colours."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from node import node

from openwu.backbones.embedded.condition import CONDITION_SIDE, condition_pixels
from openwu.backbones.embedded.guarantees import blended, guaranteed
from openwu.backbones.embedded.network import noise_plane, pad_mirrored, place_planes
from openwu.backbones.embedded.tiles import CORE, MARGIN, WHOLE, Canvas, as_unit, tile_grid, tiles_of
from openwu.export.embedded.rules import rules
from openwu.images import Photo
from openwu.types import Understood

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's modules")

TILES = {"whole": WHOLE, "core": CORE, "margin": MARGIN, "cell": 64}


def photo(height: int, width: int) -> Photo:
    return Photo(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rgba(photo: Photo) -> dict[str, object]:
    height, width = photo.pixels.shape[:2]
    data = np.dstack([photo.pixels, np.full((height, width), 255, np.uint8)])
    return {"width": width, "height": height, "data": data.flatten().tolist()}


def rgb(data: list[int], like: Photo) -> np.ndarray:
    return np.array(data, np.uint8).reshape(*like.pixels.shape[:2], 4)[:, :, :3]


@pytest.mark.parametrize(("width", "height", "seed"), [(64, 48, 0), (17, 131, 7), (33, 300, 2**31 + 5), (16, 129, 1)])
def test_noise_is_torchs(width: int, height: int, seed: int, tmp_path: Path) -> None:
    code = """
    import { noisePlane } from "./picture.js";
    console.log(JSON.stringify([...noisePlane(given.width, given.height, given.seed)]));
    """
    found = torch.tensor(node(tmp_path, code, {"width": width, "height": height, "seed": seed}))
    expected = noise_plane(width, height, seed).float().flatten()
    # Logarithm and cosine are rounded in another way: now and then the last of eleven bits differs.
    assert (found != expected).float().mean() < 0.01
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_tiles_are_the_same(tmp_path: Path) -> None:
    sizes = [(64, 64), (1536, 1024), (1537, 1024), (3000, 2000), (1024, 8000), (900, 1792), (4000, 769), (1665, 1665)]
    code = """
    import { tilesOf } from "./picture.js";
    console.log(JSON.stringify(given.sizes.map(([width, height]) => tilesOf(width, height, given.tiles))));
    """
    for (width, height), found in zip(sizes, node(tmp_path, code, {"sizes": sizes, "tiles": TILES}), strict=True):
        expected = [[tile.top, tile.left, tile.height, tile.width] for tile in tiles_of(width, height, TILES["cell"])]
        assert found == expected, (width, height)


@pytest.mark.parametrize(("height", "width"), [(70, 130), (16, 20), (64, 64), (17, 200)])
def test_inputs_of_a_pass_are_the_same(height: int, width: int, tmp_path: Path) -> None:
    code = """
    import { noisePlane, tileInputs } from "./picture.js";
    const noise = noisePlane(given.image.width, given.image.height, 0);
    const tile = [given.top, 0, given.image.height - given.top, given.image.width];
    const { picture, planes, dims } = tileInputs(given.image, noise, tile, 64);
    console.log(JSON.stringify({ picture: [...picture], planes: [...planes], dims }));
    """
    source, top = photo(height, width), min(3, height - 16)
    found = node(tmp_path, code, {"image": rgba(source), "top": top})
    window = (slice(top, height), slice(0, width))
    planes = torch.cat([noise_plane(width, height, 0)[:, *window].float(), place_planes(height, width, window)])
    for name, tensor in (("picture", as_unit(source.pixels[window])), ("planes", planes)):
        expected = pad_mirrored(tensor[None], -(height - top) % 64, -width % 64)
        assert found["dims"] == list(expected.shape)
        assert torch.allclose(torch.tensor(found[name]).view(expected.shape), expected, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(("height", "width"), [(40, 60), (30, 2560), (1536, 20), (3100, 16)])
def test_the_condition_reads_the_same_pixels(height: int, width: int, tmp_path: Path) -> None:
    code = """
    import { conditionView } from "./picture.js";
    const { values, dims } = conditionView(given.image, given.side);
    console.log(JSON.stringify({ values: [...values], dims }));
    """
    source = photo(height, width)
    found = node(tmp_path, code, {"image": rgba(source), "side": CONDITION_SIDE})
    expected = as_unit(condition_pixels(source))[None]
    assert found["dims"] == list(expected.shape)
    assert torch.allclose(torch.tensor(found["values"]).view(expected.shape), expected)


def test_tiles_are_blended_into_the_same_picture(tmp_path: Path) -> None:
    code = """
    import { Canvas, tilesOf } from "./picture.js";
    const grid = tilesOf(given.image.width, given.image.height, given.tiles);
    const canvas = new Canvas(given.image, given.tiles.margin, grid.length === 1);
    grid.forEach((tile, index) => {
      const [, , height, width] = tile;
      const value = (i) => (((i * 37) % 101) / 100 + index) / grid.length;
      canvas.add(tile, Float32Array.from({ length: 3 * height * width }, (_, i) => value(i)), [1, 3, height, width]);
    });
    console.log(JSON.stringify({ count: grid.length, data: [...canvas.pixels().data] }));
    """
    source, tiles = photo(1100, 40), {"whole": 100, "core": 768, "margin": 128}
    found = node(tmp_path, code, {"image": rgba(source), "tiles": tiles})
    grid = tile_grid(1100, 40, 768, 128, 64)
    assert found["count"] == len(grid) > 1
    canvas = Canvas([source], grid, 128)
    for index, tile in enumerate(grid):
        numbers = torch.arange(3 * tile.height * tile.width, dtype=torch.float64)
        values = ((numbers * 37) % 101 / 100 + index) / len(grid)
        canvas.add(tile, values.float().view(1, 3, tile.height, tile.width))
    expected = canvas.photos()[0].pixels.astype(int)
    assert np.abs(rgb(found["data"], source).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("edit", "degree", "strength", "grey", "share"),
    [
        ("black_and_white", "normal", 1.0, False, 1.0),
        ("black_and_white", "little", 1.0, False, 1.0),
        ("sepia", "normal", 1.0, False, 1.0),
        ("sepia", "normal", 0.5, False, 1.0),
        ("brighten", "normal", 1.0, True, 0.5),
        ("brighten", "normal", 1.0, False, 1.4),
        ("warm", "normal", 1.0, True, 1.0),
    ],
)
def test_what_is_exact_is_the_same(
    edit: str, degree: str, strength: float, grey: bool, share: float, tmp_path: Path
) -> None:
    code = """
    import { blended, guaranteed } from "./picture.js";
    const { before, after, reading, strength, grey, tables, share } = given;
    const whole = guaranteed(after, reading, strength, grey, tables);
    console.log(JSON.stringify([...blended(before, whole, share).data]));
    """
    before, after = photo(20, 30), Photo(photo(30, 21).pixels.reshape(21, 30, 3)[:20])
    given = {
        "before": rgba(before), "after": rgba(after), "reading": {"edit": edit, "degree": degree},
        "strength": strength, "grey": grey, "share": share, "tables": rules()["guarantees"],
    }  # fmt: skip
    found = rgb(node(tmp_path, code, given), before)
    understood = [Understood(edit, 1.0, degree, share, (), "")]
    expected = blended(before, guaranteed(after, understood, strength, grey), share).pixels
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
