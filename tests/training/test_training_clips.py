"""A generator for a base that edits clips: trained by its recipe on pairs of pictures, then asked for a clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import large_cases
import pytest
import torch
from clip_cases import clip, pictures

import openwu
from openwu.backbones.diffusers.lucy_edit import LucyEdit
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.training.bases.pipelines import train_pipeline
from openwu.types import LoadingOptions, SamplingOptions


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_pictures_train_a_generator_that_edits_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(PipelineBackbone, "condition_pixels", 64 * 64)
    monkeypatch.setattr(LucyEdit, "clip_frames", 5)
    base = large_cases.saved("lucy_edit", tmp_path / "base")
    recipe = large_cases.recipe("lucy_edit", base, large_cases.write_pairs(tmp_path / "pairs"), evaluate_every=0)
    shorter = replace(recipe, generator=replace(recipe.generator, steps=2), bf16=dtype == torch.bfloat16)
    train_pipeline(shorter, tmp_path / "run")
    editor = openwu.Editor.from_pretrained(
        "lucy-edit",
        base=base,
        generator=tmp_path / "run" / "model",
        loading=LoadingOptions(device="cpu", dtype=dtype),
        sampling=SamplingOptions(steps=2, pixels=4096, guidance=1.0),
    )
    source = clip(tmp_path / "a.mp4", "-frames:v", "3")
    result = editor.edit_clip(source, tmp_path / "b.mp4", "make it dark")
    assert (result.frames, len(result.adapters)) == (3, 1)
    assert pictures(result.path).shape == pictures(source).shape
    assert editor.edit(large_cases.picture(1), "make it dark").photo.size == (64, 64)
    editor.handle.detach()
