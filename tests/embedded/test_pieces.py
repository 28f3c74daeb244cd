"""An edit in pieces equals one pass over the whole picture, on any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextvars import ContextVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwu.backbones.embedded.network import TinyEditor, TinyEditorConfig
from openwu.backbones.embedded.piecewise import pieces
from openwu.backbones.embedded.piecewise.pieces import PiecewiseEdit, edited_whole, is_whole, number_of_pieces, wrapped
from openwu.images import Photo
from openwu.kernels.threads import in_parallel
from openwu.training.embedded.model import EmbeddedModel


@pytest.fixture
def base(embedded_model: EmbeddedModel) -> TinyEditor:
    """Patches of 4 pixels, windows of 4 patches, one block of plain windows and one of shifted windows."""
    return embedded_model.backbone.requires_grad_(False)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two windows, and of 32 x 48 pixels."""
    for name, value in (("WHOLE", 1), ("WINDOWS", 2), ("HEIGHT", 32), ("WIDTH", 48)):
        monkeypatch.setattr(pieces, name, value)


@pytest.fixture
def threads() -> Iterator[None]:
    """Two threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def photos(width: int, height: int, count: int = 1, depth: type = np.uint8) -> list[Photo]:
    draw = np.random.default_rng(0)
    peak = np.iinfo(depth).max
    return [Photo(draw.integers(peak // 4, peak // 4 * 3, (height, width, 3)).astype(depth)) for _ in range(count)]


def text(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 32, generator=torch.Generator().manual_seed(1))


def piecewise(base: TinyEditor, sources: list[Photo]) -> list[Photo]:
    job = PiecewiseEdit(base, sources, range(len(sources)), text(len(sources)))
    for stage in job.stages():
        in_parallel(stage)
    return job.edited()


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (70, 3), (16, 16), (33, 130), (97, 65), (160, 96)])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_pieces_equal_the_whole(base: TinyEditor, size: tuple[int, int], depth: type) -> None:
    sources = photos(*size, count=2, depth=depth)
    with torch.inference_mode():
        expected = edited_whole(base, sources, range(2), text(2))
    for found, whole, source in zip(piecewise(base, sources), expected, sources, strict=True):
        assert found.pixels.dtype == depth
        # Sums of other shapes may round otherwise: a level of 8 bits at most, where a value lies between two.
        difference = np.abs(found.pixels.astype(int) - whole.pixels)
        assert difference.max() <= np.iinfo(depth).max // 255 // 4 + 1
        assert np.abs(found.pixels.astype(int) - source.pixels).max() > 3


def test_the_number_of_threads_changes_no_byte(base: TinyEditor, threads: None) -> None:
    source = photos(170, 130)
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(piecewise(base, source)[0].pixels)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_a_large_patch_and_an_odd_one(embedded_model: EmbeddedModel) -> None:
    for patch, window, layers in ((3, 2, 6), (8, 6, 1)):
        config = TinyEditorConfig(
            d_model=32, num_layers=2, head_dim=16, ffn_dim=32, text_dim=32, patch=patch, window=window,
            pixel_channels=8, pixel_layers=layers,
        )  # fmt: skip
        torch.manual_seed(0)
        base = TinyEditor(config).requires_grad_(False)
        torch.nn.init.normal_(base.pixels.out.weight, std=0.1)
        source = photos(119, 77)
        with torch.inference_mode():
            (expected,) = edited_whole(base, source, [0], text())
        assert np.abs(piecewise(base, source)[0].pixels.astype(int) - expected.pixels).max() <= 1


def test_pieces_are_counted(base: TinyEditor, monkeypatch: pytest.MonkeyPatch) -> None:
    job = PiecewiseEdit(base, photos(70, 33), [0], text())
    # 3 rows of 5 windows in pieces of 2, once for patches and once per block; rectangles of 32 x 48 in 48 x 80, twice.
    assert [len(stage) for stage in job.stages()] == [9, 9, 9, 4, 4]
    assert number_of_pieces(base.config, 70, 33) == 35
    monkeypatch.setattr(pieces, "WHOLE", 70 * 33)
    assert is_whole(70, 33)
    assert not is_whole(70, 34)
    assert number_of_pieces(base.config, 70, 33) == 1


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 39), st.integers(1, 40))
def test_a_range_goes_on_at_the_beginning(side: int, start: int, length: int) -> None:
    start, length = start % side, min(length, side)
    places = [place for _, where in wrapped(start, length, side) for place in range(side)[where]]
    assert places == [(start + i) % side for i in range(length)]
    assert [i for part, _ in wrapped(start, length, side) for i in range(length)[part]] == list(range(length))


# Threads


def test_tasks_run_on_threads_that_compute_alone(threads: None) -> None:
    met, seen = threading.Barrier(2, timeout=20), []

    def task() -> None:
        met.wait()  # Both are there at once.
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled(), threading.current_thread().name))

    done: list[str] = []
    in_parallel([task, task], lambda: done.append(threading.current_thread().name))
    assert [each[:2] for each in seen] == [(1, True)] * 2
    assert len({each[2] for each in seen}) == 2
    assert done == [threading.current_thread().name] * 2
    # Neither this thread nor a new one has fewer threads than before.
    numbers = [torch.get_num_threads()]
    new = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert numbers == [2, 2]


def test_tasks_see_the_context_of_their_caller(threads: None) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="")
    variable.set("here")
    seen: list[str] = []
    in_parallel([lambda: seen.append(variable.get())] * 3)
    assert seen == ["here"] * 3


@pytest.mark.parametrize("where", ["task", "done"])
def test_an_error_ends_what_has_not_begun(threads: None, where: str) -> None:
    ran: list[int] = []

    def fail() -> None:
        raise RuntimeError("out of luck")

    def slow() -> None:
        threading.Event().wait(0.02)
        ran.append(1)

    with pytest.raises(RuntimeError, match="out of luck"):
        in_parallel([fail if where == "task" else slow, *[slow] * 50], fail if where == "done" else None)
    before = len(ran)
    threading.Event().wait(0.1)
    assert len(ran) == before < 50  # Those that had begun have ended, and no other begins.
