"""One adapter, one noise plane and constant memory for a clip; what a stop leaves goes on; one file comes of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_cases import PICTURES, clip, make, pictures, times

from openwu.editor import clip as clips
from openwu.editor import series as serial
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.editor.series import make_series
from openwu.errors import InstructionError, OpenwuError, PictureError, TargetError
from openwu.images import Photo
from openwu.types import Adapter
from openwu.video.frames import frames
from openwu.video.probe import probe, survey
from openwu.video.write import write_segment


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return clip(tmp_path / "a.mp4")


def photos_of(path: Path) -> list[Photo]:
    found = probe(path)
    return list(frames(found, survey(found)))


def alike(first: Photo, second: Photo) -> bool:
    return bool((first.pixels == second.pixels).all())


def test_a_clip_has_one_adapter_and_every_frame_the_edit_of_a_photograph(
    editor: Editor, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = []
    real = serial.merged_copy
    monkeypatch.setattr(serial, "merged_copy", lambda *given: merged.append(1) or real(*given))
    photos = photos_of(source)
    series = make_series(editor, EditRequest(photos[4], "brighten", seed=3))
    edited = series.edit(photos[:3])
    alone = [editor.edit(photo, "brighten", adapter=series.adapters[0], seed=3).photo for photo in photos[:3]]
    assert all(np.abs(a.pixels.astype(int) - b.pixels).max() <= 1 for a, b in zip(edited, alone, strict=True))
    assert any(not alike(photo, result) for photo, result in zip(photos, edited, strict=False))
    series.edit(photos[3:5])
    assert len(merged) == 1
    moving = series.edit([photos[0]] * 2, [3, 4])
    assert alike(moving[0], edited[0])
    assert not alike(*moving)


def test_the_file_is_the_series(editor: Editor, source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = editor.edit_clip(
        source, tmp_path / "b.mp4", "brighten", strength=0.5, progress=lambda *at: seen.append(at)
    )
    photos = photos_of(source)
    series = make_series(editor, EditRequest(photos[result.key_frame], "brighten", strength=0.5))
    expected = np.stack([photo.pixels for photo in series.edit(photos)])
    found, before = (pictures(path).astype(int) for path in (tmp_path / "b.mp4", source))
    means = [each.mean((1, 2)) for each in (found, expected, before)]
    assert np.abs(means[0] - means[1]).max() < 5  # H.264 loses texture, not light
    assert np.abs(means[2] - means[1]).max() > 10
    assert times(tmp_path / "b.mp4") == times(source)
    assert (result.frames, result.resumed, len(result.adapters)) == (10, 0, 1)
    assert seen[0] == (0, 10)
    assert seen[-1] == (10, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_each_instruction_has_an_adapter_that_reads_what_the_one_before_made(editor: Editor, source: Path) -> None:
    photo = photos_of(source)[0]
    series = make_series(editor, EditRequest(photo, "brighten", then="blur"))
    chained = editor.edit(photo, "brighten", then="blur")
    assert len(series.adapters) == 2
    name = next(iter(chained.adapter.factors))
    for part, tensor in chained.adapter.factors[name].items():
        assert torch.allclose(series.adapters[1].factors[name][part], tensor, atol=1e-4)
    assert np.abs(series.edit([photo])[0].pixels.astype(int) - chained.photo.pixels).max() <= 1


def test_a_stopped_clip_goes_on_with_its_adapter(
    editor: Editor, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips, "_segment_length", lambda _: 4)
    written: list[int] = []

    def stop_at_second(path: Path, images: Iterator[object], *more: object) -> None:
        if len(written) == 1:
            next(images)
            raise KeyboardInterrupt
        written.append(1)
        write_segment(path, images, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(clips, "write_segment", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            editor.edit_clip(source, tmp_path / "b.mp4", "brighten")
    assert not (tmp_path / "b.mp4").exists()
    (folder,) = tmp_path.glob(".openwu-*.part")
    first = (folder / "segment-00000000.mp4").read_bytes()
    assert (folder / "adapters" / "0").is_dir()

    def refuse(*_: object) -> None:
        raise AssertionError("the adapter was generated again")

    monkeypatch.setattr(editor, "fast", refuse)
    with pytest.raises(AssertionError, match="generated again"):  # another request is not taken for the same
        editor.edit_clip(source, tmp_path / "b.mp4", "brighten", strength=0.25)
    assert (folder / "segment-00000000.mp4").read_bytes() == first
    result = editor.edit_clip(source, tmp_path / "b.mp4", "brighten")
    assert result.resumed == 4
    assert len(pictures(tmp_path / "b.mp4")) == 10
    assert not folder.exists()


def test_memory_does_not_grow_with_a_clip(editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many photos are alive at once, while a clip three times as long as another is edited."""
    monkeypatch.setattr(clips, "TOGETHER", 2 * 32 * 24)
    monkeypatch.setattr(clips, "_segment_length", lambda _: 6)
    alive: weakref.WeakSet[Photo] = weakref.WeakSet()
    most: dict[int, int] = {}
    decoded = clips.frames

    def counted(*given: Any, **more: Any) -> Iterator[Photo]:
        for photo in decoded(*given, **more):
            alive.add(photo)
            yield photo

    def count(_: int, total: int) -> None:
        most[total] = max(most.get(total, 0), len(alive))

    monkeypatch.setattr(clips, "frames", counted)
    for length in (10, 30):
        looped = clip(tmp_path / f"{length}.mp4", "-vf", f"loop=2:10,trim=end_frame={length}")
        editor.edit_clip(looped, tmp_path / f"{length}.edited.mp4", "brighten", progress=count)
    assert 2 <= most[10] <= 4
    assert most[30] <= most[10]


def test_hooks_and_the_merged_copy_have_the_same_adapter(editor: Editor, source: Path) -> None:
    """Whatever the number of a request is: all are of one clip."""
    series = make_series(editor, EditRequest(photos_of(source)[0], "brighten"))
    scope, call = series.passes[0].scope, editor.backbone.example_call()
    assert call is not None
    plain = call(editor.backbone.denoiser)
    with scope.rows([5]):
        hooked = call(editor.backbone.denoiser)
    assert scope.module_for(0) is scope.module_for(7)
    assert torch.allclose(hooked, call(scope.module_for(5)), atol=1e-4)
    assert not torch.allclose(hooked, plain, atol=1e-3)


def test_what_a_clip_s_request_cannot_be_is_said(editor: Editor, source: Path, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="to end in"):
        editor.edit_clip(source, tmp_path / "b.gif", "brighten")
    with pytest.raises(OpenwuError, match="metadata: expected one of"):
        editor.edit_clip(source, tmp_path / "b.mp4", "brighten", metadata="all")  # type: ignore[arg-type]
    with pytest.raises(OpenwuError, match="noise_per_frame"):
        editor.edit_clip(source, tmp_path / "b.mp4", "brighten", noise_per_frame=1)  # type: ignore[arg-type]
    with pytest.raises(InstructionError):
        editor.edit_clip(source, tmp_path / "b.mp4", "")
    adapter = editor.adapt(photos_of(source)[0], "brighten")
    with pytest.raises(TargetError, match="expected one sample"):
        editor.edit_clip(source, tmp_path / "b.mp4", adapter=Adapter.stack([adapter, adapter]))
    with pytest.raises(PictureError, match="already exists"):
        editor.edit_clip(source, source, "brighten")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_two_processes_do_not_edit_one_clip_at_once(editor: Editor, source: Path, tmp_path: Path) -> None:
    """The second is refused, and the first one's parts stay."""
    with clips._part_folder(tmp_path / "b.mp4", "0" * 64) as folder:
        with (
            pytest.raises(OpenwuError, match="another process is editing"),
            clips._part_folder(tmp_path / "b.mp4", "0" * 64),
        ):
            pass
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(OpenwuError, match="reads one picture"):  # found out late, and nothing is left
        editor.edit_clip(source, tmp_path / "b.mp4", "brighten", references=[photos_of(source)[0]] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_given_adapter_needs_no_words(editor: Editor, tmp_path: Path) -> None:
    short = make(tmp_path / "a.mkv", *PICTURES, "-frames:v", "1", "-c:v", "ffv1")
    adapter = editor.adapt(photos_of(short)[0], "brighten")
    result = editor.edit_clip(short, tmp_path / "b.mp4", adapter=adapter, strength=0.0)
    assert np.abs(pictures(tmp_path / "b.mp4").astype(int) - pictures(short)).mean() < 4
    assert result.adapters[0].instructions == adapter.instructions


def test_a_mask_keeps_every_frame_bit_for_bit_until_it_is_encoded(
    editor: Editor, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    def kept(path: Path, images: Iterator[Any], *more: Any) -> None:
        write_segment(path, iter(each for each in images if not written.append(each)), *more)  # type: ignore[func-returns-value]

    monkeypatch.setattr(clips, "write_segment", kept)
    alpha = np.full((24, 32), 255, np.uint8)
    alpha[:, :16], alpha[:, 16:18] = 0, 128
    mask = Photo(np.zeros((24, 32, 3), np.uint8), alpha=alpha)
    editor.edit_clip(source, tmp_path / "b.mp4", "brighten", mask=mask)
    before, after = np.stack([photo.pixels for photo in photos_of(source)]), np.stack(written)
    assert np.array_equal(after[:, :, 18:], before[:, :, 18:])
    changes = np.abs(after.astype(int) - before).mean((0, 1, 3))
    assert changes[:16].min() > 8
    assert 0 < changes[16:18].min() < changes[:16].mean()
    for wrong, words in (
        (Photo(mask.pixels[:20]), "expected 32x24 as the picture, got 32x20"),
        (Photo(mask.pixels), "alpha"),
    ):
        with pytest.raises(PictureError, match=words):
            editor.edit_clip(source, tmp_path / "c.mp4", "brighten", mask=wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
