"""A generator for a base of one's own: the loss is the base's under the adapters, and a training continues."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import openwu
from openwu.errors import OpenwuError
from openwu.training.config import StageConfig
from openwu.training.loop import LoopConfig, train_stage
from openwu.training.micro_batch import MicroBatch
from openwu.training.objectives import FlowMatching, NoisySample, Regression
from openwu.training.stage import GeneratorStage

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
        return openwu.Adapter.from_pairs((TARGET,), {"0": (a[:, None, :], b[:, :, None])}, 1.0)


def stage(writer: Writer, base: nn.Module, handle: openwu.AdapterHandle) -> GeneratorStage[Tensor]:
    """The base shall return the request's first number in every place."""

    def batches(step: int) -> Tensor:
        return torch.randn(4, 2, generator=torch.Generator().manual_seed(step))

    def predict(requests: Tensor, question: NoisySample) -> Tensor:
        assert question.x_t is None
        out: Tensor = base(torch.ones(len(requests), 3))
        return out

    return GeneratorStage(
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
    a, b = adapter.pairs["0"]
    prediction = base(torch.ones(4, 3)) + (b @ a @ torch.ones(3, 1))[:, :, 0]
    expected = (prediction - requests[:, :1]).square().mean()
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
    assert 0 < scalars["adapter/relative_std"] <= 1
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


class Deep(nn.Module):
    """Two adapted layers with a nonlinearity; recomputed in the backward pass where asked to."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.recompute = recompute
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(self.block, layer, x, use_reentrant=False) if self.recompute else self.block(layer, x)
        return x

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(layer(x)) + x


def deep_stage(recompute: bool, writer: Writer, bf16: bool = False) -> tuple[GeneratorStage[Tensor], Deep]:
    """Both layers have the request's adapter."""
    base = Deep(recompute).requires_grad_(False)
    targets = tuple(openwu.Target(f"layers.{i}", 3, 3) for i in range(2))

    def adapt(requests: Tensor) -> openwu.Adapter:
        pair = writer(requests).pairs["0"]
        return openwu.Adapter.from_pairs(targets, {target.name: pair for target in targets}, 1.0)

    return GeneratorStage(
        "deep",
        writer,
        openwu.attach(base, targets),
        lambda step: torch.randn(4, 2, generator=torch.Generator().manual_seed(step)),
        adapt,
        lambda requests: requests[:, :1].expand(-1, 3),
        lambda requests, _: base(torch.ones(len(requests), 3)),
        Regression(),
        bf16=bf16,
    ), base


def test_a_base_may_checkpoint_its_activations(tmp_path: Path) -> None:
    """Its blocks run again in the backward pass, under the same adapters: equal gradients, equal trainings."""
    trained, calls = [], []
    for recompute in (False, True):
        writer = Writer()
        own, base = deep_stage(recompute, writer)
        with own.loss(3) as loss:
            torch.autograd.backward(loss)
        calls.append(base.calls)
        assert writer.linear.weight.grad is not None
        trained.append([writer.linear.weight.grad.clone()])
        train_stage(own, CONFIG, LOOP, tmp_path / str(recompute))
        trained[-1].append(writer.linear.weight.detach().clone())
    assert calls == [2, 4]
    for one, other in zip(*trained, strict=True):
        assert torch.equal(one, other)


def test_bfloat16_computes_in_it_and_trains_float32() -> None:
    plain, half = Writer(), Writer()
    gradients, dtypes = [], []
    for writer, bf16 in ((plain, False), (half, True)):
        own, base = deep_stage(False, writer, bf16)
        base.layers[0].register_forward_hook(lambda *a: dtypes.append(a[-1].dtype))
        with own.loss(0) as loss:
            assert loss.dtype == torch.float32
            torch.autograd.backward(loss)
        assert writer.linear.weight.grad is not None
        gradients.append(writer.linear.weight.grad)
    assert dtypes == [torch.float32, torch.bfloat16]
    assert gradients[1].dtype == torch.float32
    assert not torch.equal(*gradients)
    assert float(torch.cosine_similarity(*(each.flatten() for each in gradients), dim=0)) > 0.99


def test_parts_of_a_batch_have_its_noise_and_its_rows(base: nn.Module) -> None:
    """Flow matching draws times and noise for the whole batch, however it is cut."""
    gradients = []
    for count in (1, 2, 4):
        writer = Writer()
        own = stage(writer, base, handle := openwu.attach(base, (TARGET,)))
        own.objective = FlowMatching()
        own.predict = lambda _, question: base(question.x_t) * (1 - question.time[:, None])
        for index in range(count):
            with own.loss(2, MicroBatch(index, count)) as loss:
                torch.autograd.backward(loss)
        handle.detach()
        assert writer.linear.weight.grad is not None
        gradients.append(writer.linear.weight.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-5)


def test_rows_of_a_batch_may_be_taken_by_a_function(base: nn.Module) -> None:
    own = stage(Writer(), base, openwu.attach(base, (TARGET,)))
    taken: list[slice] = []

    def rows(batch: Tensor, which: slice) -> Tensor:
        taken.append(which)
        return batch[which]

    own.rows = rows
    with own.loss(0, MicroBatch(1, 2)):
        assert taken == [slice(2, 4)]
    own.target = lambda requests: (
        requests[:, :1].expand(-1, 3) / torch.tensor([1.0, 1.0, 0.0, 1.0])[: len(requests), None]
    )
    assert own.not_finite(0, MicroBatch(0, 2)) == []
    assert own.not_finite(0, MicroBatch(1, 2)) == ["number 2 of the batch"]


def test_tasks_and_a_sheet_are_logged(base: nn.Module, tmp_path: Path) -> None:
    own = stage(Writer(), base, handle := openwu.attach(base, (TARGET,)))
    own.tasks = lambda requests: ["up" if first > 0 else "down" for first in requests[:, 0].tolist()]
    own.validation = torch.tensor([[1.0, 0.0], [1.1, 0.0], [-1.0, 0.0], [-1.1, 0.0]])

    def sheet(requests: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        changed = base(torch.ones(4, 3)) - nn.functional.linear(torch.ones(4, 3), base[0].weight, base[0].bias)
        return changed.abs().clamp(0, 1).T[:, :, None]

    own.sheet = sheet
    evaluation = own.evaluate()
    assert 0 < evaluation.scalars["adapter/within"] < evaluation.scalars["adapter/across"]
    ratio = evaluation.scalars["adapter/within"] / evaluation.scalars["adapter/across"]
    assert evaluation.scalars["adapter/within_over_across"] == pytest.approx(ratio)
    assert evaluation.picture is not None
    assert evaluation.picture.shape == (3, 4, 1)
    assert evaluation.picture.max() > 0  # The adapters were applied.
    train_stage(own, CONFIG, LOOP, tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Images("validation")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("adapter/within_over_across")] == [2, 4, 6]
    handle.detach()


def test_the_example_moves_circles() -> None:
    example = runpy.run_path("examples/train_your_own.py")
    ladder, alone, adapted = example["train"](base_steps=300, steps=250)
    assert adapted < 0.4 * alone
    assert ladder.verdict.startswith("conditional: ")
