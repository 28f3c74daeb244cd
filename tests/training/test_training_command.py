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
from openwu.cli.train import run
from openwu.data.suite import EDITS
from openwu.data.suite.batches import PairSampler
from openwu.data.suite.photographs import Photograph, folder_hashes, load_folder
from openwu.data.suite.phrases import OUT_OF_SCOPE
from openwu.errors import CheckpointError, OpenwuError
from openwu.training.checkpoint import STATE
from openwu.training.embedded.config import STAGES, EmbeddedRecipe
from openwu.training.embedded.instruction_stages import DROPPED
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import (
    annealed_floor,
    generator_stage,
    new_shared_lora,
    picture_losses,
    shared_stage,
)
from openwu.training.embedded.run import new_model, train
from openwu.training.record import PROVENANCE, describe
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
    stages_made = set(recipe.known)
    assert set(states(tmp_path / "run")) == stages_made
    for stage in stages_made:
        assert list((tmp_path / "run" / stage).glob("events.out.tfevents.*"))
    for folder in (tmp_path / "run" / "model", tmp_path / "exported"):
        model = EmbeddedModel.from_pretrained(folder)
        trained = states(tmp_path / "run")
        for part, stage in ((model.instruction, "instruction"), (model.backbone, "base")):
            for name, value in part.state_dict().items():
                torch.testing.assert_close(value, trained[stage][f"weight/{name}"], atol=1e-3, rtol=1e-3)
        shared = Adapter.from_pretrained(folder / "shared")
        assert set(shared.targets) == set(model.generator.targets)
        assert any(b.abs().max() > 0 for _, b in shared.pairs.values())
        for part, stages in ((folder, stages_made - {"shared"}), (folder / "shared", stages_made)):
            provenance = json.loads((part / "provenance.json").read_text())
            assert provenance["recipe"] == describe(replace(recipe, export=str(tmp_path / "exported")))
            assert provenance["photographs"] == folder_hashes(Path(recipe.photographs))
            assert set(provenance["seconds"]) == stages


def test_stage_by_stage_and_in_parts_is_the_same_training(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "whole")
    for stage in recipe.known:
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
    with pytest.raises(CheckpointError, match=r"instruction.*\(changed: seed 0 -> 1\)"):
        train(replace(recipe, seed=1), tmp_path)
    other_base = replace(recipe, base=replace(recipe.base, learning_rate=1e-3))
    with pytest.raises(CheckpointError, match=r"base.*\(changed: base\.learning_rate 0\.\d+ -> 0\.001\)"):
        train(other_base, tmp_path, stages=("instruction", "base"))
    # What comes later, or only decides what is written, may change.
    later = replace(recipe.generator, learning_rate=1e-4)
    train(replace(recipe, generator=later, log_every=1, name="x"), tmp_path, stages=("instruction", "base"))


def test_another_version_of_the_data_is_refused(
    recipe: EmbeddedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, tmp_path, stages=("instruction", "base"))
    monkeypatch.setattr("openwu.training.embedded.run.folder_hashes", lambda _: {"other.jpg": "0"})
    with pytest.raises(CheckpointError, match=r"base.*\(changed: photographs\)"):
        train(recipe, tmp_path, stages=("instruction", "base"))
    monkeypatch.setattr("openwu.training.embedded.run.phrases_hash", lambda: "0")
    with pytest.raises(CheckpointError, match=r"instruction.*\(changed: sentences\)"):
        train(recipe, tmp_path, stages=("instruction",))


def test_a_finished_model_goes_on_in_the_stages_of_the_recipe(
    recipe: EmbeddedRecipe, model_folder: Path, tmp_path: Path
) -> None:
    """The instruction encoder stays as it is in the start, whose provenance keeps standing."""
    (tmp_path / "start").mkdir()
    for file in model_folder.iterdir():
        (tmp_path / "start" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "start" / PROVENANCE).write_text('{"date": "once"}')
    start = EmbeddedModel.from_pretrained(tmp_path / "start")
    going = replace(recipe, start=str(tmp_path / "start"), stages=("base", "generator"), model=start.config)
    names = tuple(name for name in start.config.instruction.labels if name in EDITS)
    going = replace(going, base_edits=names[:1], edits=names[:2])
    train(going, tmp_path / "run", going.stages)
    assert set(states(tmp_path / "run")) == {"base", "generator"}
    after = EmbeddedModel.from_pretrained(tmp_path / "run" / "model")
    changed = {
        name.partition(".")[0]
        for name, value in start.state_dict().items()
        if not torch.equal(value.half(), after.state_dict()[name].half())
    }
    assert changed == {"backbone", "condition", "generator"}
    stored = json.loads((tmp_path / "run" / "model" / PROVENANCE).read_text())
    assert stored["date"] == "once"
    assert [set(each["seconds"]) for each in stored["then"]] == [{"base", "generator"}]
    other = replace(going.model, instruction=replace(going.model.instruction, labels=("other", OUT_OF_SCOPE)))
    with pytest.raises(OpenwuError, match="start: expected a model of the recipe's sizes and labels"):
        train(replace(going, model=other), tmp_path / "other", going.stages)


def test_unknown_stages_of_a_recipe_are_refused(recipe: EmbeddedRecipe) -> None:
    with pytest.raises(ValueError, match=r"stages: expected some of .*, got \['bass'\]"):
        replace(recipe, stages=("bass",))


def test_initial_weights_come_from_the_recipe_alone(recipe: EmbeddedRecipe) -> None:
    before = torch.get_rng_state()
    first, same, other = new_model(recipe), new_model(recipe), new_model(replace(recipe, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(first.generator.hidden_in.weight, other.generator.hidden_in.weight)


def photographs(recipe: EmbeddedRecipe) -> tuple[list[Photograph], list[Photograph]]:
    """(training, validation)"""
    folder = Path(recipe.photographs)
    return load_folder(folder), load_folder(folder, validation=True)


def test_generator_and_baseline_learn_the_same_sub_tasks_in_the_same_order(recipe: EmbeddedRecipe) -> None:
    """Only the generator's adapters learn to be scaled: one shared adapter cannot be asked for a strength."""
    generated, shared = (
        make(recipe, new_model(recipe), photographs(recipe)) for make in (generator_stage, shared_stage)
    )
    dials = []
    for step in range(24):
        one, other = generated.batches.batch(step), shared.batches.batch(step)
        assert one.names == other.names
        assert one.picture.shape == other.picture.shape
        dials += one.dial.tolist()
        assert other.dial.tolist() == [1.0] * len(other.names)
        assert other.present.tolist() == [name == "take_palette" for name in other.names]
    assert len(set(dials)) > 3
    trained = {photograph.name for photograph in generated.batches.photographs}
    assert not trained & {photograph.name for photograph in generated.validation.photographs}
    assert (generated.validation.dialled, shared.validation.dialled) == (False, False)


def shaken(recipe: EmbeddedRecipe) -> EmbeddedModel:
    """A model whose base changes pictures, so that adapters have something to act on."""
    model = new_model(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.05)
        model.generator.init_weights(0.3)
    return model


def test_dials_and_references_reach_the_loss(recipe: EmbeddedRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's loss, written out; and what happens to it when a dial or a reference is taken away."""
    recipe = replace(recipe, edits=("brighten", "take_palette"))
    model = shaken(recipe)
    stage = generator_stage(recipe, model, photographs(recipe))
    draws = ((step, stage.batches.batch(step)) for step in range(1, 99))
    step, batch = next((s, b) for s, b in draws if b.present.any() and not b.present.all() and (b.dial != 1).any())
    with torch.no_grad():
        left_out = (DROPPED, torch.Generator().manual_seed(recipe.seed * 5_000_011 + step))
        text = model.instruction(batch.sentences, left_out)
        condition = model.condition(batch.whole, text, batch.reference, batch.present)
        adapter = model.generator(condition).scaled(batch.dial)
        predicted = model.edit(batch.picture, batch.planes, text, adapter, raw=True)
        floor = annealed_floor(recipe.generator.first_floor, step / recipe.generator.steps)
        expected = float(picture_losses(predicted, batch.target, floor).mean())
    with stage.loss(step) as loss:
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        loss.backward()
    assert all(p.grad is not None for part in (model.condition, model.generator) for p in part.parameters())
    for name, other in (
        ("dial", torch.ones_like(batch.dial)),
        ("present", torch.zeros_like(batch.present)),
        ("reference", batch.reference.flip(1)),
    ):
        changed = replace(batch, **{name: other})
        monkeypatch.setattr(PairSampler, "batch", lambda *_, changed=changed: changed)
        with stage.loss(step) as loss:
            assert abs(float(loss.detach()) - expected) > 1e-5, name


def test_the_shared_adapter_is_the_same_for_every_request(recipe: EmbeddedRecipe) -> None:
    model = shaken(recipe)
    stage = shared_stage(recipe, model, photographs(recipe))
    with torch.no_grad():
        for b in stage.trained.b:  # type: ignore[union-attr]
            b.normal_(std=0.1)
    batch = stage.batches.batch(0)
    text = stage.read(batch)
    predicted, adapter = stage.predict(batch, text), stage.adapt(batch, text)
    assert adapter is not None
    assert adapter.batch == 1
    for i in range(len(batch.names)):
        row = slice(i, i + 1)
        words = model.instruction(batch.sentences[row])
        alone = model.edit(batch.picture[row], batch.planes[row], words, adapter, raw=True)
        torch.testing.assert_close(predicted[row], alone, atol=1e-4, rtol=1e-4)


def test_a_stage_trains_its_own_parts_and_no_others(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    model = shaken(recipe)
    stage = generator_stage(recipe, model, photographs(recipe))
    with stage.loss(0) as loss:
        loss.backward()
    for name, parameter in model.named_parameters():
        own = name.startswith(("condition.", "generator."))
        assert parameter.requires_grad == own, name
        assert (parameter.grad is not None) == own, name
    scalars = stage.evaluate().scalars
    names = ("relative_std", "relative_norm", "relative_norm_max", "within", "across", "within_over_across")
    logged = {f"adapter/{name}" for name in names}
    assert {*(f"psnr/{name}" for name in recipe.edits), "psnr_mean", *logged} == set(scalars)
    assert all(scalars[name] > 0 for name in logged)


def test_the_baseline_starts_as_no_change(recipe: EmbeddedRecipe) -> None:
    adapter = new_shared_lora(recipe, new_model(recipe))()
    assert adapter.batch == 1
    assert all(not b.any() and a.std() > 0 for a, b in adapter.pairs.values())


def test_the_command_line_trains(
    recipe: EmbeddedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openwu.training.run.load_recipe", lambda *_: replace(recipe, seed=2, bf16=True))
    monkeypatch.setattr("openwu.training.run.multiplies_bfloat16", lambda _: False)
    assert run("recipe.py", [], stages=["instruction"]) == Path("runs/tiny")
    assert set(states(Path("runs/tiny"))) == {"instruction"}
    with pytest.raises(OpenwuError, match=r"stages: expected some of .*, got \['bass'\]"):
        run("recipe.py", [], stages=["bass"])
    assert cli.main(["train", "recipe.py", "--output", "other", "--stage", "instruction"]) == 0
    assert_same(states(Path("other")), states(Path("runs/tiny")))
