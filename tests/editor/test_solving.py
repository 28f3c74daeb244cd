"""Adapters of edits that are shown: their last layer is solved for on the example, once, and is kept with the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.shown.solving import HEAD
from openwu.editor.editor import Editor
from openwu.editor.shown import solve
from openwu.editor.shown.reproduction import SIDE
from openwu.types import LORA_B, Adapter, LoadingOptions

Scene = Callable[..., NDArray[np.uint8]]
Pair = tuple[NDArray[Any], NDArray[Any]]
ANYWAY: dict[str, Any] = {"allow_out_of_scope": True}


@pytest.fixture
def editor(folder: Path, tmp_path: Path) -> Editor:
    return Editor.from_pretrained(folder, loading=LoadingOptions(dtype=torch.float32), cache=tmp_path / "cache")


def test_the_last_layer_is_solved_for_and_nothing_else(
    folder: Path, editor: Editor, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = editor.adapt(example=[pair], **ANYWAY)
    monkeypatch.setattr(EmbeddedBase, "solves_examples", False)
    plain = Editor.from_pretrained(folder, loading=LoadingOptions(dtype=torch.float32))
    written = plain.adapt(example=[pair], **ANYWAY)
    differ = {
        (name, part)
        for name, parts in written.factors.items()
        for part, each in parts.items()
        if not torch.equal(solved.factors[name][part], each)
    }
    assert differ == {(HEAD, LORA_B)}
    shares = [plain.reproduction(adapter, [pair]).share for adapter in (solved, written)]
    assert shares[0] > shares[1] + 0.2


def test_it_is_solved_once_and_kept(editor: Editor, pair: Pair, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    first = editor.edit(scene(24, 20), example=[pair], **ANYWAY)

    def never(*_: object) -> Adapter:
        raise AssertionError("solved although it was kept")

    monkeypatch.setattr("openwu.editor.generate.solved_adapter", never)
    again = editor.edit(scene(24, 20), example=[pair], **ANYWAY)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    with pytest.raises(AssertionError, match="although it was kept"):
        editor.edit(scene(24, 20), example=[(pair[1], pair[0])], **ANYWAY)


def test_another_base_does_not_get_what_was_kept(editor: Editor, pair: Pair) -> None:
    before = editor.adapt(example=[pair], **ANYWAY)
    with torch.no_grad():
        editor.backbone.denoiser.get_parameter(f"{HEAD}.bias").add_(0.05)
    after = editor.adapt(example=[pair], **ANYWAY)
    assert not torch.equal(before.factors[HEAD][LORA_B], after.factors[HEAD][LORA_B])


def test_every_pixel_that_is_read_makes_another_adapter(editor: Editor, scene: Scene) -> None:
    """Of a large example the condition and the solution read different pixels; both are in the cache's key."""
    before = scene(8 * SIDE, 40, seed=4)
    after = before // 2
    other = after.copy()
    other[4::8, 4::8] = 255 - other[4::8, 4::8]
    kept = [editor.adapt(example=[(before, each)], **ANYWAY).factors[HEAD][LORA_B] for each in (after, other)]
    assert not torch.equal(*kept)


def test_what_no_example_shows_stays_as_it_was_written(
    editor: Editor, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Adapter:
        raise AssertionError("solved without an example")

    monkeypatch.setattr(solve, "attach", never)
    editor.edit(pair[0], "brighter", **ANYWAY)
