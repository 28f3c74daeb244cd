"""Micro-batches: the parts of a batch together are the batch, in loss, gradients and what is learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from openwu.data.suite.photographs import load_folder
from openwu.errors import OpenwuError
from openwu.training.checkpoint import load_weights
from openwu.training.embedded.config import STAGES, EmbeddedRecipe
from openwu.training.embedded.instruction_stages import InstructionStage, PhrasesStage
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import base_stage, generator_stage, shared_stage
from openwu.training.embedded.run import new_model, train
from openwu.training.loop import Stage
from openwu.training.micro_batch import FULL_BATCH, MicroBatch, StepBatchCache, take_rows
from openwu.training.record import describe


@pytest.mark.parametrize(("size", "count"), [(1, 1), (7, 3), (10, 4), (24, 5)])
def test_parts_are_the_batch_once(size: int, count: int) -> None:
    parts = [MicroBatch(index, count) for index in range(count)]
    rows = [list(range(size))[part.rows(size)] for part in parts]
    assert [row for each in rows for row in each] == list(range(size))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    assert sum(part.share(size) for part in parts) == pytest.approx(1)


def test_too_many_parts_are_refused() -> None:
    with pytest.raises(OpenwuError, match=r"a batch of 3 cannot be cut into 4 parts \(processes x accumulate\)"):
        MicroBatch(0, 4).rows(3)


class Named(NamedTuple):
    x: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Grouped:
    x: Tensor
    names: list[str]
    nothing: None = None


def test_rows_of_everything_that_has_rows() -> None:
    x, names, rows = torch.arange(6).view(3, 2), ("a", "b", "c"), slice(1, 3)
    assert torch.equal(take_rows(x, rows), x[1:])
    assert take_rows(list(names), rows) == ["b", "c"]
    texts = [torch.arange(n) for n in (2, 4, 3)]  # one a sample, of several lengths
    assert [len(each) for each in take_rows({"texts": texts, "x": x}, rows)["texts"]] == [4, 3]
    pair = take_rows((x, x + 1), rows)
    assert [each.tolist() for each in pair] == [[[2, 3], [4, 5]], [[3, 4], [5, 6]]]
    for batch in (Named(x, names), Grouped(x, list(names))):
        some: Any = take_rows(batch, rows)
        assert type(some) is type(batch)
        assert torch.equal(some.x, x[1:])
        assert list(some.names) == ["b", "c"]
    assert take_rows({"x": x, "names": names}, rows)["names"] == ("b", "c")


@pytest.mark.parametrize("batch", [3, "abc", torch.tensor(1.0), {"x": 0.5}])
def test_what_has_no_rows_is_refused(batch: Any) -> None:
    with pytest.raises(OpenwuError, match="rows: expected a batch of tensors or sequences, found"):
        take_rows(batch, slice(0, 1))


def test_a_batch_is_drawn_once_for_its_parts() -> None:
    drawn: list[int] = []

    def draw(step: int) -> int:
        drawn.append(step)
        return step

    batches = StepBatchCache(draw)
    assert [batches.at(step, MicroBatch(i, 2)) for step in (4, 5) for i in range(2)] == [4, 4, 5, 5]
    assert drawn == [4, 5]
    assert [batches.at(7, FULL_BATCH) for _ in range(2)] == [7, 7]
    assert drawn == [4, 5, 7, 7]


def shaken(recipe: EmbeddedRecipe) -> EmbeddedModel:
    """A base that changes pictures, so that adapters have something to act on."""
    model = new_model(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.05)
        model.generator.init_weights(0.3)
    return model


def stage_of(name: str, recipe: EmbeddedRecipe) -> Stage:
    model, folder = shaken(recipe), Path(recipe.photographs)
    if name == "instruction":
        return InstructionStage(model, recipe.seed, 6)
    if name == "phrases":
        return PhrasesStage(model, recipe.seed, 6)
    make = {"base": base_stage, "generator": generator_stage, "shared": shared_stage}[name]
    return make(recipe, model, (load_folder(folder), load_folder(folder, validation=True)))


def gradients(stage: Stage, step: int, count: int) -> tuple[float, dict[str, Tensor]]:
    stage.trained.zero_grad()
    total = 0.0
    for index in range(count):
        with stage.loss(step, MicroBatch(index, count)) as loss:
            torch.autograd.backward(loss)
            total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in stage.trained.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [name for name in STAGES if name != "examples"])
def test_gradients_of_parts_add_up_to_the_batches(recipe: EmbeddedRecipe, name: str) -> None:
    """Three rows in two and three parts: unequal parts count by their rows."""
    stage = stage_of(name, recipe)
    loss, expected = gradients(stage, 1, 1)
    assert any(float(each.abs().max()) > 1e-3 for each in expected.values())
    for count in (2, 3):
        other, came = gradients(stage, 1, count)
        assert other == pytest.approx(loss, abs=1e-5)
        assert came.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(came[key], expected[key], atol=1e-5, rtol=1e-4)


def test_broken_requests_of_a_part_are_named(recipe: EmbeddedRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    stage: Any = stage_of("generator", recipe)
    sound = stage.batches.batch(1)
    broken = sound.target.clone()
    broken[2] = torch.nan
    monkeypatch.setattr(type(stage.batches), "batch", lambda *_: replace(sound, target=broken))
    assert stage.not_finite(1, MicroBatch(0, 2)) == []
    assert stage.not_finite(1, MicroBatch(1, 2)) == [f"{sound.names[2]} ({sound.sentences[2]!r})"]


def accumulating(recipe: EmbeddedRecipe, count: int) -> EmbeddedRecipe:
    return replace(recipe, **{name: replace(getattr(recipe, name), accumulate=count) for name in recipe.known})  # type: ignore[arg-type]


def test_a_training_in_micro_batches_comes_to_the_same(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    """And so does one that begins in one way and goes on in the other: only memory depends on it."""
    micro = accumulating(recipe, 2)
    train(recipe, tmp_path / "whole")
    train(micro, tmp_path / "micro")
    for _ in range(3):
        train(micro, tmp_path / "parts", stages=("instruction",), stop_after=2)
    train(recipe, tmp_path / "changed", stages=("instruction",), stop_after=2)
    train(micro, tmp_path / "changed", stages=("instruction",))
    trained = {}
    for folder in ("whole", "micro", "parts", "changed"):
        model = new_model(recipe)
        load_weights(tmp_path / folder / "instruction", model.instruction, 5)
        trained[folder] = dict(model.instruction.named_parameters())
    for name, value in trained["whole"].items():
        assert torch.equal(trained["parts"][name], trained["micro"][name])
        for other in ("micro", "changed"):
            # Attention does not see its keys' biases: their gradients are rounding, which Adam makes as large as any.
            # Elsewhere five steps move a weight by up to 5e-3; the order of sums may change a hundredth of that.
            torch.testing.assert_close(trained[other][name], value, atol=1e-3 if "kv.bias" in name else 5e-5, rtol=0)
    for part in (tmp_path / "micro").iterdir():
        assert part.name in (*STAGES, "model")
    assert describe(micro)["base"]["accumulate"] == 2
    assert "accumulate" not in describe(recipe)["base"]


def test_more_micro_batches_than_requests_are_refused(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    with pytest.raises(OpenwuError, match="a batch of 6 cannot be cut into 7 parts"):
        train(accumulating(recipe, 7), tmp_path, stages=("instruction",))
