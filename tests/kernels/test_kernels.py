"""How a kernel is chosen, without any: equal and faster or not used; failures are told once; switches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from openwu.editor.cache import request_key
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.kernels import autotune as kernels
from openwu.kernels.autotune import Choices, Trial, available, plain_torch, relative_error, usable

CPU = torch.device("cpu")
X = torch.arange(1.0, 5.0)


class Ways:
    """A kernel and plain torch whose results, times and failures are given; counts its trials."""

    def __init__(self, came: Tensor = X, seconds: tuple[float, float] = (1.0, 2.0)) -> None:
        self.came = came
        self.seconds = seconds
        self.trials = 0

    def kernel(self) -> Sequence[Tensor]:
        return [self.came]

    def reference(self) -> Sequence[Tensor]:
        return [X]

    def trial(self) -> Trial:
        self.trials += 1
        return Trial(self.kernel, self.reference, 1e-3)

    def timer(self, run: Callable[[], object], _: torch.device) -> float:
        return self.seconds[0 if run == self.kernel else 1]

    def run(self, choices: Choices, key: object = 1, kernel: Callable[[], str] = lambda: "kernel") -> str:
        return choices.run("turn", (key,), CPU, self.trial, kernel, lambda: "plain")


def test_an_equal_and_faster_kernel_is_tried_once_for_a_key_and_then_used(caplog: pytest.LogCaptureFixture) -> None:
    ways = Ways(X * 1.0005)
    choices = Choices(ways.timer)
    with caplog.at_level(logging.DEBUG, "openwu.kernels.autotune"):
        assert [ways.run(choices) for _ in range(3)] == ["kernel"] * 3
    assert ways.trials == 1
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert "turn" in caplog.text
    assert "kernel 1 s, plain torch 2 s" in caplog.text
    assert ways.run(choices, key=2) == "kernel"
    assert ways.trials == 2


def test_a_slower_kernel_is_left_without_a_word() -> None:
    ways = Ways(seconds=(2.0, 2.0))
    choices = Choices(ways.timer)
    assert [ways.run(choices) for _ in range(2)] == ["plain"] * 2
    assert ways.trials == 1
    assert not choices.failed


@pytest.mark.parametrize("wrong", [X * 1.01, X.clone().fill_(float("nan")), X[:3], X.double(), X * float("inf")])
def test_a_kernel_that_differs_is_named_once_and_not_used_again(wrong: Tensor) -> None:
    ways = Ways(wrong)
    choices = Choices(ways.timer)
    with pytest.warns(RuntimeWarning, match=r"kernel turn: ArithmeticError: differs .*OPENWU_KERNELS=0") as told:
        assert ways.run(choices) == "plain"
    assert ways.run(choices, key=2) == "plain"  # a second warning would be an error here
    assert len(told) == 1
    assert ways.trials == 1


def test_a_kernel_that_fails_later_is_replaced_for_good() -> None:
    ways = Ways()
    choices = Choices(ways.timer)

    def fails() -> str:
        raise RuntimeError("no image for this device")

    assert ways.run(choices) == "kernel"
    with pytest.warns(RuntimeWarning, match="no image for this device"):
        assert ways.run(choices, kernel=fails) == "plain"
    assert ways.run(choices) == "plain"


def test_want_of_memory_is_no_fault_of_the_kernel() -> None:
    ways = Ways()
    choices = Choices(ways.timer)

    def full(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trial = ways.trial
    ways.trial = full  # type: ignore[assignment, method-assign]
    assert ways.run(choices) == "plain"
    ways.trial = trial  # type: ignore[method-assign]
    assert ways.run(choices) == "plain"  # not tried again for this shape
    assert ways.run(choices, key=2) == "kernel"
    with pytest.raises(torch.OutOfMemoryError):
        ways.run(choices, key=2, kernel=full)  # type: ignore[arg-type]
    assert not choices.failed


def test_shapes_are_forgotten_in_the_order_of_their_use() -> None:
    ways = Ways()
    choices = Choices(ways.timer, cached_shapes=2)
    for key in (1, 2, 1, 3, 1, 2):
        ways.run(choices, key)
    assert ways.trials == 4


def test_gradients_are_part_of_a_trial_whatever_the_call_allows() -> None:
    choices = Choices(lambda *_: 1.0)

    def trial() -> Trial:
        x = torch.ones(2, requires_grad=True)
        return Trial(lambda: torch.autograd.grad((3 * x).sum(), x), lambda: [torch.full((2,), 3.0)], 1e-6)

    with torch.inference_mode():
        assert choices.run("turn", (), CPU, trial, lambda: "kernel", lambda: "plain") == "plain"  # not faster
    assert not choices.failed


def test_one_wrong_number_among_many_shows() -> None:
    expected = torch.ones(1000)
    came = expected.clone()
    came[-1] = 1.1
    assert relative_error([came], [expected]) == pytest.approx(0.05, rel=1e-3)
    assert relative_error([expected], [expected]) == 0
    assert relative_error([torch.zeros(3)], [torch.zeros(3)]) == 0


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU as a device that has kernels, with Triton 9."""
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "_triton", lambda: "9")
    monkeypatch.delenv(kernels.VARIABLE, raising=False)


def test_nothing_is_used_on_a_cpu() -> None:
    assert available(CPU) is None
    assert not usable(X)


@pytest.mark.usefixtures("pretended")
def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available(CPU) == "triton 9"
    assert usable(X)
    with plain_torch():
        assert available(CPU) is None
        assert not usable(X)
    monkeypatch.setenv(kernels.VARIABLE, "0")
    assert not usable(X)
    monkeypatch.setenv(kernels.VARIABLE, "1")
    assert usable(X)
    monkeypatch.setattr(kernels, "_triton", lambda: None)
    assert not usable(X)


@pytest.mark.usefixtures("pretended")
def test_what_kernels_do_not_take() -> None:
    assert usable(torch.nn.Parameter(X), X)
    assert not usable(X.double())
    assert not usable(X, X.to("meta"))
    with torch._subclasses.FakeTensorMode():
        assert not usable(torch.empty(3))


def test_keys_of_kept_adapters_tell_kernels_apart(pretended: None) -> None:
    from openwu.config import GeneratorConfig, LayerGroup, PlainTarget
    from openwu.generator.model import ParameterGenerator

    groups = (LayerGroup("layers.", 1, (PlainTarget("linear", 8, 8),), name="layers"),)
    generator = ParameterGenerator(GeneratorConfig(2, 2, 8, 5, 16, 8, 2, 1, groups))
    on, off = FastGenerator(generator), FastGenerator(generator, FastOptions(kernels=False))
    with plain_torch():
        switched = on.described
    assert len({on.described, off.described, switched}) == 3
    assert "triton 9" in on.described
    assert request_key("g", [], "warmer", how=on.described) != request_key("g", [], "warmer", how=switched)
