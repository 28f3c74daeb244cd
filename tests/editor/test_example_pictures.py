"""Pairs of an example that do not show one scene twice are refused; other sizes are scaled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from openwu.backbones.embedded.shown.encoder import THUMBNAIL, TILE
from openwu.editor.shown.pairs import LEAST_SIDE, read_examples
from openwu.errors import ExampleError

PHOTOS = Path(__file__).parents[2] / "photos"


@pytest.fixture(scope="module")
def before() -> Image.Image:
    picture = Image.open(PHOTOS / "alpaca.jpg").convert("RGB")
    picture.thumbnail((384, 384))
    return picture


def moved(picture: Image.Image, right: int) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(picture), right, axis=1))


def test_a_picture_after_of_another_size_is_scaled(before: Image.Image) -> None:
    small = ImageOps.autocontrast(before).resize((before.width // 2, before.height // 2))
    ((first, second),) = read_examples([(before, small)])
    assert first.size == second.size == before.size


@pytest.mark.parametrize("look", ["negative", "grey", "same"])
def test_an_edit_of_colours_keeps_the_scene(before: Image.Image, look: str) -> None:
    after = {"negative": ImageOps.invert(before), "grey": before.convert("L"), "same": before}[look]
    assert len(read_examples([(before, after), (before, after)])) == 2


def test_what_does_not_show_one_scene_is_refused(before: Image.Image) -> None:
    other = Image.open(PHOTOS / "cabrillo.jpg").convert("RGB").resize(before.size)
    with pytest.raises(ExampleError, match=r"one shape, got .* crop both alike"):
        read_examples([(before, before.crop((0, 0, before.width // 2, before.height)))])
    with pytest.raises(ExampleError, match=r"example 2: .*do not show the same scene"):
        read_examples([(before, before), (before, other)])
    with pytest.raises(ExampleError, match=r"shifted .* about 1[0-9] pixels to the right and 0 down; align them"):
        read_examples([(before, moved(before, 16))])


def test_a_pair_that_is_too_small_to_show_anything_is_refused(before: Image.Image) -> None:
    """Its sides count one by one, before and after, in every pair."""
    dot, least = before.resize((1, 1)), before.resize((LEAST_SIDE, LEAST_SIDE))
    assert len(read_examples([(least, least)])) == 1
    assert {TILE, THUMBNAIL} == {LEAST_SIDE}
    with pytest.raises(
        ExampleError, match=r"example: expected .* at least 32 pixels on a side, got 1 x 1 before .* larger"
    ):
        read_examples([(dot, dot)])
    low = before.resize((400, LEAST_SIDE - 1))
    with pytest.raises(ExampleError, match=r"example 2: expected .* got 400 x 31 before and 400 x 31 after"):
        read_examples([(before, before), (low, low)])
    with pytest.raises(ExampleError, match=r"got 32 x 32 before and 1 x 1 after"):
        read_examples([(least, dot)])
