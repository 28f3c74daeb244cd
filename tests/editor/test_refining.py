"""Adapters that are trained on their example: better or the same, kept, counted, and refused where senseless."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.cli import parser
from openwu.editor import requests
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.editor.series import make_series
from openwu.editor.shown import refine
from openwu.errors import ExampleError, OpenwuError
from openwu.types import Adapter, LoadingOptions

Scene = Callable[..., NDArray[np.uint8]]
Pair = tuple[NDArray[Any], NDArray[Any]]
STEPS = 12


@pytest.fixture
def editor(folder: Path, tmp_path: Path) -> Editor:
    return Editor.from_pretrained(folder, loading=LoadingOptions(dtype=torch.float32), cache=tmp_path / "cache")


def test_steps_on_the_example_bring_it_closer_and_are_said_and_kept(
    editor: Editor, pair: Pair, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[tuple[int, int]] = []
    options: dict[str, Any] = {"example": [pair], "refine": STEPS, "allow_out_of_scope": True}
    result = editor.edit(scene(24, 20), **options, progress=lambda *each: reports.append(each))
    assert result.reproduced is not None
    assert result.reproduced.before is not None
    assert result.reproduced.share > result.reproduced.before + 0.1
    assert f"{round(100 * max(0, result.reproduced.before))}% -> " in str(result.reproduced)
    assert result.timings["refine"] > 0
    assert result.adapter.refined == (STEPS,)
    assert reports[0][0] == 0
    whole_and_growing(reports)
    start = editor.adapt(example=[pair], allow_out_of_scope=True)
    assert start.refined == ()
    frozen = [name for name in start.factors if not name.startswith("pixels.")]
    for name in frozen:
        assert all(torch.equal(start.factors[name][part], each) for part, each in result.adapter.factors[name].items())

    def never(*_: object) -> Adapter:
        raise AssertionError("trained although it was kept")

    monkeypatch.setattr(refine, "fit_adapter", never)
    again = editor.edit(scene(30, 20), **options)
    assert again.reproduced == result.reproduced
    assert editor.reproduction(again.adapter, [pair]) == result.reproduced
    result.adapter.save_pretrained(tmp_path / "adapter")
    assert Adapter.from_pretrained(tmp_path / "adapter").refined == (STEPS,)
    with pytest.raises(AssertionError, match="although it was kept"):
        editor.edit(scene(30, 20), **{**options, "refine": STEPS + 1})


def whole_and_growing(reports: list[tuple[int, int]]) -> None:
    """Progress has one total, never falls, and ends with all done."""
    assert len({total for _, total in reports}) == 1, reports
    assert reports == sorted(reports)
    assert reports[-1][0] == reports[-1][1]


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_progress_has_one_total_whatever_is_refined_done_in_turn_or_kept(
    editor: Editor, pair: Pair, scene: Scene, strength: float
) -> None:
    shown = EditRequest(scene(24, 20), example=[pair], refine=3, strength=strength)
    other = EditRequest(scene(24, 20), example=[(pair[1], pair[0])], refine=4, strength=strength)
    told = EditRequest(scene(40, 32), "brighter", then=["blur it", "darker"], strength=strength)
    plain = EditRequest(scene(30, 20), example=[pair], strength=strength)
    for asked in ([shown], [shown, other, told], [told], [plain], [plain, shown], [shown, told]):
        for _ in ("generated", "from the cache"):
            reports: list[tuple[int, int]] = []
            editor.edit_batch(asked, allow_out_of_scope=True, progress=lambda *each, into=reports: into.append(each))
            whole_and_growing(reports)


def test_progress_of_adapting_says_that_it_trains_only_where_it_does(editor: Editor, pair: Pair) -> None:
    reports: list[tuple[int, int]] = []
    options: dict[str, Any] = {"example": [pair], "refine": 2, "allow_out_of_scope": True}
    editor.adapt(**options, progress=lambda *each: reports.append(each))
    assert reports == [(0, 2), (1, 2), (2, 2)]
    editor.adapt(**options, progress=lambda *each: reports.append(each))
    assert len(reports) == 3


def test_a_refined_adapter_is_the_same_every_time_and_serves_a_series(
    folder: Path, pair: Pair, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = Editor.from_pretrained(folder, loading=LoadingOptions(dtype=torch.float32))
    trained: list[int] = []
    real = refine.fit_adapter
    monkeypatch.setattr(refine, "fit_adapter", lambda *each: trained.append(1) or real(*each))
    first = editor.adapt(example=[pair, pair], refine=4, seed=1, allow_out_of_scope=True)
    asked = EditRequest(scene(24, 20), example=[pair, pair], refine=4, seed=2)
    several = editor.edit_batch([asked, asked], allow_out_of_scope=True)
    assert len(trained) == 2  # two requests of a batch share one
    series = make_series(editor, asked, allow_out_of_scope=True)
    for adapter in (several[0].adapter, several[1].adapter, series.adapters[0]):
        state = adapter.state_dict()
        assert all(torch.equal(each, state[name]) for name, each in first.state_dict().items())
    assert series.reproduced == several[0].reproduced
    with torch.inference_mode():
        inside = editor.adapt(example=[pair, pair], refine=4, allow_out_of_scope=True).state_dict()
    assert all(torch.equal(each, inside[name]) for name, each in first.state_dict().items())
    assert Adapter.stack([first, editor.adapt(example=[pair], allow_out_of_scope=True)]).refined == (4, 0)


def test_what_steps_make_worse_is_not_taken(editor: Editor, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    start = editor.adapt(example=[pair], allow_out_of_scope=True)
    monkeypatch.setattr(refine, "LEARNING_RATE", 1e3)
    found = editor.adapt(example=[pair], refine=3, allow_out_of_scope=True)
    assert all(torch.equal(each, found.state_dict()[name]) for name, each in start.state_dict().items())
    assert found.refined == (3,)


def test_an_interrupt_leaves_nothing_behind(editor: Editor, pair: Pair) -> None:
    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor.adapt(example=[pair], refine=4, allow_out_of_scope=True, progress=interrupt)
    assert editor.cache is not None
    assert editor.cache.folder is not None
    assert len(list(editor.cache.folder.glob("*.safetensors"))) == 1  # the generated one
    assert editor.adapt(example=[pair], refine=2, allow_out_of_scope=True).refined == (2,)


def test_misuse_is_refused_by_name(editor: Editor, pair: Pair, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = scene(24, 20)
    for steps in (-1, requests.MAX_REFINE + 1, 1.5, True, "30"):
        with pytest.raises(OpenwuError, match=r"refine: expected a number of steps"):
            editor.edit(photo, example=[pair], refine=steps)  # type: ignore[arg-type]
    with pytest.raises(OpenwuError, match=r"refine: expected an example"):
        editor.edit(photo, "make it brighter", refine=3)
    with pytest.raises(OpenwuError, match=r"refine: .*per_photo"):
        editor.edit(photo, example=[pair], per_photo=True, refine=3)
    with pytest.raises(ExampleError, match="look alike"):
        editor.adapt(example=[(pair[0], pair[0])], refine=3)
    monkeypatch.setattr(EmbeddedBase, "refines_examples", False)
    with pytest.raises(OpenwuError, match=r"refine: expected 0 for .*not trained through"):
        editor.adapt(example=[pair], refine=3)
    assert (parser.REFINE, parser.MAX_REFINE) == (requests.REFINE, requests.MAX_REFINE)


def test_an_adapter_of_zeros_cannot_be_refined(editor: Editor, pair: Pair) -> None:
    for parameter in editor.generator.parameters():
        parameter.zero_()
    with pytest.raises(OpenwuError, match=r"refine: .*zeros"):
        editor.adapt(example=[pair], refine=3, allow_out_of_scope=True)
