"""A generator for a base that edits clips: trained by its recipe on pairs of pictures, then asked for a clip."""

from __future__ import annotations

from pathlib import Path

import large_cases
import numpy as np
import pytest
import torch
from clip_cases import clip, pictures

import openwu
from openwu.backbones.diffusers.lucy_edit import LucyEdit
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.training.bases.pipelines import train_pipeline
from openwu.types import LoadingOptions, SamplingOptions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_train_a_generator_that_edits_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(PipelineBackbone, "condition_pixels", 64 * 64)
    monkeypatch.setattr(LucyEdit, "clip_frames", 5)
    base = large_cases.saved("lucy_edit", tmp_path / "base")
    pairs = large_cases.write_pairs(tmp_path / "pairs")
    half = dtype == torch.bfloat16
    train_pipeline(
        large_cases.recipe("lucy_edit", base, pairs, bf16=half), tmp_path / "run", stop_after=2 if half else None
    )
    if half:
        return
    for each in (dtype, torch.bfloat16):
        editor = openwu.Editor.from_pretrained(
            "lucy-edit", base=base, generator=tmp_path / "run" / "model",
            loading=LoadingOptions(device="cpu", dtype=each), sampling=SamplingOptions(steps=2, pixels=4096),
        )  # fmt: skip
        source = tmp_path / "a.mp4"
        if not source.exists():
            clip(source)
        result = editor.edit_clip(source, tmp_path / f"{each}.mp4", "make it dark", overwrite=True)
        assert (result.frames, len(result.adapters)) == (10, 1)
        assert pictures(result.path).shape == pictures(source).shape
        photo = editor.edit(large_cases.picture(1), "make it dark").photo
        assert photo.size == (64, 64)
        editor.handle.detach()
    one, other = (pictures(tmp_path / f"{each}.mp4").astype(int) for each in (torch.float32, torch.bfloat16))
    assert np.abs(one - other).mean() < 8
