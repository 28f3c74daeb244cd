"""A generator for a base of one's own: the loss is the base's under the adapters, and a training continues."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import openwu
from openwu.errors import OpenwuError
from openwu.training.loop import LoopConfig, train_stage
from openwu.training.objective import Question, Regression
from openwu.training.own import OwnStage
from openwu.training.recipe import StageConfig

TARGET = openwu.Target("0", 3, 3)
LOOP = LoopConfig(recipe="{}", checkpoint_every=2, evaluate_every=2, log_every=1)
CONFIG = StageConfig(steps=6, shapes=((4, 0),), learning_rate=1e-2)


class Writer(nn.Module):
    """A rank-1 adapter from a request `[b, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(2, 6)

    def forward(self, requests: Tensor) -> openwu.Adapter:
        a, b = self.linear(requests).chunk(2, dim=1)
        return openwu.Adapter((TARGET,), {"0": (a[:, None, :], b[:, :, None])}, 1.0)


def stage(writer: Writer, base: nn.Module, handle: openwu.AdapterHandle) -> OwnStage[Tensor]:
    """The base shall return the request's first number in every place."""

    def batches(step: int) -> Tensor:
        return torch.randn(4, 2, generator=torch.Generator().manual_seed(step))

    def predict(requests: Tensor, question: Question) -> Tensor:
        assert question.given is None
        out: Tensor = base(torch.ones(len(requests), 3))
        return out

    return OwnStage(
        "writer",
        writer,
        handle,
        batches,
        writer,
        lambda requests: requests[:, :1].expand(-1, 3),
        predict,
        Regression(),
        validation=batches(99),
    )


@pytest.fixture
def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)


def test_the_loss_is_the_bases_under_each_samples_adapter(base: nn.Module) -> None:
    writer = Writer()
    own = stage(writer, base, openwu.attach(base, (TARGET,)))
    requests = own.batches(5)
    adapter = writer(requests)
    a, b = adapter.weights["0"]
    said = base(torch.ones(4, 3)) + (b @ a @ torch.ones(3, 1))[:, :, 0]
    expected = (said - requests[:, :1]).square().mean()
    with own.loss(5) as loss:
        torch.testing.assert_close(loss, expected)
        torch.autograd.backward(loss)
    assert writer.linear.weight.grad is not None
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_stopped_training_continues_to_the_same_weights(base: nn.Module, tmp_path: Path) -> None:
    handle = openwu.attach(base, (TARGET,))
    whole, parts = Writer(), Writer()
    assert train_stage(stage(whole, base, handle), CONFIG, LOOP, tmp_path / "whole")
    stopping = LoopConfig(recipe="{}", checkpoint_every=2, evaluate_every=2, log_every=1, stop_after=3)
    assert not train_stage(stage(parts, base, handle), CONFIG, stopping, tmp_path / "parts")
    again = Writer()
    assert train_stage(stage(again, base, handle), CONFIG, LOOP, tmp_path / "parts")
    assert torch.equal(whole.linear.weight, again.linear.weight)


def test_validation_logs_the_loss_and_how_much_adapters_differ(base: nn.Module) -> None:
    own = stage(Writer(), base, openwu.attach(base, (TARGET,)))
    scalars = own.evaluate().scalars
    assert scalars["validation"] > 0
    assert 0 < scalars["adapter/spread"] <= 1
    own.validation = None
    assert own.evaluate().scalars == {}


def test_broken_samples_are_named(base: nn.Module) -> None:
    own = stage(Writer(), base, openwu.attach(base, (TARGET,)))
    assert own.not_finite(0) == []
    own.target = lambda requests: requests[:, :1].expand(-1, 3) / torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None]
    assert own.not_finite(0) == ["number 2 of the batch"]


def test_nothing_to_train_is_refused(base: nn.Module) -> None:
    with pytest.raises(OpenwuError, match="trained: expected a module with parameters that require gradients"):
        stage(Writer().requires_grad_(False), base, openwu.attach(base, (TARGET,)))


def test_the_example_moves_circles() -> None:
    example = runpy.run_path("examples/train_your_own.py")
    ladder, alone, adapted = example["train"](base_steps=300, steps=250)
    assert adapted < 0.4 * alone
    assert ladder.verdict.startswith("conditional: ")
