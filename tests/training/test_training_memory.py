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
from openwu.kernels.memory import MemoryPlan
from openwu.training.bases.pipelines import new_config, new_generator
from openwu.training.memory import ADVICE, ENCODING, TRAINING, training_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_cases.saved("flux_kontext", tmp_path_factory.mktemp("base"))


def plan(base: Path, device: torch.device = CUDA, **changes: Any) -> MemoryPlan:
    recipe = large_cases.recipe("flux_kontext", base, Path("none"), **changes)
    config = new_config(recipe, backbone_class("flux-kontext").hollow(base))  # type: ignore[attr-defined]
    return training_plan(recipe, config, part_numbers(base), "transformer", device)


@pytest.mark.parametrize("name", large_cases.LARGE)
def test_a_hollow_base_says_what_the_loaded_one_says(name: str, tmp_path: Path) -> None:
    import base_cases

    folder = large_cases.saved(name, tmp_path)
    loaded = base_cases.backbone(name.replace("_", "-"))
    hollow = type(loaded).hollow(folder)
    assert hollow.layer_groups() == loaded.layer_groups()
    assert dict(hollow.condition_widths) == dict(loaded.condition_widths)
    assert {each.device.type for each in hollow.denoiser.parameters()} == {"meta"}
    assert set(hollow.parts()) == {*hollow.encoders(), "transformer"} <= set(loaded.parts())
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
    found = plan(base)
    assert found.phases[TRAINING]["generator"] == own
    assert sum(found.phases[TRAINING].values()) == denoiser + 4 * own
    assert found.phases[TRAINING]["denoiser"] == denoiser
    # Files leave out a copy of shared embeddings, and hold the statistics that are no parameters.
    assert sum(found.phases[ENCODING].values()) == pytest.approx(encoders, rel=0.1)
    averaged = replace(recipe.generator, ema=0.9)
    assert plan(base, generator=averaged).certain - found.certain == own
    assert sum(plan(base, bf16=True).phases[ENCODING].values()) == sum(found.phases[ENCODING].values()) // 2
    assert "encoders" in plan(base, encoders="keep").phases[TRAINING]
    assert "encoders" in plan(base, cache="").phases[TRAINING]
    assert ENCODING not in plan(base, cache="").phases
    assert "encoders" in plan(base, CPU, encoders="cpu").phases[TRAINING]
    assert sum(plan(base, CPU).phases[ENCODING].values()) == sum(found.phases[ENCODING].values()) + denoiser


def test_what_a_pass_adds_grows_as_it_should(base: Path) -> None:
    small = plan(base).activations
    stage = large_cases.recipe("flux_kontext", base, Path("none")).generator
    halves = plan(base, generator=replace(stage, accumulate=2)).activations
    for name, size in small.items():
        assert size == 2 * halves[name], name
    assert plan(base, checkpoint_base=False).activations["denoiser"] > small["denoiser"]
    assert plan(base, blocks=4, checkpoint_generator=False).activations["generator"] > 2 * small["generator"]
    assert plan(base, pixels=4 * 4096).activations["denoiser"] > small["denoiser"]
    assert plan(base, rank=8).activations["adapters and their gradients"] == 2 * small["adapters and their gradients"]


def test_weights_that_cannot_fit_are_refused_with_what_to_do(base: Path) -> None:
    found = plan(base)
    assert found.check(CUDA, found.total, ADVICE)
    assert not found.check(CUDA, found.total - 1, ADVICE)
    with pytest.raises(OpenwuError, match=r"memory: expected .* its optimiser .*; make the generator smaller"):
        found.check(CUDA, found.certain - 1, ADVICE)


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
