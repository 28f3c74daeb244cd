"""One editor, several threads: each gets the picture that it would have got alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from openwu.editor.compatibility import AdapterScope
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest

Scene = Callable[..., NDArray[np.uint8]]
SMALL = 4
"""Side of a picture, in pixels, for which the tiny model's merged weights do not pay."""
ASKED = ("brighter", "blur it", "make it darker")


@contextmanager
def slow(editor: Editor) -> Iterator[list[int]]:
    """The base takes its time, so that threads meet in it. Yields, for every call, how many were in it then."""
    inside: list[int] = []
    met: list[int] = []

    def pause(*_: Any) -> None:
        inside.append(1)
        met.append(len(inside))
        time.sleep(0.03)
        inside.pop()

    hook = editor.backbone.network.register_forward_pre_hook(pause)
    yield met
    hook.remove()


@pytest.mark.parametrize(
    ("side", "merged"), [(SMALL, False), (128, True)], ids=["through hooks", "with weights of their own"]
)
def test_threads_edit_different_requests_at_once(editor: Editor, scene: Scene, side: int, merged: bool) -> None:
    pictures = [Image.fromarray(scene(side, side, seed)) for seed in range(3)]
    scope = AdapterScope(editor.backbone, editor.handle, [editor.adapt(pictures[0], "brighter")], nullcontext())
    assert scope.prefers_module(editor.backbone.rows(side * side)) is merged
    one_by_one = [editor.edit(picture, asked) for picture, asked in zip(pictures, ASKED, strict=True)]
    with slow(editor) as met, ThreadPoolExecutor(3) as threads:
        started = [threads.submit(editor.edit, *each) for each in list(zip(pictures, ASKED, strict=True)) * 2]
        for found, expected in zip(started, one_by_one * 2, strict=True):
            assert np.array_equal(np.asarray(found.result().image), np.asarray(expected.image))
    # Merged weights are copies, and threads meet in the base; through hooks they must not.
    assert max(met) > 1 if merged else max(met) == 1


def test_a_batch_through_hooks_and_single_edits_share_an_editor(editor: Editor, scene: Scene) -> None:
    small, large = (Image.fromarray(scene(side, side, 1)) for side in (SMALL, 128))
    requests = [EditRequest([small], asked) for asked in ASKED]
    batch = [np.asarray(result.image) for result in editor.edit_batch(requests)]
    alone = np.asarray(editor.edit(large, "brighter").image)
    with slow(editor), ThreadPoolExecutor(2) as threads:
        started = threads.submit(editor.edit_batch, requests), threads.submit(editor.edit, large, "brighter")
        assert np.array_equal(np.asarray(started[1].result().image), alone)
        for found, expected in zip(started[0].result(), batch, strict=True):
            assert np.array_equal(np.asarray(found.image), expected)
