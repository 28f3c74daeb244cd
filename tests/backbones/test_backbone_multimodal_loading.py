"""Bases with pictures in their prompts, from folders. Their processors load only beside torchvision, which the tests do
not have: the folder's is replaced by one that is assembled from its parts, and the rest is loaded as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_multimodal
import torch
from base_cases import CAUSAL, FAST, MULTIMODAL, PIXELS, backbone, nothing, requests

from openwu.backbones import backbone_class
from openwu.backbones.diffusers import pipeline
from openwu.errors import CheckpointError


def save(pipeline: Any, folder: Path) -> None:
    """The folder that the pipeline itself would write, had its processor a part for videos."""
    index: dict[str, Any] = {"_class_name": type(pipeline).__name__}
    for name, part in pipeline.components.items():
        (part.tokenizer if name.endswith("processor") else part).save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    if "sample_sigmas" in pipeline.config:
        index["sample_sigmas"] = [1.0, 0.7, 0.4]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(pipeline, "library", lambda *_: None)
    for kind, patch in (("Qwen2VLProcessor", 14), ("Qwen3VLProcessor", 16)):
        made = tiny_multimodal.processor(kind, patch)
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda *_, made=made, **__: made)


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", MULTIMODAL + CAUSAL)
def test_a_saved_base_makes_the_same_pictures(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = backbone(name)
    save(base.pipeline, tmp_path / "base")
    capfd.readouterr()
    loaded: Any = backbone_class(name).from_pretrained(tmp_path / "base")
    assert capfd.readouterr() == ("", "")
    loaded.pixels = loaded.condition_pixels = PIXELS
    assert "sample_sigmas" not in loaded.pipeline.config or loaded.pipeline.config.sample_sigmas == [1.0, 0.7, 0.4]
    if name == "longcat-image-edit":
        loaded.pipeline.tokenizer_max_length = base.pipeline.tokenizer_max_length
    expected = base.generate(requests(1), FAST, nothing)[0]
    torch.testing.assert_close(loaded.generate(requests(1), FAST, nothing)[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(loaded.condition(requests(1)).tokens, base.condition(requests(1)).tokens)
    with pytest.raises(CheckpointError, match=r"expected a pipeline of class FluxKontextPipeline, got"):
        backbone_class("flux-kontext").from_pretrained(tmp_path / "base")


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", ["qwen-image-edit-plus", "qwen-image-21"])
def test_half_precision(name: str, tmp_path: Path) -> None:
    save(backbone(name).pipeline, tmp_path / "base")
    loaded: Any = backbone_class(name).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    loaded.pixels = loaded.condition_pixels = PIXELS
    (made,) = loaded.generate(requests(1), FAST, nothing)
    assert made.dtype == torch.float32
    assert bool(made.isfinite().all())
    exact = backbone(name).generate(requests(1), FAST, nothing)[0]
    assert 0 < (made - exact).abs().max() < 0.2
