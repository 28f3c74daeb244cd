"""What edits of the model inside the package guarantee: grey, tones, numbers, and complaints that are cured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openwu.backbones.embedded.guarantees import _COMPLETE
from openwu.data.suite import BASE_EDITS
from openwu.editor.editor import Editor
from openwu.errors import InstructionError
from openwu.images import Photo, read_picture

DTYPES = (np.uint8, np.uint16)


@pytest.fixture(scope="module")
def shipped() -> Editor:
    return Editor.from_pretrained()


def scene(dtype: Any, light: float = 0.5) -> np.ndarray:
    """A smooth coloured picture `[48, 64, 3]` around a lightness."""
    y, x = np.mgrid[0:48, 0:64] / 48
    waves = np.stack([np.sin(5 * x), np.cos(4 * y), np.sin(3 * (x + y))], axis=2)
    return np.rint(np.clip(light + 0.2 * waves, 0, 1) * np.iinfo(dtype).max).astype(dtype)


def is_neutral(photo: Photo) -> bool:
    return bool((photo.pixels == photo.pixels[:, :, :1]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_grey_file_stays_grey_at_its_depth(shipped: Editor, tmp_path: Path, dtype: Any) -> None:
    Image.fromarray(scene(dtype)[:, :, 0]).save(tmp_path / "grey.png")
    for instruction in ("blur it", "make it brighter", "make it black and white"):
        result = shipped.edit(tmp_path / "grey.png", instruction)
        assert is_neutral(result.photo)
        assert result.photo.pixels.dtype == dtype
        result.save(tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as written:
            assert written.mode == ("L" if dtype == np.uint8 else "I;16")
        (tmp_path / "out.png").unlink()
    coloured = shipped.edit(tmp_path / "grey.png", "tint it blue").photo
    assert not is_neutral(coloured)  # an edit that gives colours does


@pytest.mark.parametrize("dtype", DTYPES)
def test_black_and_white_is_neutral_in_full_and_not_by_halves(shipped: Editor, dtype: Any) -> None:
    picture = scene(dtype)
    assert is_neutral(shipped.edit(picture, "make it black and white").photo)
    assert is_neutral(shipped.edit(picture, "make it black and white", strength=1.5).photo)
    assert not is_neutral(shipped.edit(picture, "make it black and white", strength=0.5).photo)
    assert not is_neutral(shipped.edit(picture, "blur it").photo)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sepia_has_one_colour_for_each_lightness(shipped: Editor, dtype: Any) -> None:
    values = shipped.edit(scene(dtype), "make it sepia").photo.floats()
    level = (values[:, :, 1] - 0.02) / 0.86
    for channel, factor in ((0, 1.08), (2, 0.64)):
        expected = np.clip(level * factor + 0.02, 0, 1)
        assert np.abs(values[:, :, channel] - expected).max() <= 1.5 / np.iinfo(dtype).max


def test_strength_zero_gives_back_every_bit(shipped: Editor, tmp_path: Path) -> None:
    picture = scene(np.uint16)
    for instruction in ("make it sepia", "blur it", "make it black and white"):
        assert np.array_equal(shipped.edit(picture, instruction, strength=0).photo.pixels, picture)


@pytest.mark.parametrize("edit", BASE_EDITS)
def test_a_strength_above_one_is_more_of_the_edit_unless_it_is_complete(shipped: Editor, edit: str) -> None:
    """Also of edits that the base makes without its adapter, which no scale of the adapter would change."""
    picture, tried = scene(np.uint16), shipped.backbone.edits()[edit].withdrawn
    results = [
        shipped.edit(picture, edit=edit, strength=strength, allow_out_of_scope=tried) for strength in (0.5, 1, 1.3, 1.8)
    ]
    moved = [np.abs(result.photo.floats() - Photo(picture).floats()).mean() for result in results]
    assert 0 < moved[0] < moved[1]
    if edit in _COMPLETE:
        assert all(np.array_equal(result.photo.pixels, results[1].photo.pixels) for result in results[2:])
        assert not results[1].photo.notes
        assert "is complete at strength 1" in results[2].photo.notes[-1]
    else:
        assert moved[1] < moved[2] < moved[3]
        assert not results[3].photo.notes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("edit", "opposite"),
    [("brighten", "darken"), ("warm", "cool"), ("saturate", "desaturate"), ("contrast_up", "contrast_down")],
)
def test_below_zero_an_edit_is_turned_round(shipped: Editor, dtype: Any, edit: str, opposite: str) -> None:
    picture = scene(dtype)
    for one, other in ((edit, opposite), (opposite, edit)):
        wanted = shipped.edit(picture, edit=other).photo.floats()
        turned = shipped.edit(picture, edit=one, strength=-1).photo
        assert turned.pixels.dtype == dtype
        before = np.square(wanted - Photo(picture).floats()).mean()
        assert np.square(wanted - turned.floats()).mean() < before / 2
    grey = Photo(np.repeat(picture[:, :, :1], 3, axis=2), grey=True)
    assert is_neutral(shipped.edit(grey, edit="brighten", strength=-1).photo)


def test_an_edit_without_another_direction_is_refused_below_zero(shipped: Editor) -> None:
    refused = "strength: expected 0 or more for pencil, got -0.5: .* no other direction"
    picture = scene(np.uint8)
    adapter = shipped.adapt(picture, "pencil drawing")
    for asked in (
        lambda: shipped.understand("pencil drawing", strength=-0.5),
        lambda: shipped.edit(picture, "pencil drawing", strength=-0.5),
        lambda: shipped.edit(picture, adapter=adapter, strength=-0.5),
        lambda: shipped.edit(picture, "brighten it", then="pencil drawing", strength=-0.5),
    ):
        with pytest.raises(InstructionError, match=refused):
            asked()


@pytest.mark.parametrize("complaint", ["underexposed", "too dark", "太暗了", "曝光不足"])
def test_a_complaint_about_darkness_makes_it_lighter(shipped: Editor, complaint: str) -> None:
    dark = scene(np.uint8, 0.25)
    assert shipped.edit(dark, complaint).photo.pixels.mean() > dark.mean() + 5


@pytest.mark.parametrize("complaint", ["too bright", "the photo is overexposed", "太亮了"])
def test_a_complaint_about_brightness_makes_it_darker(shipped: Editor, complaint: str) -> None:
    bright = scene(np.uint8, 0.75)
    assert shipped.edit(bright, complaint).photo.pixels.mean() < bright.mean() - 5


@pytest.mark.parametrize("complaint", ["颜色太淡", "not enough colour"])
def test_a_complaint_about_pale_colours_makes_them_stronger(shipped: Editor, complaint: str) -> None:
    def chroma(pixels: np.ndarray) -> float:
        return float((pixels.max(axis=2).astype(float) - pixels.min(axis=2)).mean())

    pale = scene(np.uint8)
    assert chroma(shipped.edit(pale, complaint).photo.pixels) > 1.1 * chroma(pale)


@pytest.mark.parametrize(("words", "change"), [("make it {}% brighter", 0.01), ("make it {}% darker", -0.01)])
def test_a_number_is_the_change_of_mid_grey(shipped: Editor, words: str, change: float) -> None:
    grey = np.full((48, 64, 3), 128, np.uint8)
    for percent in (5, 10, 20, 40):
        edited = shipped.edit(grey, words.format(percent)).photo.pixels.mean()
        assert edited / 128 - 1 == pytest.approx(percent * change, abs=0.02)


def test_a_saved_result_keeps_what_the_file_said(shipped: Editor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x013B] = "Zoe"
    Image.fromarray(scene(np.uint8)).save(tmp_path / "photo.jpg", exif=exif, dpi=(300, 300))
    shipped.edit(tmp_path / "photo.jpg", "make it brighter").save(tmp_path / "out.jpg")
    saved = read_picture(tmp_path / "out.jpg")
    assert saved.dpi == (300, 300)
    assert b"Zoe" in (saved.exif or b"")
