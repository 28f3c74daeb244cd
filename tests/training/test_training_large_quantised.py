"""A training through a base in fewer bits: what is counted before loading, and that it runs, resumes and edits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import base_cases
import large_cases
import pytest
import tiny_pipelines
import torch

import openwu
from openwu.backbones import backbone_class
from openwu.backbones.diffusers.loading import part_numbers, weight_files
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.errors import OpenwuError
from openwu.training.bases.pipelines import new_config, train_pipeline
from openwu.training.memory import TRAINING, training_plan

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("klein")
    tiny_pipelines.flux2_klein(heads=4).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PipelineBackbone, "condition_pixels", 64 * 64)


def test_what_a_quantised_denoiser_takes_is_told(base: Path) -> None:
    recipe = large_cases.recipe("flux2_klein", base, Path("none"), bf16=True)
    kind = backbone_class("flux2-klein")
    assert issubclass(kind, PipelineBackbone)
    config = new_config(recipe, kind.hollow(base))
    saved = kind.quantisation_plan("4bit").saved(base, weight_files(base / "transformer"), 2)
    numbers, device = part_numbers(base), torch.device("cuda")
    full = training_plan(recipe, config, numbers, "transformer", device)
    less = training_plan(recipe, config, numbers, "transformer", device, saved=saved)
    assert full.phases[TRAINING]["denoiser"] - less.phases[TRAINING]["denoiser"] == saved
    assert saved > 0.4 * full.phases[TRAINING]["denoiser"]
    assert full.activations == less.activations
    with pytest.raises(ValueError, match="quantise: expected 8bit, 4bit or None, got '3bit'"):
        replace(recipe, quantise="3bit")


@pytest.mark.slow
def test_a_generator_trained_through_4_bits_resumes_and_edits(base: Path, tmp_path: Path) -> None:
    pairs = large_cases.write_pairs(tmp_path / "pairs", ((64, 64),) * 4)
    recipe = large_cases.recipe("flux2_klein", base, pairs, quantise="4bit")
    train_pipeline(recipe, tmp_path / "run", stop_after=2)
    with pytest.raises(OpenwuError, match="recipe"):
        train_pipeline(replace(recipe, quantise=None), tmp_path / "run")
    train_pipeline(recipe, tmp_path / "run")
    model = tmp_path / "run" / "model"
    assert json.loads((model / "provenance.json").read_text())["recipe"]["quantise"] == "4bit"
    for how in (None, "4bit"):
        editor = openwu.Editor.from_pretrained(
            "flux2-klein",
            base=base,
            generator=model,
            loading=openwu.LoadingOptions(device="cpu", quantise=how),
            sampling=base_cases.FAST,
        )
        assert editor.edit(tmp_path / "pairs" / "0.png", "make it dark").image.size == (64, 64)
