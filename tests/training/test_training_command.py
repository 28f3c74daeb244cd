"""`openwu train` from a recipe to a model with its provenance, in one go or stage by stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openwu import cli
from openwu.data.photographs import folder_hashes, load_folder
from openwu.embedded import EmbeddedModel
from openwu.errors import CheckpointError, OpenwuError
from openwu.training.checkpoint import STATE
from openwu.training.command import describe, new_model, run, train
from openwu.training.recipe import STAGES, EmbeddedRecipe
from openwu.training.stages import generator_stage, held_out_accuracy, new_shared_adapter, shared_stage
from openwu.types import Adapter


def states(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: load_file(folder / name / STATE) for name in STAGES if (folder / name / STATE).exists()}


def assert_same(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].keys() == other[name].keys()
        for key, value in one[name].items():
            assert torch.equal(value, other[name][key]), (name, key)


def test_all_stages_make_a_model_with_its_provenance(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    train(replace(recipe, export=str(tmp_path / "exported")), tmp_path / "run")
    assert set(states(tmp_path / "run")) == set(STAGES)
    for stage in STAGES:
        assert list((tmp_path / "run" / stage).glob("events.out.tfevents.*"))
    for folder in (tmp_path / "run" / "model", tmp_path / "exported"):
        model = EmbeddedModel.from_pretrained(folder)
        trained = states(tmp_path / "run")
        for part, stage in ((model.instruction, "instruction"), (model.backbone, "base")):
            for name, value in part.state_dict().items():
                torch.testing.assert_close(value, trained[stage][f"weight/{name}"], atol=1e-3, rtol=1e-3)
        shared = Adapter.from_pretrained(folder / "shared")
        assert set(shared.targets) == set(model.generator.targets)
        assert any(b.abs().max() > 0 for _, b in shared.weights.values())
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["recipe"] == describe(replace(recipe, export=str(tmp_path / "exported")))
        assert provenance["photographs"] == folder_hashes(Path(recipe.photographs))
        assert set(provenance["seconds"]) == set(STAGES)


def test_stage_by_stage_and_in_parts_is_the_same_training(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "whole")
    for stage in STAGES:
        for _ in range(3):  # 2 + 2 + 1 of 5 steps
            assert not (tmp_path / "parts" / "model" / "shared").exists()
            train(recipe, tmp_path / "parts", stages=(stage,), stop_after=2)
    assert_same(states(tmp_path / "parts"), states(tmp_path / "whole"))
    for part in ("instruction", "backbone", "condition", "generator", "shared/adapter_model"):
        one, other = (tmp_path / folder / "model" / f"{part}.safetensors" for folder in ("parts", "whole"))
        assert one.read_bytes() == other.read_bytes(), part


def test_a_stage_needs_those_before_it_finished(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"instruction.*expected the state of an earlier stage"):
        train(recipe, tmp_path, stages=("base",))
    train(recipe, tmp_path, stages=("instruction",), stop_after=2)
    with pytest.raises(CheckpointError, match="expected a finished stage of 5 steps, got 2"):
        train(recipe, tmp_path, stages=("base",))
    assert not (tmp_path / "model").exists()


def test_another_recipe_in_the_same_folder_is_refused(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    train(recipe, tmp_path, stages=("instruction", "base"))
    with pytest.raises(CheckpointError, match=r"instruction.*\(changed: seed\)"):
        train(replace(recipe, seed=1), tmp_path)
    other_base = replace(recipe, base=replace(recipe.base, learning_rate=1e-3))
    with pytest.raises(CheckpointError, match=r"base.*\(changed: base\)"):
        train(other_base, tmp_path, stages=("instruction", "base"))
    # What comes later, or only decides what is written, may change.
    later = replace(recipe.generator, learning_rate=1e-4)
    train(replace(recipe, generator=later, log_every=1, name="x"), tmp_path, stages=("instruction", "base"))


def test_initial_weights_come_from_the_recipe_alone(recipe: EmbeddedRecipe) -> None:
    before = torch.get_rng_state()
    first, same, other = new_model(recipe), new_model(recipe), new_model(replace(recipe, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(first.generator.hidden_in.weight, other.generator.hidden_in.weight)


def test_generator_and_baseline_see_the_same_batches(recipe: EmbeddedRecipe) -> None:
    folder = Path(recipe.photographs)
    pictures = (load_folder(folder), load_folder(folder, validation=True))
    generated, shared = (make(recipe, new_model(recipe), pictures) for make in (generator_stage, shared_stage))
    for step in range(4):
        one, other = generated.batches.batch(step), shared.batches.batch(step)
        assert (one.names, one.sentences) == (other.names, other.sentences)
        for name in ("whole", "picture", "noise", "target"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    trained = {photograph.name for photograph in generated.batches.photographs}
    assert not trained & {photograph.name for photograph in generated.validation.photographs}


def test_a_stage_trains_its_own_parts_and_no_others(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    folder = Path(recipe.photographs)
    pictures = (load_folder(folder), load_folder(folder, validation=True))
    model = new_model(recipe)
    torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.02)
    stage = generator_stage(recipe, model, pictures)
    stage.loss(0).backward()
    for name, parameter in model.named_parameters():
        own = name.startswith(("condition.", "generator."))
        assert parameter.requires_grad == own, name
        assert (parameter.grad is not None) == own, name
    scalars = stage.evaluate().scalars
    assert {"psnr/brighten", "psnr/darken", "psnr/blur", "psnr_mean", "adapter/spread"} == set(scalars)
    assert scalars["adapter/spread"] > 0


def test_the_baseline_starts_as_no_change(recipe: EmbeddedRecipe) -> None:
    adapter = new_shared_adapter(recipe, new_model(recipe))()
    assert adapter.batch == 1
    assert all(not b.any() and a.std() > 0 for a, b in adapter.weights.values())


def test_accuracy_counts_held_out_sentences(recipe: EmbeddedRecipe) -> None:
    """An encoder that always says the same is right as often as that label occurs."""
    encoder = new_model(recipe).instruction
    torch.nn.init.zeros_(encoder.classify.weight)
    torch.nn.init.zeros_(encoder.classify.bias)
    with torch.no_grad():
        encoder.classify.bias[2] = 1
    assert held_out_accuracy(encoder, "en") == pytest.approx(4 / (4 + 4 + 4 + 30))


def test_the_command_line_trains(recipe: EmbeddedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openwu.training.command.load_recipe", lambda *_: replace(recipe, seed=2))
    assert run("recipe.py", [], stages=["instruction"]) == Path("runs/tiny")
    assert set(states(Path("runs/tiny"))) == {"instruction"}
    with pytest.raises(OpenwuError, match=r"stages: expected some of .*, got \['bass'\]"):
        run("recipe.py", [], stages=["bass"])
    assert cli.main(["train", "recipe.py", "--output", "other", "--stage", "instruction"]) == 0
    assert_same(states(Path("other")), states(Path("runs/tiny")))
