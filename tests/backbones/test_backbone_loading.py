"""Pipelines on disk: what loads, and the errors for everything that does not."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from base_cases import FAST, backbone, nothing, requests
from PIL import Image

from openwu.backbones import backbone_class
from openwu.backbones.diffusers import loading
from openwu.backbones.diffusers.latents import resized, working_size
from openwu.backbones.layers import find_groups
from openwu.backbones.protocol import BaseFacts
from openwu.errors import CheckpointError, InstructionError, OpenwuError, PictureError, TargetError
from openwu.registry import BASES, DEFAULT_BASE
from openwu.types import SamplingOptions


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "pix2pix"
    tiny_pipelines.instruct_pix2pix().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(folder: Any, **place: Any) -> Any:
    return backbone_class("instruct-pix2pix").from_pretrained(folder, **place)


def test_a_saved_pipeline_loads_frozen_and_makes_the_same_pictures(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load(saved)
    assert capfd.readouterr() == ("", "")
    assert not any(parameter.requires_grad for parameter in loaded.denoiser.parameters())
    expected = backbone("instruct-pix2pix").generate(requests(1), FAST, nothing)[0]
    torch.testing.assert_close(loaded.generate(requests(1), FAST, nothing)[0], expected, rtol=0, atol=1e-6)


def test_the_dtype_is_the_one_asked_for(saved: Path) -> None:
    loaded = load(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.denoiser.parameters()} == {torch.bfloat16}
    assert loaded.generate(requests(1), FAST, nothing)[0].dtype == torch.float32


def test_only_a_variant_of_the_weights(copy: Path) -> None:
    for file in copy.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    assert loading.check_weights(copy) == "fp16"
    assert load(copy).denoiser is not None


def test_what_is_no_pipeline(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected a folder with a diffusers pipeline .* path that does not exist"
    ):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="got a file"):
        load(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").write_text("")
    with pytest.raises(CheckpointError, match=r"expected a diffusers pipeline with model_index.json .*photo.jpg"):
        load(tmp_path / "other")
    with pytest.raises(OpenwuError, match="revision: expected none with the local folder"):
        load(saved, revision="main")


def test_a_pipeline_of_another_class_names_both(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match="class FluxKontextPipeline, got 'StableDiffusionInstructPix2PixPipeline'"
    ):
        backbone_class("flux-kontext").from_pretrained(saved)
    with pytest.raises(OpenwuError, match="pipeline: expected Flux2Pipeline, got FluxKontextPipeline"):
        backbone_class("flux2-dev")(backbone("flux-kontext").pipeline)  # type: ignore[call-arg]


def test_pickles_are_not_read(copy: Path) -> None:
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"found none in unet .*\.bin.*pickles are not read: choose a revision"):
        load(copy)


def test_a_cut_off_file_is_named(copy: Path) -> None:
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="copy"):
        load(copy)
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"unet/.*expected a complete safetensors file"):
        load(copy)


def test_a_config_that_diffusers_refuses_is_one_of_our_errors(copy: Path) -> None:
    config = json.loads((copy / "unet" / "config.json").read_text())
    config["block_out_channels"] = [8]
    (copy / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="diffusers cannot load this pipeline"):
        load(copy)


def test_too_little_memory_is_said_before_loading(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = sum(parameter.numel() for part in backbone("instruct-pix2pix").pipeline.components.values()
                  if isinstance(part, torch.nn.Module) for parameter in part.parameters())  # fmt: skip
    assert sum(loading.part_numbers(saved).values()) == pytest.approx(numbers, rel=0.01)
    monkeypatch.setattr(loading, "free_memory", lambda _: 1000)
    with pytest.raises(
        OpenwuError,
        match=r"pix2pix: expected 0.00 GB free on cpu \(weights in float32 0.00 GB\), got 0.00 GB; use a smaller",
    ):
        load(saved)
    monkeypatch.setattr(loading, "free_memory", lambda _: None)
    assert load(saved) is not None


def test_a_missing_package_names_the_extra(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        OpenwuError, match=r"this needs the Python package 'diffusers'.*pip install 'openwu\[diffusers\]'"
    ):
        load(saved)


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def snapshot_download(_: str, allow_patterns: list[str], **__: Any) -> str:
            assert not any("bin" in pattern for pattern in allow_patterns)
            raise ConnectionError("no network\nlong explanation")

    monkeypatch.setattr(loading, "library", lambda _: Hub)
    with pytest.raises(CheckpointError, match="cannot be downloaded at revision refs/pr/1: no network;"):
        loading.local_folder("some/model", "refs/pr/1")


@pytest.mark.parametrize("name", BASES)
def test_every_registered_base_says_what_it_is_without_its_libraries(name: str) -> None:
    facts = backbone_class(name).facts
    assert isinstance(facts, BaseFacts)
    assert all((facts.weights, facts.licence, facts.parameters))
    assert bool(facts.extra) == (name != DEFAULT_BASE)


def test_an_unknown_base_lists_the_known_ones() -> None:
    with pytest.raises(OpenwuError, match=r"expected one of instruct-pix2pix, .*flux-kontext.*got 'dall-e'"):
        backbone_class("dall-e")


def test_options_and_instructions_out_of_range() -> None:
    with pytest.raises(OpenwuError, match="steps: expected a whole number above 0, got 0"):
        SamplingOptions(steps=0)
    with pytest.raises(OpenwuError, match="guidance: expected a number from 0, got nan"):
        SamplingOptions(guidance=float("nan"))
    long = "word " * 90
    for name in ("instruct-pix2pix", "flux-kontext", "flux2-klein"):
        with pytest.raises(InstructionError, match="tokens"):
            backbone(name).text_states([long * 3])


def test_working_sizes_keep_proportions_and_bounds() -> None:
    assert working_size(4000, 3000, 1024 * 1024, 16) == (1168, 880)
    assert working_size(512, 512, 512 * 512, 64) == (512, 512)
    assert working_size(10, 10, 1024 * 1024, 16) == (1024, 1024)
    assert working_size(640, 80, 64 * 64, 16) == (176, 64)
    with pytest.raises(PictureError, match="at most 8 to 1 for a large base, got 900 x 100"):
        resized(Image.new("RGB", (900, 100)), 4096, 16)


def test_layers_that_differ_stand_in_groups_of_their_own() -> None:
    model = torch.nn.ModuleDict(
        {"blocks": torch.nn.ModuleList(torch.nn.ModuleDict({"fc": torch.nn.Linear(4, w)}) for w in (8, 8, 16, 8))}
    )
    layers = [f"blocks.{i}" for i in range(4)]
    narrow, wide = find_groups(model, "layers", layers, ("fc",))
    assert narrow.paths == ("blocks.0", "blocks.1", "blocks.3")
    assert wide.paths == ("blocks.2",)
    assert [narrow.layer_path(i) for i in range(3)] == ["blocks.0.", "blocks.1.", "blocks.3."]
    (plain,) = find_groups(model, "layers", layers[:2], ("fc",))
    assert (plain.prefix, plain.num_layers, plain.paths) == ("blocks.", 2, ())
    with pytest.raises(TargetError, match="none of its layers has gate"):
        find_groups(model, "layers", layers, ("fc", "gate"))
    with pytest.raises(TargetError, match="expected a linear layer, got ModuleDict"):
        find_groups(model, "layers", ["blocks"], ("0",))
