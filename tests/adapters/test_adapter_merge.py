"""Merged weights compute what the applied adapter computes, and come back bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapter_cases import (
    SMALL_TARGETS,
    FusedExpert,
    Mixture,
    PlainExpert,
    mixture_targets,
    random_adapter,
    relative_error,
    small_model,
)
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.adapters.merge import merge_, merged, merged_copy, merging_pays, unmerge_
from openwu.errors import TargetError
from openwu.types import Target

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merged_equals_applied(dtype: torch.dtype) -> None:
    model, x = small_model(dtype), X.to(dtype)
    adapter = random_adapter(SMALL_TARGETS, 1, dtype=dtype, trained=True)
    with attach(model, SMALL_TARGETS) as handle, handle.applied(adapter):
        applied = model(x)
    before = bits(model)
    with merged(model, adapter):
        assert relative_error(model(x), applied) < (1e-12 if dtype == torch.float64 else 1e-6)
        assert not same_bits(model, before)
    assert same_bits(model, before)


@pytest.mark.parametrize("expert", [FusedExpert, PlainExpert])
@pytest.mark.parametrize("adapted", ["w1", "w2", "w123"])
def test_merged_experts_equal_applied_experts(expert: type[nn.Module], adapted: str) -> None:
    torch.manual_seed(0)
    model, x = Mixture(expert=expert).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    targets = [target for target in mixture_targets() if target.name[-1] in adapted]
    adapter = random_adapter(targets, 1)
    with attach(model, targets) as handle, handle.applied(adapter):
        applied = model(x)
    before = bits(model)
    with merged(model, adapter):
        assert relative_error(model(x), applied) < 1e-12
    assert same_bits(model, before)


def test_low_precision_weights_round_once_and_come_back() -> None:
    model = nn.Sequential(nn.Linear(5, 4)).bfloat16()
    adapter = random_adapter([Target("0", 5, 4)], 1, dtype=torch.float32)
    before = bits(model)
    a, b = adapter.pairs["0"]
    exact = before["0.weight"].float() + 0.5 * b[0] @ a[0]
    with merged(model, adapter):
        assert torch.equal(model[0].weight, exact.bfloat16())
    assert same_bits(model, before)


def test_an_exception_inside_restores_the_weights() -> None:
    model = small_model()
    before = bits(model)
    with pytest.raises(ZeroDivisionError), merged(model, random_adapter(SMALL_TARGETS, 1)):
        raise ZeroDivisionError
    assert same_bits(model, before)


def test_a_permanent_merge_can_be_undone() -> None:
    model = small_model()
    before = bits(model)
    originals = merge_(model, random_adapter(SMALL_TARGETS, 1))
    assert set(originals) == {"first.weight", "middle.0.weight", "last.weight"}
    assert not same_bits(model, before)
    unmerge_(model, originals)
    assert same_bits(model, before)


def test_a_merge_that_fails_halfway_changes_nothing() -> None:
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 1)
    adapter.pairs["last"][1].resize_(0)
    before = bits(model)
    with pytest.raises(IndexError):
        merge_(model, adapter)
    assert same_bits(model, before)


class Quantised(nn.Linear):
    """A linear module with an integer weight."""

    def __init__(self) -> None:
        super().__init__(3, 3, bias=False)
        self.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).T


def test_what_cannot_be_merged_is_refused_and_can_still_be_applied() -> None:
    model = nn.ModuleDict({"int8": Quantised(), "fp8": nn.Linear(3, 3), "meta": nn.Linear(3, 3, device="meta")})
    model["fp8"].weight = nn.Parameter(model["fp8"].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    model["tied"], model["tied_too"] = nn.Linear(3, 3), nn.Linear(3, 3)
    model["tied_too"].weight = model["tied"].weight
    adapter = random_adapter([Target(name, 3, 3) for name in ("int8", "fp8", "meta", "tied")], 1, dtype=torch.float32)
    with pytest.raises(TargetError) as error:
        merge_(model, adapter)
    for line in (
        "int8: a weight of torch.int8 (Tensor) is quantised",
        "fp8: a weight of torch.float8_e4m3fn (Tensor) is quantised",
        "meta: its weight is not loaded",
        "tied: another module has the same weight",
    ):
        assert line in str(error.value)
    targets = [Target("int8", 3, 3)]
    with (
        attach(model, targets) as handle,
        handle.applied(random_adapter(targets, 2, dtype=torch.float32)),
    ):
        assert not torch.isclose(model["int8"](torch.ones(2, 3)), torch.tensor(3.0)).all()


def test_only_one_sample_can_be_merged() -> None:
    with pytest.raises(TargetError, match=r"got 2; pass adapter\.select"):
        merge_(small_model(), random_adapter(SMALL_TARGETS, 2))


def test_an_adapter_on_another_device_is_refused() -> None:
    model = small_model()
    before = bits(model)
    with pytest.raises(TargetError, match="the adapter is on meta"):
        merge_(model, random_adapter(SMALL_TARGETS, 1).to("meta"))
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_merged_copy_computes_what_merging_in_place_does(dtype: torch.dtype) -> None:
    model, x = small_model(dtype).to(memory_format=torch.channels_last), X.to(dtype)
    adapter = random_adapter(SMALL_TARGETS, 1, dtype=dtype)
    before, base = bits(model), model(x)
    with merged(model, adapter):
        expected = model(x)
    copy = merged_copy(model, adapter)
    assert torch.equal(copy(x), expected)
    assert not torch.equal(expected, base)
    assert same_bits(model, before)
    assert torch.equal(model(x), base)
    assert copy.first.weight.stride() == model.first.weight.stride()
    assert copy.first.bias is model.first.bias


def test_a_merged_copy_ignores_adapters_that_are_applied_to_the_model() -> None:
    """In another thread, say; other hooks stay, and modules used twice are still one."""
    model = small_model()
    model.again = model.middle[1]
    adapter, other = random_adapter(SMALL_TARGETS, 1), random_adapter(SMALL_TARGETS, 1, seed=1)
    calls: list[int] = []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    with attach(model, SMALL_TARGETS) as handle:
        with handle.applied(adapter):
            expected = model(X)
        copy = merged_copy(model, adapter)
        with handle.applied(other):
            torch.testing.assert_close(copy(X), expected)
            model(X)
    assert len(calls) == 3
    assert copy.again is copy.middle[1]
    assert copy.middle is not model.middle


def test_merged_copies_run_in_threads_of_their_own() -> None:
    model = small_model()
    adapters = [random_adapter(SMALL_TARGETS, 1, seed=seed) for seed in range(4)]
    expected = []
    for adapter in adapters:
        with merged(model, adapter):
            expected.append(model(X))
    with ThreadPoolExecutor(4) as pool:
        came = list(pool.map(lambda adapter: [merged_copy(model, adapter)(X) for _ in range(20)], adapters))
    for each, wanted in zip(came, expected, strict=True):
        assert all(torch.equal(y, wanted) for y in each)


@pytest.mark.parametrize(("rows", "forwards", "pays"), [(3, 1, False), (4, 1, True), (1, 3, False), (2, 2, True)])
def test_merging_pays_on_a_cpu_by_arithmetic(rows: int, forwards: int, pays: bool) -> None:
    """6 * 9 weights against 6 + 9 per row: 3.6 rows."""
    model, targets = nn.Sequential(nn.Linear(6, 9)), [Target("0", 6, 9)]
    assert merging_pays(model, targets, 2, rows, forwards) == pays


def test_merging_pays_counts_every_target_with_its_own_rows() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))
    targets = [Target("0", 6, 9), Target("1", 9, 6)]
    assert not merging_pays(model, targets, 2, {"0": 1, "1": 6})
    assert merging_pays(model, targets, 2, {"0": 1, "1": 7})


def test_merging_experts_takes_all_of_them() -> None:
    """4 experts of 6 * 5 weights three times over, against 11 per routed row: 32.7 rows."""
    assert not merging_pays(Mixture(), mixture_targets(), 2, 10)
    assert merging_pays(Mixture(), mixture_targets(), 2, 11)


def test_merging_never_pays_where_it_cannot_be_done() -> None:
    model = nn.ModuleDict({"int8": Quantised(), "fine": nn.Linear(3, 3), "meta": nn.Linear(3, 3, device="meta")})
    assert merging_pays(model, [Target("fine", 3, 3)], 2, 10**9)
    for name in ("int8", "meta"):
        assert not merging_pays(model, [Target("fine", 3, 3), Target(name, 3, 3)], 2, 10**9)
    with pytest.raises(TargetError, match="quantised"):
        merged_copy(model, random_adapter([Target("int8", 3, 3)], 1))


class Computed(nn.Linear):
    """A linear module whose weight is no parameter."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        weight = self.weight.detach()
        del self.weight
        self.weight = weight


def test_a_weight_that_is_no_parameter_is_refused() -> None:
    adapter = random_adapter([Target("0", 3, 3)], 1)
    with pytest.raises(TargetError, match="no parameter `weight`"):
        merged_copy(nn.Sequential(Computed()), adapter)
