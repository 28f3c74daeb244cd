"""C7, C8 and the editor's curves with an untrained model and small pictures: what is timed is what an edit does."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openwu.backbones.embedded.piecewise import pieces
from openwu.editor.compatibility import AdapterScope
from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.images import read_picture
from openwu.types import Adapter, LoadingOptions
from openwu_bench import editor as bench
from openwu_bench.command import check_row


@pytest.fixture
def editors(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Editor]:
    """Every editor that a row makes is one of the untrained model, in float32."""
    made: list[Editor] = []
    load = Editor.from_pretrained

    def untrained(**options: Any) -> Editor:
        made.append(load(model_folder, loading=LoadingOptions(dtype=torch.float32), **options))
        return made[-1]

    monkeypatch.setattr(Editor, "from_pretrained", untrained)
    monkeypatch.setattr(bench, "QUICK_SIZES", {"small": (48, 32, 3), "wide": (288, 144, 2)})
    monkeypatch.setattr(bench, "QUICK_CURVE_SIZES", ((32, 32), (48, 32), (288, 144)))
    monkeypatch.setattr(bench, "QUICK_REQUEST_SIDE", 32)
    monkeypatch.setattr(bench, "QUICK_CACHE_SIDE", 64)
    monkeypatch.setattr(pieces, "WHOLE", 64 * 64)
    return made


def test_c7_splits_an_edit_into_stages_that_add_up(editors: list[Editor]) -> None:
    row = bench.measure_share(quick=True)
    check_row(row, "C7")
    assert (row.unit, row.goal, row.at_least) == ("%", 25.0, False)
    assert row.error <= 1 / 255
    for name, runs, number in (("small", 3, 1), ("wide", 2, 62)):
        timings = {side.removesuffix(f", {name}"): each for side, each in row.sides.items() if side.endswith(name)}
        stages = {"read", "condition", "generate", "edit", "write"}
        assert set(timings) == stages | {"whole edit", "base with adapter", "base alone"}
        assert all(len(timing.seconds) == runs for timing in timings.values())
        for run in range(runs):
            assert sum(timings[stage].seconds[run] for stage in stages) <= timings["whole edit"].seconds[run]
        split = row.details[name]["seconds by stage"]
        assert sum(split.values()) == pytest.approx(sum(timings[stage].fastest for stage in stages))
        assert split["adapter overhead"] == timings["base with adapter"].fastest - timings["base alone"].fastest
        adapter = split["condition"] + split["generate"] + split["adapter overhead"]
        share = 100 * adapter / timings["whole edit"].fastest
        assert row.details[name]["share of the adapter, %"] == pytest.approx(share)
        # Of a smaller whole; on a busy machine the adapter may seem to cost less than nothing.
        assert abs(row.details[name]["share without reading and writing, %"]) > abs(share)
        assert row.details[name]["pieces"] == number
    assert row.value == row.details["small"]["share of the adapter, %"]


@pytest.mark.parametrize("size", [(48, 32), (288, 144)])
def test_the_timed_passes_are_those_of_the_edit(editors: list[Editor], size: tuple[int, int]) -> None:
    editor = Editor.from_pretrained()
    picture = bench.sample_picture(*size)
    result = editor.edit(picture, bench.INSTRUCTION)
    for adapter, alike in ((result.adapter, True), (None, False)):
        pixels = bench.base_passes(editor, picture, adapter)()
        assert pixels.shape == (size[1], size[0], 3)
        assert np.array_equal(pixels, result.photo.pixels) is alike


def test_the_timed_passes_apply_the_adapter_as_the_edit_does(
    editors: list[Editor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged weights and hooks differ in rounding, which in bfloat16 is more than C7 lets pass, and in time."""
    editor = Editor.from_pretrained()
    picture = bench.sample_picture(48, 32)
    asked: list[Any] = []
    prefers = AdapterScope.prefers_module

    def heard(scope: AdapterScope, rows: Any) -> bool:
        asked.append(rows)
        return prefers(scope, rows)

    monkeypatch.setattr(AdapterScope, "prefers_module", heard)
    result = editor.edit(picture, bench.INSTRUCTION)
    bench.base_passes(editor, picture, result.adapter)()
    assert asked == [editor.backbone.rows(48 * 32)] * 2


def test_c7_is_not_measured_where_something_else_would_be_timed(
    editors: list[Editor], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = bench.base_passes
    monkeypatch.setattr(bench, "base_passes", lambda editor, picture, _: passes(editor, picture, None))
    with pytest.raises(OpenwuError, match="C7: the adapter changed nothing"):
        bench.measure_share(quick=True)

    def brighter(editor: Editor, picture: Image.Image, adapter: Adapter | None) -> Any:
        return passes(editor, picture.point(lambda value: min(value + 20, 255)), adapter)

    monkeypatch.setattr(bench, "base_passes", brighter)
    with pytest.raises(OpenwuError, match="C7: the timed passes differ from the edit by"):
        bench.measure_share(quick=True)


def test_c8_times_what_the_editor_does_with_its_cache(editors: list[Editor]) -> None:
    row = bench.measure_cache(quick=True)
    check_row(row, "C8")
    assert row.error == 0
    assert set(row.sides) == {"generate", "hit in memory", "hit on disk", "read the picture"}
    assert row.value == row.sides["generate"].median / row.sides["hit in memory"].median
    assert row.details["times sooner with reading a picture in memory"] < row.value
    assert row.details["bytes of an adapter"] > 1000
    (editor,) = editors
    assert editor.cache is not None
    assert editor.cache.statistics.misses == 1
    assert editor.cache.statistics.memory_hits > 3


def test_c8_is_not_measured_where_the_cache_is_asked_for_something_else(
    editors: list[Editor], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = count()
    monkeypatch.setattr(Editor, "adapter_key", lambda *_, **__: f"{next(number):064d}")
    with pytest.raises(OpenwuError, match="C8: the editor kept its adapter under another key"):
        bench.measure_cache(quick=True)


def test_c8_compares_what_it_finds(editors: list[Editor]) -> None:
    adapter = Editor.from_pretrained().adapt(bench.sample_picture(32, 32), "brighter")
    assert bench._cache_error(adapter, adapter) == 0
    for found in (None, replace(adapter, instructions=(("darker",),)), adapter.scaled(2.0)):
        with pytest.raises(OpenwuError, match="C8: "):
            bench._cache_error(found, adapter)


def test_the_curve_of_sizes_counts_the_pixels_of_the_padded_picture(editors: list[Editor]) -> None:
    growth = bench.measure_size(quick=True)
    assert [point.x for point in growth.points] == [32 * 32 / 1e6, 48 * 32 / 1e6, 288 * 144 / 1e6]
    first, second, last = (point.predicted for point in growth.points)
    per_pixel = (second - first) / (16 * 32)
    assert last - first == pytest.approx(per_pixel * (288 * 144 - 32 * 32))
    assert first > per_pixel * 32 * 32  # the generator's share is the same for every size


def test_the_curve_of_batches_gives_each_request_a_picture_of_its_own(
    editors: list[Editor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[bytes]] = []
    edit_batch = Editor.edit_batch

    def watched(self: Editor, requests: Any, **options: Any) -> Any:
        asked.append([read_picture(request.images[0]).pixels.tobytes() for request in requests])
        return edit_batch(self, requests, **options)

    monkeypatch.setattr(Editor, "edit_batch", watched)
    growth = bench.measure_batch(quick=True)
    assert [(point.x, point.predicted) for point in growth.points] == [(n, n) for n in bench.QUICK_REQUESTS]
    assert {len(pictures) for pictures in asked} == set(bench.QUICK_REQUESTS)
    assert all(len(set(pictures)) == len(pictures) for pictures in asked)
