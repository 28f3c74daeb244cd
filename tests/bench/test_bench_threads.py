"""C9 to C12 with small pictures: what is compared, and that nothing stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.types import LoadingOptions
from openwu_bench import editor_threads as bench
from openwu_bench.command import check_row


@pytest.fixture(autouse=True)
def _untrained(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Editor.from_pretrained
    options = LoadingOptions(dtype=torch.float32)
    monkeypatch.setattr(Editor, "from_pretrained", lambda **_: load(model_folder, loading=options))


@pytest.mark.parametrize(("name", "measure"), [("C9", bench.measure_threads), ("C10", bench.measure_busy)])
def test_one_thread_is_compared_with_two(name: str, measure: Any) -> None:
    before = torch.get_num_threads()
    row = measure(quick=True)
    check_row(row, name)
    assert list(row.sides) == ["threads: 1", "threads: 2"]
    assert row.value == row.sides["threads: 1"].median / row.sides["threads: 2"].median
    assert torch.get_num_threads() == before


def test_other_pixels_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    monkeypatch.setattr(bench, "base_passes", lambda *_: lambda: draw.integers(0, 255, (2, 2, 3), dtype=np.uint8))
    with pytest.raises(OpenwuError, match="C9: two threads gave other pixels"):
        bench.measure_threads(quick=True)


def test_sizes_are_compared_by_pixel() -> None:
    row = bench.measure_size(quick=True)
    check_row(row, "C11")
    small, large = (timing.median for timing in row.sides.values())
    assert row.value == pytest.approx(large / (512 * 384) / (small / (320 * 256)))


@pytest.mark.slow
def test_the_first_edit_is_one_of_a_new_process() -> None:
    row = bench.measure_first(quick=True)
    check_row(row, "C12")
    assert len(row.sides["first"].seconds) == 1
    assert len(row.sides["later"].seconds) == bench.LATER
