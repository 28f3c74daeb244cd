"""The check of examples: what is reproduced is measured, said, and refused where it is too little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.editor.series import make_series
from openwu.editor.shown import reproduction as check
from openwu.editor.shown.reproduction import Reproduction, reproduction
from openwu.errors import ExampleError, PictureError
from openwu.images import Photo
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel
from openwu.types import LoadingOptions

Scene = Callable[..., NDArray[np.uint8]]


def test_shares_are_of_the_change_over_all_pairs() -> None:
    one = Reproduction((0.2,), (0.05,))
    assert one.share == pytest.approx(0.75)
    assert one.psnr == pytest.approx(26.02, abs=0.01)
    assert str(one) == "example: 75% of its change reproduced (26.0 dB)"
    assert one.note is None
    two = Reproduction((0.2, 0.1), (0.02, 0.11))
    assert two.share == pytest.approx(1 - np.hypot(0.02, 0.11) / np.hypot(0.2, 0.1))
    assert str(Reproduction((0.1,), (0.3,))).startswith("example: 0%")


def test_a_low_share_is_noted_and_a_lower_one_refused() -> None:
    partly = Reproduction((0.1,), (0.1 * (1 - (check.ACCEPTED + check.CLEAR) / 2),))
    partly.check()
    assert partly.note is not None
    assert "tone and colour" in partly.note
    with pytest.raises(ExampleError, match=r"tone and colour.*--allow-out-of-scope"):
        Reproduction((0.1,), (0.09,)).check()
    with pytest.raises(ExampleError, match=r"--refine"):
        Reproduction((0.1,), (0.09,)).check()
    # The share after training on the example says less.
    Reproduction((0.1,), (0.065,), before=check.ACCEPTED).check()
    Reproduction((0.1,), (0.035,), before=0.1).check()
    with pytest.raises(ExampleError, match=r"50%.*after training on it, 60% are needed.* Refine for more steps"):
        Reproduction((0.1,), (0.05,), before=0.1).check()
    with pytest.raises(ExampleError, match=r"pair 1: 90%, pair 2: 0%; all must show the same edit"):
        Reproduction((0.1, 0.1), (0.01, 0.15)).check()
    with pytest.raises(ExampleError, match="look alike"):
        Reproduction((0.001,), (0.0005,)).check()


def test_large_examples_are_compared_at_a_small_size_with_their_grain(scene: Scene) -> None:
    before = Photo(np.full((900, 600, 3), 100, np.uint8))
    grain = np.random.default_rng(0).normal(120, 12, (900, 600, 1)).round().clip(0, 255).astype(np.uint8)
    sizes: list[tuple[int, int]] = []

    def brighter(photos: list[Photo]) -> list[Photo]:
        sizes.extend(photo.size for photo in photos)
        return [photo.with_pixels((photo.pixels + 20).astype(np.uint8)) for photo in photos]

    found = reproduction([(before, Photo(np.repeat(grain, 3, axis=2)))], brighter)
    assert max(sizes[0]) <= check.SIDE
    assert found.changes[0] * 255 == pytest.approx(np.hypot(20, 12), rel=0.03)
    assert found.errors[0] * 255 == pytest.approx(12, rel=0.03)


@pytest.fixture(scope="module")
def editor(embedded_config: EmbeddedConfig, tmp_path_factory: pytest.TempPathFactory) -> Editor:
    """A tiny model that reads examples, whose generator has not learned anything."""
    folder = tmp_path_factory.mktemp("model") / "untrained"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EmbeddedModel(embedded_config.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1))
        model.generator.init_weights(0.3)
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.02)
    model.save_pretrained(folder, torch.float32)
    return Editor.from_pretrained(folder, loading=LoadingOptions(dtype=torch.float32))


@pytest.fixture(scope="module")
def pair(scene: Scene) -> tuple[NDArray[Any], NDArray[Any]]:
    before = scene(40, 32, seed=3)
    return before, (before // 2).astype(np.uint8)


def test_every_way_to_an_adapter_refuses_what_is_not_reproduced(
    editor: Editor, pair: tuple[NDArray[Any], NDArray[Any]], scene: Scene
) -> None:
    photo = scene(24, 20)
    ways: list[Callable[[], object]] = [
        lambda: editor.edit([photo], example=[pair]),
        lambda: editor.edit([photo], example=[pair, pair], per_photo=True),
        lambda: editor.edit([photo], "darker", example=[pair], strength=0.5),
        lambda: editor.edit_batch([EditRequest([photo], example=[pair])]),
        lambda: editor.adapt(example=[pair]),
        lambda: editor.adapt([photo], example=[pair]),
    ]
    for way in ways:
        with pytest.raises(ExampleError, match="not understood"):
            way()


def test_what_is_tried_anyway_says_how_much_is_reproduced(
    editor: Editor, pair: tuple[NDArray[Any], NDArray[Any]], scene: Scene
) -> None:
    result = editor.edit([scene(24, 20)], example=[pair], strength=0.5, allow_out_of_scope=True)
    assert result.reproduced is not None
    assert result.reproduced.share < check.ACCEPTED
    assert result.timings["example"] > 0
    assert editor.reproduction(result.adapter, [pair]) == result.reproduced
    before, after = (Photo(each) for each in pair)
    made = editor.edit([before], adapter=result.adapter).photo.floats()
    error = float(np.sqrt(np.mean(np.square(made - after.floats()))))
    assert result.reproduced.errors[0] == pytest.approx(error, abs=1e-6)
    assert editor.edit([scene(24, 20)], adapter=result.adapter).reproduced is None
    with pytest.raises(PictureError, match="at least one pair"):
        editor.reproduction(result.adapter, [])


def test_a_clear_example_is_edited_without_a_flag(
    editor: Editor, pair: tuple[NDArray[Any], NDArray[Any]], scene: Scene
) -> None:
    """What the adapter itself makes of a picture is an example that it reproduces in full."""
    adapter = editor.adapt(example=[pair], allow_out_of_scope=True)
    own = editor.edit([pair[0]], adapter=adapter).photo.pixels
    assert editor.reproduction(adapter, [(pair[0], own)]).share > check.CLEAR


def test_a_clip_is_refused_before_it_is_edited(
    editor: Editor, pair: tuple[NDArray[Any], NDArray[Any]], scene: Scene
) -> None:
    request = EditRequest([scene(24, 20)], example=[pair])
    with pytest.raises(ExampleError, match="not understood"):
        make_series(editor, request)
    tiny = pair[0][:8, :8], pair[1][:8, :8]
    with pytest.raises(ExampleError, match=r"at least 32 pixels on a side, got 8 x 8"):
        make_series(editor, EditRequest([scene(24, 20)], example=[tiny]), allow_out_of_scope=True)
    series = make_series(editor, request, allow_out_of_scope=True)
    assert series.reproduced == editor.reproduction(series.adapters[0], [pair])
