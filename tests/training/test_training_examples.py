"""Training edits that are shown by example: batches, the stage, and that edits in words stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openwu.data.examples import EXAMPLE, SINGLE_EVERY, ExampleSampler, neighbours
from openwu.data.programs import COLOUR_FAMILIES
from openwu.data.suite.photographs import Photograph, load_folder
from openwu.errors import OpenwuError
from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.example_stage import ExampleStage, example_stage
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.run import new_model, train
from openwu.training.micro_batch import MicroBatch
from openwu.training.optimizers import StageOptimizer


@pytest.fixture
def shown_recipe(recipe: EmbeddedRecipe, large_folder: Path) -> EmbeddedRecipe:
    return replace(
        recipe,
        model=recipe.model.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1),
        examples=StageConfig(steps=4, shapes=((3, 24), (2, 64)), learning_rate=3e-3, warmup=1),
        stages=("examples",),
        side=64,
        photographs=str(large_folder),
        evaluate_every=0,
    )


@pytest.fixture(scope="module")
def large_folder(scene: Callable[..., NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of which every scale has room for a crop."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("a.jpg", "b.jpg", "life_by_aitzol_berasategi.jpg")):
        Image.fromarray(scene(96, 80, seed)).save(folder / name, quality=95)
    return folder


@pytest.fixture
def photographs(large_folder: Path) -> list[Photograph]:
    return load_folder(large_folder)


@pytest.fixture
def stage(shown_recipe: EmbeddedRecipe, photographs: list[Photograph], monkeypatch: pytest.MonkeyPatch) -> ExampleStage:
    """Of a base that changes pictures, so that adapters have something to act on."""
    monkeypatch.setattr("openwu.training.embedded.wordless.STEPS", 1)
    model = new_model(shown_recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.05)
        model.generator.init_weights(0.3)
    return example_stage(shown_recipe, model, (photographs, photographs))


def test_batches_depend_on_the_step_alone(photographs: list[Photograph]) -> None:
    sampler = ExampleSampler(photographs, ((3, 24), (4, 64)), side=64)
    kinds = set()
    for step in range(2 * SINGLE_EVERY):
        batch, again = sampler.batch(step), sampler.batch(step)
        size, side = sampler.shapes[step % 2]
        assert len(batch.names) == sampler.size(step) == size
        assert batch.picture.shape == batch.planes.shape == (size, 3, side, side)
        assert batch.examples.shape[2:] == (2, 3, 64, 64)
        assert batch.target.shape[1] == (1 if (step + 1) % SINGLE_EVERY == 0 else 2)
        for name in ("examples", "picture", "planes", "target"):
            assert torch.equal(getattr(batch, name), getattr(again, name))
        assert not torch.equal(batch.picture, sampler.batch(step + 2 * SINGLE_EVERY).picture)
        kinds.add(batch.whole is not None)
    assert kinds == {True, False}


def test_a_series_shares_its_photographs(photographs: list[Photograph]) -> None:
    """With exposure alone, a target is its photograph times one number of its request, where nothing is clamped."""
    batch = ExampleSampler(photographs, ((4, 24),), side=64, families=("exposure",)).batch(0)
    for row in range(4):
        factors = []
        for place, at in enumerate(neighbours(row, 2, 4)):
            target, picture = batch.target[row, place], batch.picture[at]
            inside = (target > 0.02) & (target < 0.98) & (picture > 0.02)
            if bool(inside.any()):
                factors.append((target / picture)[inside])
        together = torch.cat(factors)
        assert float(together.std()) < 1e-3
    assert neighbours(3, 2, 4) == [3, 0]


def test_it_begins_with_plain_colour(photographs: list[Photograph], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[str, ...], int]] = []

    def record(_: torch.Generator, families: list[str], longest: int = 3) -> object:
        asked.append((tuple(families), longest))
        return lambda picture, _: picture

    monkeypatch.setattr("openwu.data.examples.draw_program", record)
    sampler = ExampleSampler(photographs, ((2, 24),), side=64, plain=SINGLE_EVERY)
    for step in range(SINGLE_EVERY):
        assert sampler.batch(step).target.shape[1] == 2
    assert {longest for _, longest in asked} == {1}
    assert all(set(families) <= set(COLOUR_FAMILIES) for families, _ in asked)
    asked.clear()
    sampler.batch(SINGLE_EVERY)
    assert {longest for _, longest in asked} == {3}


def test_gradients_of_parts_add_up(stage: ExampleStage) -> None:
    for step in (0, 1, SINGLE_EVERY - 1):
        size = stage.batches.size(step)
        whole, expected = gradients(stage, step, 1)
        parts, came = gradients(stage, step, size)
        assert parts == pytest.approx(whole, abs=1e-5)
        assert any(float(each.abs().max()) > 1e-4 for each in expected.values())
        for name, each in expected.items():
            torch.testing.assert_close(came[name], each, atol=1e-4, rtol=1e-2)  # the last layer's solution rounds


def gradients(stage: ExampleStage, step: int, count: int) -> tuple[float, dict[str, Tensor]]:
    stage.trained.zero_grad()
    total = 0.0
    for index in range(count):
        with stage.loss(step, MicroBatch(index, count)) as loss:
            torch.autograd.backward(loss)
            total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in stage.trained.named_parameters() if p.grad is not None}


def test_the_stage_applies_what_the_model_applies(stage: ExampleStage) -> None:
    """Through the full-resolution path alone it computes what the whole model does."""
    model = stage.model
    for step in (0, SINGLE_EVERY - 1):
        batch = stage.batches.batch(step)
        edited, target = stage.edited(batch, range(len(batch.names)))
        assert target.shape == edited.shape
        text = model.instruction(batch.sentences)
        adapter = model.generator.complete(stage.adapters(batch, slice(None), text))
        count = batch.target.shape[1]
        asked = [(row, at) for row in range(len(batch.names)) for at in neighbours(row, count, len(batch.names))]
        for place, (row, at) in enumerate(asked):
            alone = model.edit(
                *(batch.picture[at : at + 1], batch.planes[at : at + 1], text[at : at + 1], adapter.select([row])),
                raw=True,
            )
            torch.testing.assert_close(edited[place], alone[0], atol=1e-4, rtol=1e-4)


def test_the_loss_falls(stage: ExampleStage) -> None:
    optimizer = StageOptimizer(stage.trained, stage.config)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with stage.loss(0) as loss:
            torch.autograd.backward(loss)
            losses.append(float(loss.detach()))
        optimizer.step(1.0)
    assert losses[-1] < losses[0] - 0.05
    scalars = stage.evaluate().scalars
    assert scalars["psnr/example"] != scalars["psnr/other"]


def test_a_start_without_examples_grows_and_keeps_its_words(
    shown_recipe: EmbeddedRecipe, recipe: EmbeddedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openwu.training.embedded.wordless.STEPS", 1)
    new_model(recipe).save_pretrained(tmp_path / "start")
    trained = replace(shown_recipe, start=str(tmp_path / "start"))
    train(trained, tmp_path / "run", stop_after=2)
    assert not (tmp_path / "run/model").exists()
    train(trained, tmp_path / "run")
    train(trained, tmp_path / "at_once")
    start, end, once = (
        EmbeddedModel.from_pretrained(tmp_path / each) for each in ("start", "run/model", "at_once/model")
    )
    old, new = start.state_dict(), end.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert {name.split(".")[1] for name in new.keys() - old.keys()} == {"example", "branches", "wordless"}
    assert all(torch.equal(new[name], value) for name, value in once.state_dict().items())
    picture, text = torch.rand(1, 3, 24, 24), start.instruction(["make it brighter"])
    pairs = [each.adapt(picture, text).state_dict() for each in (start, end)]
    assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])


def test_a_model_without_examples_cannot_learn_them(shown_recipe: EmbeddedRecipe, recipe: EmbeddedRecipe) -> None:
    with pytest.raises(ValueError, match=r"condition\.examples"):
        replace(shown_recipe, model=recipe.model)
    with pytest.raises(OpenwuError, match="without"):
        example_stage(shown_recipe, EmbeddedModel(recipe.model), ([], []))
    assert EXAMPLE not in shown_recipe.edits
    assert recipe.known == ("instruction", "base", "generator", "shared")
