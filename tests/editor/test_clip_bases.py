"""Clips through a base that denoises whole clips: one adapter for all frames, windows that a stop does not move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import base_cases
import numpy as np
import pytest
import torch
from clip_cases import clip, pictures

from openwu import attach
from openwu.adapters.merge import merged
from openwu.backbones.diffusers.lucy_edit import LucyEdit
from openwu.backbones.protocol import EditJob
from openwu.editor import clip as clips
from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.images import Photo
from openwu.types import SamplingOptions
from openwu.video.write import write_segment

WINDOW = 5


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(LucyEdit, "clip_frames", WINDOW)
    return base_cases.backbone("lucy-edit")


@pytest.fixture
def editor(base: Any) -> Iterator[Editor]:
    made = Editor(base, base_cases.generator(base), sampling=base_cases.FAST, name="lucy-edit")
    yield made
    made.handle.detach()


def frames_of(seed: int, count: int) -> list[Any]:
    """A picture that moves to the left."""
    picture = np.asarray(base_cases.picture(seed))
    return [base_cases.Image.fromarray(np.roll(picture, -4 * i, axis=1)) for i in range(count)]


def photos(seed: int, count: int) -> list[Photo]:
    return [Photo(np.asarray(frame)) for frame in frames_of(seed, count)]


@torch.no_grad()
def denoised(base: Any, videos: list[list[Any]], words: list[str], **scope: Any) -> torch.Tensor:
    """The whole pipeline, called as its own documentation has it but for the text's states: `[b, f, 3, h, w]`."""
    found: torch.Tensor = base.pipeline(
        video=videos, prompt_embeds=base._padded_text(words),
        negative_prompt_embeds=base._padded_text([""] * len(words)), height=64, width=64, num_frames=len(videos[0]),
        num_inference_steps=2, guidance_scale=4.0, output_type="pt",
        generator=[torch.Generator().manual_seed(i) for i in range(len(words))],
    ).frames  # fmt: skip
    return found


def test_two_clips_in_one_call_of_the_pipeline_have_an_adapter_each(base: Any) -> None:
    """Guidance calls the denoiser a second time with the same rows."""
    adapters = base_cases.adapter(base, 2)
    videos, words = [frames_of(1, WINDOW), frames_of(2, WINDOW)], ["make it warm", "blur"]
    plain = denoised(base, videos, words)
    with attach(base.denoiser, adapters.targets) as handle:
        with handle.applied(adapters):
            both = denoised(base, videos, words)
        with handle.applied(adapters, rows=[1, -1]):
            mixed = denoised(base, videos, words)
    with merged(base.denoiser, adapters.select([1])):
        alone = denoised(base, videos, words)
    torch.testing.assert_close(both[1], alone[1], rtol=0, atol=5e-5)
    torch.testing.assert_close(mixed[0], alone[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(mixed[1], plain[1], rtol=0, atol=5e-5)
    assert both.shape == (2, WINDOW, 3, 64, 64)
    assert bool(((both - plain).abs().amax((2, 3, 4)) > 1e-3).all()), "every frame of both clips"


def test_frames_are_denoised_together_and_any_number_of_them(base: Any) -> None:
    class Plain:
        def rows(self, owners: Any) -> Any:
            assert list(owners) == [0]
            return base_cases.nothing(owners)

    options = SamplingOptions(steps=2, pixels=base_cases.PIXELS, guidance=4.0)
    for count in (1, 3, 5):
        shown = photos(1, count)
        job = EditJob((shown[0],), ("make it warm",))
        found = base.edit_frames(shown, job, options, Plain())
        length = 1 if count == 1 else 5
        padded = [*frames_of(1, count), *[frames_of(1, count)[-1]] * (length - count)]
        expected = denoised(base, [padded], ["make it warm"])[0, :count]
        for photo, wanted in zip(found, expected, strict=True):
            assert np.abs(photo.pixels / 255 - wanted.permute(1, 2, 0).numpy()).max() < 0.6 / 255
    with pytest.raises(OpenwuError, match="expected a base that denoises clips, got FluxKontext"):
        base_cases.backbone("flux-kontext").edit_frames(photos(1, 1), job, options, Plain())


def test_a_clip_is_edited_in_windows_under_one_adapter(
    editor: Editor, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = clip(tmp_path / "a.mp4")
    calls: list[tuple[int, int]] = []
    edit_frames = base.edit_frames
    monkeypatch.setattr(
        base, "edit_frames",
        lambda shown, job, *more: calls.append((len(shown), job.seed)) or edit_frames(shown, job, *more),
    )  # fmt: skip
    result = editor.edit_clip(source, tmp_path / "b.mp4", "make it warm", seed=3)
    assert calls == [(5, 3), (5, 3)]
    assert len(result.adapters) == 1
    found, before = pictures(tmp_path / "b.mp4"), pictures(source)
    assert found.shape == before.shape
    other = editor.edit_clip(source, tmp_path / "c.mp4", "make it warm", seed=3, strength=0.0)
    assert np.abs(found.astype(int) - pictures(other.path)).mean() > 1

    # Stopped after the first window, and gone on with: the same file.
    def stop(path: Path, images: Any, *more: Any) -> None:
        if more[2]:
            raise KeyboardInterrupt
        write_segment(path, images, *more)

    with monkeypatch.context() as patch:
        patch.setattr(clips, "write_segment", stop)
        with pytest.raises(KeyboardInterrupt):
            editor.edit_clip(source, tmp_path / "d.mp4", "make it warm", seed=3)
    again = editor.edit_clip(source, tmp_path / "d.mp4", "make it warm", seed=3)
    assert again.resumed == WINDOW
    assert np.array_equal(pictures(again.path), found)
    with pytest.raises(OpenwuError, match="noise_per_frame: expected a base that edits frame by frame, got lucy-edit"):
        editor.edit_clip(source, tmp_path / "e.mp4", "make it warm", noise_per_frame=True)


def test_a_pipeline_with_two_denoisers_is_refused(base: Any) -> None:
    import tiny_pipelines

    pipeline = tiny_pipelines.lucy_edit()
    pipeline.transformer_2 = pipeline.transformer
    with pytest.raises(OpenwuError, match="expected one denoiser, got two"):
        LucyEdit(pipeline)


def test_times_for_rows_and_for_tokens_are_the_same_prediction(base: Any) -> None:
    import tiny_pipelines

    other = LucyEdit(tiny_pipelines.lucy_edit(expand_timesteps=False))
    other.condition_pixels = other.pixels = base_cases.PIXELS
    batch = base.latent_batch(base_cases.requests(2), [torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])
    time, noise = torch.tensor([0.3, 0.8]), base_cases.noisy(batch)
    expected = other.predict(replace(batch), noise, time)
    torch.testing.assert_close(base.predict(batch, noise, time), expected, rtol=1e-4, atol=1e-5)
