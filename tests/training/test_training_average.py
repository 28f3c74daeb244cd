"""Moving averages: the formula, what is judged and handed on, and that a resumed training has the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from openwu.errors import CheckpointError
from openwu.training.checkpoint import STATE, load_weights
from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.run import new_model, train
from openwu.training.loop import Evaluation, LoopConfig, train_stage
from openwu.training.micro_batch import FULL_BATCH, MicroBatch
from openwu.training.optimizers import EmaWeights
from openwu.training.record import describe

DECAY = 0.8
LOOP = LoopConfig(json.dumps({}), checkpoint_every=2, evaluate_every=3, log_every=1)
CONFIG = StageConfig(steps=7, shapes=((1, 1),), learning_rate=1e-1, warmup=1, ema=DECAY)


def _linear() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 1)


@dataclass
class Fit:
    """Keeps the weights that it meets at every step, and those that it is judged with."""

    name: str = "fit"
    trained: nn.Linear = field(default_factory=_linear)
    met: list[Tensor] = field(default_factory=list)
    judged: list[Tensor] = field(default_factory=list)

    @contextmanager
    def loss(self, step: int, _part: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        self.met.append(self.trained.weight.detach().clone())
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        yield (self.trained(x) - x.sum(1, keepdim=True)).square().mean()

    def not_finite(self, _step: int, _part: MicroBatch = FULL_BATCH) -> list[str]:
        return []

    def evaluate(self) -> Evaluation:
        self.judged.append(self.trained.weight.detach().clone())
        return Evaluation({})


def test_the_average_is_judged_handed_on_and_never_trained_from(tmp_path: Path) -> None:
    stage, plain = Fit(), Fit()
    assert train_stage(stage, CONFIG, LOOP, tmp_path / "averaged")
    train_stage(plain, replace(CONFIG, ema=0.0), LOOP, tmp_path / "plain")
    # The training is the one without averages.
    assert all(torch.equal(one, other) for one, other in zip(stage.met, plain.met, strict=True))
    weights = [*stage.met[1:], plain.trained.weight.detach()]  # after every update
    averages = weights[:1]
    for weight in weights[1:]:
        averages.append(DECAY * averages[-1] + (1 - DECAY) * weight)
    for judged, step in zip(stage.judged, (3, 6, 7), strict=True):
        torch.testing.assert_close(judged, averages[step - 1])
    torch.testing.assert_close(stage.trained.weight.detach(), averages[-1])
    assert not torch.allclose(averages[-1], weights[-1], atol=1e-3)
    state = load_file(tmp_path / "averaged" / STATE)
    assert torch.equal(state["weight/weight"], weights[-1])
    assert torch.equal(state["average/weight"], stage.trained.weight)
    other = _linear()
    load_weights(tmp_path / "averaged", other, 7)
    assert torch.equal(other.weight, stage.trained.weight)
    # A finished training that is asked to go on has its averages, too.
    again = Fit()
    assert train_stage(again, CONFIG, LOOP, tmp_path / "averaged")
    assert torch.equal(again.trained.weight, stage.trained.weight)
    assert again.met == []


def test_stopping_and_continuing_changes_no_average(tmp_path: Path) -> None:
    whole = Fit()
    train_stage(whole, CONFIG, LOOP, tmp_path / "whole")
    for _ in range(3):
        part = Fit()
        train_stage(part, CONFIG, replace(LOOP, stop_after=3), tmp_path / "parts")
    one, other = (load_file(tmp_path / folder / STATE) for folder in ("parts", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(part.trained.weight, whole.trained.weight)


def test_weights_come_back_after_an_error() -> None:
    module = _linear()
    average, own = EmaWeights(module, DECAY), module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    inside = []

    def fail() -> None:
        with average.applied():
            inside.append(module.weight.detach().clone())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(inside[0], own)
    assert torch.equal(module.weight, own + 1)


def test_states_with_and_without_averages_are_not_mixed(tmp_path: Path) -> None:
    train_stage(Fit(), replace(CONFIG, ema=0.0), replace(LOOP, stop_after=3), tmp_path)
    with pytest.raises(CheckpointError, match="expected moving averages of 2 parameters, got 0; set ema as it was"):
        train_stage(Fit(), CONFIG, LOOP, tmp_path)


def test_what_a_recipe_exports_and_builds_on_is_the_average(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    averaged = replace(recipe, base=replace(recipe.base, ema=DECAY))
    train(averaged, tmp_path, stages=("instruction", "base", "generator"))
    state = load_file(tmp_path / "base" / STATE)
    exported = load_file(tmp_path / "model" / "backbone.safetensors")
    differing = 0
    for name, value in exported.items():
        torch.testing.assert_close(value.float(), state[f"average/{name}"], atol=1e-3, rtol=1e-3)
        differing += int((state[f"average/{name}"] - state[f"weight/{name}"]).abs().max() > 1e-3)
    assert differing
    assert describe(averaged)["base"]["ema"] == DECAY
    assert "ema" not in describe(recipe)["base"]
    model = new_model(recipe)
    load_weights(tmp_path / "base", model.backbone, 5)
    assert torch.equal(model.backbone.embed.weight, state["average/embed.weight"])


@pytest.mark.parametrize("ema", [-0.1, 1.0])
def test_a_decay_is_below_one(ema: float) -> None:
    with pytest.raises(ValueError, match="ema: expected 0, or a decay below 1"):
        replace(CONFIG, ema=ema)
