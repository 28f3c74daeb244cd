"""What a training loses of what was there: retention objectives, relative norms of updates, controls, rehearsal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwu
from openwu.adapters.updates import relative_norms
from openwu.errors import OpenwuError
from openwu.training.config import StageConfig
from openwu.training.loop import train_stage
from openwu.training.micro_batch import MicroBatch
from openwu.training.objectives import Regression
from openwu.training.retention import Retention, RetentionObjective, RetentionWarning, WatchedStage, token_divergence
from openwu.training.stage import GeneratorStage, average

TARGET = openwu.Target("0", 4, 4)
CONFIG = StageConfig(steps=150, shapes=((4, 0),), learning_rate=5e-2, warmup=5, schedule="constant")
ASKED = torch.tensor([1.0, 0.0, 0.0, 0.0])
"""What the base is asked; unrelated inputs are all others."""


class Writer(nn.Module):
    """A rank-1 adapter from a request `[b, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(2, 8)

    def forward(self, requests: Tensor) -> openwu.Adapter:
        a, b = self.linear(requests).chunk(2, dim=1)
        return openwu.Adapter.from_pairs((TARGET,), {"0": (a[:, None, :], b[:, :, None])}, 0.3)


def drawn(step: int, width: int = 2, count: int = 4) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(step))


def unrelated(step: int) -> Tensor:
    """Inputs that have nothing of what the base is asked."""
    return drawn(step + 1000, 4) * (1 - ASKED)


@pytest.fixture
def base() -> Iterator[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)


def stage(base: nn.Module, writer: Writer, weight: float | None = None) -> GeneratorStage[Tensor]:
    """The base shall answer the request's first number; with a weight, and all else as it did."""
    retention = None
    if weight is not None:
        retention = RetentionObjective(unrelated, base, weight=weight)
    return GeneratorStage(
        "writer",
        writer,
        openwu.attach(base, (TARGET,)),
        drawn,
        writer,
        lambda requests: requests[:, :1].expand(-1, 4),
        lambda requests, _: base(ASKED.expand(len(requests), 4)),
        Regression(),
        validation=drawn(99),
        retention=retention,
    )


@pytest.mark.filterwarnings("ignore:generated updates")
def test_retention_keeps_the_bases_other_answers_and_the_task_is_learned(base: nn.Module) -> None:
    lost, learned = [], []
    probe = RetentionObjective(lambda _: unrelated(5), base)
    for weight in (None, 1.0):
        own = stage(base, Writer(), weight)
        before = own.evaluate().scalars["validation"]
        train_stage(own, CONFIG)
        own.retention = probe
        scalars = own.evaluate().scalars
        own.handle.detach()
        lost.append(scalars["retention"])
        learned.append(scalars["validation"] / before)
    assert lost[1] < 0.2 * lost[0]
    assert max(learned) < 0.3


def test_the_loss_is_the_tasks_and_the_weighted_distance_from_the_base_alone(base: nn.Module) -> None:
    writer = Writer()
    own = stage(base, writer, weight=3.0)
    requests, inputs = drawn(7), unrelated(7)
    a, b = writer(requests).pairs["0"]
    b = 0.3 * b
    change = (b @ a @ inputs[:, :, None])[:, :, 0]  # base + change against base
    asked = base(ASKED.expand(4, 4)) + (b @ a @ ASKED[:, None])[:, :, 0]
    expected = (asked - requests[:, :1]).square().mean() + 3 * change.square().mean()
    with own.loss(7) as loss:
        torch.testing.assert_close(loss, expected)
    parts = []
    for index in range(2):
        with own.loss(7, MicroBatch(index, 2)) as loss:
            parts.append(loss)
    torch.testing.assert_close(parts[0] + parts[1], expected)
    own.retention = replace(own.retention, inputs=lambda _: drawn(0, 4, count=3))  # type: ignore[type-var]
    with pytest.raises(OpenwuError, match=r"as many unrelated inputs as the batch has rows \(4\), got 3"), own.loss(0):
        pass


def test_divergence_is_that_of_torchs_distributions_over_the_tokens_that_count() -> None:
    prediction, own = drawn(0, 6 * 5).view(4, 6, 5)[:2], drawn(1, 6 * 5).view(4, 6, 5)[:2]
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0] * 6])
    found = token_divergence(prediction, own, mask)
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(
        categorical(logits=own[0, :3]), categorical(logits=prediction[0, :3])
    ).mean()
    torch.testing.assert_close(found, torch.stack([expected, torch.tensor(0.0)]))
    torch.testing.assert_close(token_divergence(own, own, mask), torch.zeros(2))


def test_relative_norms_are_of_the_updates_over_the_weights_and_large_ones_warn(base: nn.Module) -> None:
    own = stage(base, Writer())
    adapter = own.adapt(drawn(3)).scaled(2.0)
    a, b = adapter.pairs["0"]
    weight = base[0].weight
    assert isinstance(weight, Tensor)
    sizes = torch.stack([(0.3 * each_b @ each_a).norm() for each_a, each_b in zip(a, b, strict=True)])
    expected = sizes / weight.norm()
    torch.testing.assert_close(relative_norms(adapter, own.handle.sites), expected[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < own.evaluate().scalars["adapter/relative_norm"] < 1
    own.adapt = lambda requests: own.trained(requests).scaled(50.0)
    with pytest.warns(RetentionWarning, match=r"updates are \d+\.\d times as large as the weights"):
        assert own.evaluate().scalars["adapter/relative_norm_max"] > 1


@pytest.mark.filterwarnings("ignore:generated updates")
def test_controls_know_less_and_less_of_the_request(base: nn.Module) -> None:
    own = stage(base, Writer())
    train_stage(own, CONFIG)
    requests = drawn(99)
    scalars = own.evaluate().scalars
    alone = F.mse_loss(base(ASKED.expand(4, 4)), requests[:, :1].expand(-1, 4))
    assert scalars["control/none"] == pytest.approx(float(alone), rel=1e-5)
    assert scalars["validation"] < 0.2 * min(scalars[f"control/{name}"] for name in ("none", "other", "average"))
    with torch.no_grad():
        adapter = own.adapt(requests)
        a, b = adapter.pairs["0"]
        one_a, one_b = average(adapter).pairs["0"]
        torch.testing.assert_close(one_b[0] @ one_a[0], (b @ a).mean(0))
        # Of two tasks the partner is the next sample of the other one.
        own.tasks = lambda _: ["up", "up", "down", "down"]
        with own.handle.applied(adapter.select([2, 2, 0, 0])):
            other = F.mse_loss(base(ASKED.expand(4, 4)), requests[:, :1].expand(-1, 4))
    assert own.evaluate().scalars["control/other"] == pytest.approx(float(other), rel=1e-5)


def test_a_context_may_have_several_questions_however_the_batch_is_cut(base: nn.Module) -> None:
    """Three contexts with 1, 3 and 2 questions: each question meets its context's adapter, in any micro-batches."""
    counts = [1, 3, 2]
    numbers = [0, 1, 1, 1, 2, 2]
    questions, answers = drawn(1, 4, count=6), drawn(2, 4, count=6)
    contexts = drawn(3, 2, count=3)

    def rows(batch: tuple[Tensor, list[int]], own: slice) -> tuple[Tensor, list[int]]:
        return batch[0][own], batch[1][own]

    def of(batch: tuple[Tensor, list[int]], values: Tensor) -> Tensor:
        first = int((contexts == batch[0][0]).all(1).nonzero()[0])
        start = sum(counts[:first])
        return values[start : start + sum(batch[1])]

    gradients = []
    for count in (1, 2, 3):
        writer = Writer()
        handle = openwu.attach(base, (TARGET,))
        own = GeneratorStage(
            "asked", writer, handle,
            batches=lambda _: (contexts, counts),
            adapt=lambda batch, writer=writer: writer(batch[0]),  # type: ignore[misc]
            target=lambda batch: of(batch, answers),
            predict=lambda batch, _: base(of(batch, questions)),
            objective=Regression(),
            rows=rows,
            contexts=lambda batch: [i for i, asked in enumerate(batch[1]) for _ in range(asked)],
        )  # fmt: skip
        total = 0.0
        for index in range(count):
            with own.loss(0, MicroBatch(index, count)) as loss:
                torch.autograd.backward(loss)
            total += float(loss.detach())
        a, b = (each[numbers] for each in writer(contexts).pairs["0"])
        expected = F.mse_loss(base(questions) + 0.3 * (b @ a @ questions[:, :, None])[:, :, 0], answers)
        assert total == pytest.approx(float(expected.detach()), rel=1e-5)
        assert own.not_finite(0) == []
        assert writer.linear.weight.grad is not None
        gradients.append(writer.linear.weight.grad)
        handle.detach()
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-5)


def test_a_training_that_goes_on_is_watched_and_warns(base: nn.Module) -> None:
    scores = {"blur": 30.0, "fog": 20.0}
    known = Retention(lambda: scores, 0.5, "dB", "stop earlier")
    watched = WatchedStage(stage(base, Writer()), known)
    scores = {"blur": 29.8, "fog": 19.4}
    found = watched.evaluate().scalars
    assert {name: found[f"known/{name}"] for name in ("mean", "lost", "worst")} == pytest.approx(
        {"mean": 24.6, "lost": 0.4, "worst": 0.6}
    )
    assert "validation" in found
    scores = {"blur": 27.0, "fog": 20.0}
    with pytest.warns(RetentionWarning, match=r"1\.50 dB are lost on average over 2 known .*'blur': 3\.00.*stop"):
        watched.evaluate()
    assert known.record() == {
        "unit": "dB", "before": 25.0, "after": 23.5, "each": {"blur": [30.0, 27.0], "fog": [20.0, 20.0]},
    }  # fmt: skip
    with pytest.raises(OpenwuError, match="expected scores of at least one known task"):
        Retention(dict, 0.5, "dB", "")
