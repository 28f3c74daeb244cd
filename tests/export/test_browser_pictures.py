"""The page's JavaScript prepares and finishes pictures as Python does: noise, tiles, padding, exact colours."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from node import node
from PIL import Image

from openwu import Editor
from openwu.adapters.merge import merged_copy
from openwu.backbones.embedded import scale
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.condition import CONDITION_SIDE, condition_pixels
from openwu.backbones.embedded.network import noise_plane, pad_mirrored, place_planes
from openwu.backbones.embedded.piecewise.pieces import PiecewiseEdit, as_pixels, as_unit
from openwu.export.embedded import tiles
from openwu.export.embedded.rules import rules
from openwu.images import Photo
from openwu.types import LoadingOptions, Understood

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's modules")

TILES = {"whole": tiles.WHOLE, "core": tiles.CORE, "margin": tiles.MARGIN, "cell": 64}
PHOTO = Path(__file__).parents[2] / "photos/life_by_aitzol_berasategi.jpg"
EDITS = ("make it look like an old photograph", "blur it", "add a vignette")


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.from_pretrained(loading=LoadingOptions(dtype=torch.float32))


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
        expected = [[tile.top, tile.left, tile.height, tile.width] for tile in tiles.tiles_of(width, height)]
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


@pytest.mark.parametrize(("height", "width", "by"), [(40, 60, 2), (41, 61, 2), (50, 31, 3), (1400, 17, 7)])
def test_effects_follow_the_size_alike(height: int, width: int, by: int, tmp_path: Path) -> None:
    code = """
    import { enlarged, factorOf, reduced } from "./picture.js";
    const small = reduced(given.image, given.by);
    const factors = given.sizes.map(([width, height]) => factorOf("oil", { width, height }, given.tables));
    const large = [...enlarged(small, given.image, given.by).data];
    console.log(JSON.stringify({ small: [...small.data], large, factors }));
    """
    source, sizes = photo(height, width), [(512, 10), (767, 768), (768, 10), (1280, 10), (10, 1281), (6000, 4000)]
    given = {"image": rgba(source), "by": by, "sizes": sizes, "tables": rules()["scale"]}
    found = node(tmp_path, code, given)
    small = scale.reduced(source, by)
    assert (rgb(found["small"], small) == small.pixels).all()
    large = scale.enlarged(small, source, by).pixels
    assert np.abs(rgb(found["large"], source).astype(int) - large.astype(int)).max() <= 1
    assert found["factors"] == [scale.factor("oil", size) for size in sizes] == [1, 2, 2, 2, 3, 12]


@pytest.mark.parametrize(("height", "width", "by"), [(41, 61, 2), (90, 31, 3)])
def test_detail_is_given_back_alike(height: int, width: int, by: int, tmp_path: Path) -> None:
    code = """
    import { enlarged } from "./picture.js";
    const large = enlarged(given.edited, given.image, given.by, given.small, given.tables);
    console.log(JSON.stringify({ large: [...large.data] }));
    """
    source = photo(height, width)
    small = scale.reduced(source, by)
    pixels = small.pixels.copy()
    pixels[: len(pixels) // 2] = pixels[: len(pixels) // 2].mean((0, 1)).astype(np.uint8)
    edited = small.with_pixels(pixels)
    given = {"image": rgba(source), "small": rgba(small), "edited": rgba(edited), "by": by, "tables": rules()["scale"]}
    found = rgb(node(tmp_path, code, given)["large"], source)
    large = scale.enlarged(edited, source, by, small).pixels
    assert np.abs(found.astype(int) - large.astype(int)).max() <= 1


def test_tiles_are_blended_into_the_same_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(tiles, "WHOLE", 100)
    source = photo(1100, 40)
    found = node(tmp_path, code, {"image": rgba(source), "tiles": TILES | {"whole": 100}})
    grid = tiles.tiles_of(40, 1100)
    assert found["count"] == len(grid) > 1
    parts = []
    for index, tile in enumerate(grid):
        numbers = torch.arange(3 * tile.height * tile.width, dtype=torch.float64)
        values = ((numbers * 37) % 101 / 100 + index) / len(grid)
        parts.append((tile, values.float().view(3, tile.height, tile.width)))
    expected = as_pixels(tiles.blended_tiles(parts, 40, 1100), source.pixels).astype(int)
    assert np.abs(rgb(found["data"], source).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(1536, 1024), (1537, 1024), (3000, 2000), (897, 1792)])
def test_weights_of_tiles_add_up_to_one(width: int, height: int) -> None:
    grid = tiles.tiles_of(width, height)
    whole = tiles.blended_tiles([(tile, torch.ones(3, tile.height, tile.width)) for tile in grid], width, height)
    assert (len(grid) > 1) is (width * height > tiles.WHOLE)
    assert torch.allclose(whole, torch.ones(3, height, width))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("instruction", EDITS)
def test_tiles_are_close_to_the_whole_pass(instruction: str, editor: Editor) -> None:
    """A tile does not see past its margins: levels of 255 between the page's picture and the editor's."""
    with Image.open(PHOTO) as image:
        source = Photo(np.asarray(image.convert("RGB").resize((1300, 1216))))
    base = editor.backbone
    assert isinstance(base, EmbeddedBase)
    assert len(tiles.tiles_of(*source.size)) == 4
    network = merged_copy(base.network, editor.adapt(source, instruction))
    text = base.instruction([instruction])
    job = PiecewiseEdit(network, [source], [0], text)
    for stage in job.stages():
        for task in stage:
            task()
    whole = job.edited()[0].pixels.astype(int)
    differences = np.abs(tiles.edited_in_tiles(network, source, 0, text).pixels.astype(int) - whole)
    assert np.abs(whole - source.pixels.astype(int)).mean() > 2  # something was edited
    assert differences.mean() < 0.05
    assert np.quantile(differences, 0.999) <= 2


@pytest.mark.parametrize(
    ("edit", "degree", "strength", "grey", "share"),
    [
        ("black_and_white", "normal", 1.0, False, 1.0),
        ("black_and_white", "little", 1.0, False, 1.0),
        ("black_and_white", "normal", 0.3, False, 1.0),
        ("black_and_white", "normal", 1.5, False, 1.0),
        ("black_and_white", "normal", -1.0, False, 1.0),
        ("sepia", "normal", 1.0, False, 1.0),
        ("sepia", "normal", 0.5, False, 1.0),
        ("sepia", "normal", 1.5, False, 1.0),
        ("brighten", "normal", 1.0, True, 0.5),
        ("brighten", "normal", 1.0, False, 1.4),
        ("brighten", "normal", 0.25, False, 1.4),
        ("warm", "normal", 0.75, True, 1.0),
    ],
)
def test_pictures_are_finished_as_the_editor_finishes_them(
    edit: str, degree: str, strength: float, grey: bool, share: float, editor: Editor, tmp_path: Path
) -> None:
    code = """
    import { finished } from "./picture.js";
    const { before, after, wish, strength, tables } = given;
    console.log(JSON.stringify([...finished(before, after, wish, strength, tables).data]));
    """
    before, after = photo(20, 30), Photo(photo(30, 21).pixels.reshape(21, 30, 3)[:20])
    if grey:
        before = Photo(np.repeat(before.pixels[:, :, :1], 3, axis=2), grey=True)
    wish = {"reading": {"edit": edit, "degree": degree}, "strength": share}
    given = {
        "before": rgba(before),
        "after": rgba(after),
        "wish": wish,
        "strength": strength,
        "tables": rules()["guarantees"],
    }
    found = rgb(node(tmp_path, code, given), before)
    base = editor.backbone
    assert isinstance(base, EmbeddedBase)
    understood = [Understood(edit, 1.0, degree, share, (), "")]
    expected = base.finish(after, base.read((before,), (edit,)), understood, strength).pixels
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
