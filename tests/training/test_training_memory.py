"""Memory told before loading: what is certain is counted exactly, the rest grows with what it should grow with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import large_cases
import pytest
import torch

from openwu.backbones import backbone_class
from openwu.backbones.diffusers.loading import check_weights, part_numbers, pipeline_fingerprint, weight_files
from openwu.errors import CheckpointError, OpenwuError
from openwu.training.memory import Needs, needs_of
from openwu.training.pipelines import new_config, new_generator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_cases.saved("flux_kontext", tmp_path_factory.mktemp("base"))


def needs(base: Path, device: torch.device = CUDA, **changes: Any) -> Needs:
    recipe = large_cases.recipe("flux_kontext", base, Path("none"), **changes)
    config = new_config(recipe, backbone_class("flux-kontext").hollow(base))  # type: ignore[attr-defined]
    return needs_of(recipe, config, part_numbers(base), "transformer", device)


@pytest.mark.parametrize("name", large_cases.LARGE)
def test_a_hollow_base_says_what_the_loaded_one_says(name: str, tmp_path: Path) -> None:
    import base_cases

    folder = large_cases.saved(name, tmp_path)
    loaded = base_cases.backbone(name.replace("_", "-"))
    hollow = type(loaded).hollow(folder)
    assert hollow.layer_groups() == loaded.layer_groups()
    assert dict(hollow.condition_widths) == dict(loaded.condition_widths)
    assert {each.device.type for each in hollow.denoiser.parameters()} == {"meta"}
    hollow.pixels = loaded.pixels
    sizes = [(640, 480), (30, 50)]
    assert hollow.training_shape(sizes) == loaded.training_shape(sizes)


def test_weights_gradients_and_optimiser_are_counted_exactly(base: Path) -> None:
    recipe = large_cases.recipe("flux_kontext", base, Path("none"))
    kind: Any = backbone_class("flux-kontext")
    loaded = kind.from_pretrained(base)
    generator = new_generator(recipe, new_config(recipe, loaded))
    own = sum(value.numel() for value in generator.parameters()) * 4
    encoders = sum(p.numel() for part in loaded.encoders().values() for p in part.parameters()) * 4
    denoiser = sum(value.numel() for value in loaded.denoiser.parameters()) * 4
    found = needs(base)
    assert found.weights["generator"] == own
    assert sum(found.weights.values()) == denoiser + 4 * own
    assert found.weights["denoiser"] == denoiser
    # Files leave out a copy of shared embeddings, and hold the statistics that are no parameters.
    assert sum(found.encoding.values()) == pytest.approx(encoders, rel=0.1)
    averaged = replace(recipe.generator, ema=0.9)
    assert needs(base, generator=averaged).certain - found.certain == own
    assert sum(needs(base, bf16=True).encoding.values()) == sum(found.encoding.values()) // 2
    assert "encoders" in needs(base, encoders="keep").weights
    assert "encoders" in needs(base, cache="").weights
    assert not needs(base, cache="").encoding
    assert "encoders" in needs(base, CPU, encoders="cpu").weights
    assert sum(needs(base, CPU).encoding.values()) == sum(found.encoding.values()) + denoiser


def test_what_a_pass_adds_grows_as_it_should(base: Path) -> None:
    small = needs(base).passing
    stage = large_cases.recipe("flux_kontext", base, Path("none")).generator
    halves = needs(base, generator=replace(stage, accumulate=2)).passing
    for name, size in small.items():
        assert size == 2 * halves[name], name
    assert needs(base, checkpoint_base=False).passing["denoiser"] > small["denoiser"]
    assert needs(base, blocks=4, checkpoint_generator=False).passing["generator"] > 2 * small["generator"]
    assert needs(base, pixels=4 * 4096).passing["denoiser"] > small["denoiser"]
    assert needs(base, rank=8).passing["adapters and their gradients"] == 2 * small["adapters and their gradients"]


def test_it_is_told_warned_of_and_refused() -> None:
    told = Needs({"encoders": 3 * 10**9}, {"denoiser": 10**9, "generator": 10**9}, {"denoiser": 2 * 10**9})
    assert told.certain == 3 * 10**9
    assert told.total == 4 * 10**9
    assert told.check(CUDA, None) is told.check(CUDA, 4 * 10**9) is None
    warning = told.check(CUDA, 35 * 10**8)
    assert warning is not None
    assert "3.00 GB for weights" in warning
    with pytest.raises(OpenwuError, match=r"expected at least 3.00 GB for weights.* on cuda, which has 2.50 GB free"):
        told.check(CUDA, 25 * 10**8)
    text = told.text(CUDA, 80 * 10**9)
    assert text.startswith("memory on cuda: about 4.00 GB of 80.0 GB free\n")
    assert "to train: 2.00 GB (denoiser 1.00 GB, generator 1.00 GB)" in text


def test_a_fingerprint_follows_weights_and_configs(base: Path) -> None:
    before = pipeline_fingerprint(base)
    assert before == pipeline_fingerprint(base)
    (file,) = weight_files(base / "vae")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert pipeline_fingerprint(base) != before
    file.write_bytes(content)
    config = base / "vae" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("0.36", "0.37"))
    assert pipeline_fingerprint(base) != before
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"expected a config\.json"):
        backbone_class("flux-kontext").hollow(base)  # type: ignore[attr-defined]
    config.write_text(text)
    assert pipeline_fingerprint(base) == before
    assert check_weights(base) is None
