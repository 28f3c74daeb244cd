"""Effects that follow the size of a photo: what is reduced, and that the rest sees every pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwu import Editor, EditRequest
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.catalogue import known_edits
from openwu.backbones.embedded.scale import SIDES, enlarged, factor, reduced
from openwu.images import Photo


def photo(height: int, width: int, kind: Any = np.uint8) -> Photo:
    limit = np.iinfo(kind).max
    values = np.random.default_rng(height + width).integers(0, limit, (height, width, 3), kind, endpoint=True)
    return Photo(values, alpha=values[:, :, 0].copy(), icc=None, texts=(("Comment", "kept"),))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 9), st.sampled_from([np.uint8, np.uint16]))
def test_a_reduced_photo_has_the_means(height: int, width: int, by: int, kind: Any) -> None:
    source = photo(height, width, kind)
    small = reduced(source, by).pixels
    assert small.dtype == kind
    assert small.shape == (-(-height // by), -(-width // by), 3)
    for row, column in {(0, 0), (small.shape[0] - 1, small.shape[1] - 1)}:
        block = source.pixels[row * by : (row + 1) * by, column * by : (column + 1) * by].astype(float)
        assert np.abs(small[row, column] - block.mean((0, 1))).max() <= 0.5


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 9), st.sampled_from([np.uint8, np.uint16]))
def test_enlarging_keeps_size_depth_transparency_and_level(height: int, width: int, by: int, kind: Any) -> None:
    source = photo(height, width, kind)
    flat = source.with_pixels(np.full_like(source.pixels, np.iinfo(kind).max // 3))
    large = enlarged(reduced(flat, by), source, by)
    assert (large.pixels == flat.pixels).all()
    assert large.alpha is source.alpha
    assert large.texts == source.texts


def test_a_slope_stays_where_it_is() -> None:
    ramp = np.broadcast_to(np.linspace(0, 65535, 240)[None, :, None], (30, 240, 3)).astype(np.uint16)
    source = Photo(ramp.copy())
    large = enlarged(reduced(source, 4), source, 4).pixels.astype(int)
    assert np.abs(large - ramp)[:, 8:-8].max() <= 40  # a shift by a pixel would be 274


def test_rows_that_keep_their_detail_get_the_photos() -> None:
    source = photo(240, 90)
    small = reduced(source, 3)
    assert (enlarged(small, source, 3, small).pixels.astype(int) - source.pixels)[:, 6:-6].std() < 0.5
    flat = small.pixels.copy()
    flat[:40] = 128
    mixed = enlarged(small.with_pixels(flat), source, 3, small).pixels.astype(int)
    assert np.abs(mixed[:90] - 128).max() <= 1
    assert (mixed - source.pixels)[150:].std() < 0.5
    grey = Photo(np.full((240, 90, 3), 77, np.uint8))
    assert (enlarged(reduced(grey, 3), grey, 3, reduced(grey, 3)).pixels == 77).all()


def test_factors() -> None:
    assert set(SIDES) <= set(known_edits())
    assert factor("brighten", (9000, 6000)) == 1
    assert [factor("oil", (side, 100)) for side in (100, 512, 767, 768, 6000)] == [1, 1, 1, 2, 12]
    assert factor("pencil", (100, 2048)) == 2


@pytest.mark.slow
def test_an_effect_is_as_large_as_on_a_small_photo() -> None:
    """Of the shipped model: dots of a photo three times as large are three times as large."""
    editor = Editor.from_pretrained()
    assert isinstance(editor.backbone, EmbeddedBase)
    small = Photo(np.full((480, 640, 3), 128, np.uint8))
    large = Photo(np.full((1440, 1920, 3), 128, np.uint8))
    dots = editor.edit(small.to_image(), "apply a halftone effect").photo.pixels[:, :, 1].astype(float)
    spread = editor.edit(large.to_image(), "apply a halftone effect").photo.pixels[:, :, 1].astype(float)
    for pixels, period in ((dots, 1), (spread, 3)):
        spectrum = np.abs(np.fft.rfft(pixels - pixels.mean(1, keepdims=True), axis=1)).mean(0)
        assert pixels.shape[1] / spectrum.argmax() == pytest.approx(8 * period, rel=0.02)


def test_rows_of_a_batch_that_differ_in_their_factor_are_edited_as_alone() -> None:
    editor = Editor.from_pretrained()
    large, tiny = photo(80, 2100).to_image().convert("RGB"), photo(40, 60).to_image().convert("RGB")
    requests = [(large, "pencil drawing"), (large, "brighter please"), (tiny, "pencil drawing")]
    together = editor.edit_batch([EditRequest(images=[image], instruction=text) for image, text in requests])
    for (image, text), result in zip(requests, together, strict=True):
        alone = editor.edit(image, text)
        assert (alone.photo.pixels == result.photo.pixels).all()
        assert result.photo.size == image.size
