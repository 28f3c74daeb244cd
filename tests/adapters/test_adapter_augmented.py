"""Room beside stacked weights: the augmented product against updates of their own; weights stay as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_cases import Mixture, StackedMixture, mixture_targets, random_adapter, stacked_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwu.adapters.augmented import COLUMNS, AugmentedSite
from openwu.adapters.inject import AdapterHandle, attach
from openwu.errors import TargetError
from openwu.kernels.grouped import Routed

WIDTHS = (8, 4)


def frozen(dtype: torch.dtype = torch.float32, widths: tuple[int, int] = WIDTHS) -> StackedMixture:
    torch.manual_seed(0)
    return StackedMixture(*widths).to(dtype).requires_grad_(False)


def augmented(handle: AdapterHandle) -> bool:
    """Whether the adapter that is applied is in the room."""
    found = {site._tail_a is not None for site in handle.sites if isinstance(site, AugmentedSite)}
    assert len(found) == 1
    return found.pop()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.one_of(st.none(), st.lists(st.integers(-1, 2), min_size=1, max_size=5)),
    length=st.integers(1, 4),
    widths=st.sampled_from([(6, 5), (8, 4)]),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_what_it_is_without_room(
    rows: list[int] | None,
    length: int,
    widths: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
    packed: bool,
    seed: int,
) -> None:
    """Outputs and gradients of the input; rows with no adapter, with the same one, with some; packed sequences."""
    model, targets = frozen(dtype, widths), stacked_targets(*widths)
    adapter = random_adapter(targets, 3, rank=rank, seed=seed, dtype=dtype)
    count = 3 if rows is None else len(rows)
    lengths = [length + number for number in range(count)] if packed else None
    x = torch.randn(1, sum(lengths), widths[0]) if lengths else torch.randn(count, length, widths[0])
    x = x.to(dtype).requires_grad_()
    dy = torch.randn(x.shape).to(dtype)
    came: list[tuple[Tensor, Tensor, Tensor]] = []
    for spare_columns in (0, 3 * rank):
        with (
            attach(model, targets, spare_columns=spare_columns) as handle,
            handle.applied(adapter, rows, segments=lengths),
        ):
            if spare_columns:
                assert augmented(handle) == (rows is None or max(rows) >= 0)
            y = model(x)
            (dx,) = torch.autograd.grad(y, x, dy)
            with torch.no_grad():
                came.append((y.detach(), dx, model(x)))
    scale = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for one, other in zip(*came, strict=True):
        torch.testing.assert_close(one, other, rtol=scale, atol=scale * float(other.abs().max()))


def test_it_changes_the_output_and_no_weight() -> None:
    model, targets = frozen(), stacked_targets(*WIDTHS)
    before, base = copy.deepcopy(model.state_dict()), model(x := torch.randn(2, 9, 8))
    places = [parameter.stride() for parameter in model.parameters()]
    adapter = random_adapter(targets, 2, dtype=torch.float32)
    with attach(model, targets, spare_columns=20) as handle:
        assert model.experts.down_proj.stride() != places[-1]
        torch.testing.assert_close(model(x), base)
        with handle.applied(adapter), torch.no_grad():
            assert augmented(handle)
            assert (model(x) - base).norm() > 0.1 * base.norm()
        torch.testing.assert_close(model(x), base)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
    assert [parameter.stride() for parameter in model.parameters()] == places
    assert torch.equal(model(x), base)


def test_one_adapter_after_another_leaves_nothing_behind() -> None:
    """Larger, then smaller ranks and batches, the room full of NaN before the first."""
    model, targets = frozen(), stacked_targets(*WIDTHS)
    x = torch.randn(3, 5, 8)
    cases = [(3, 5, None), (1, 2, None), (3, 1, [2, -1, 2]), (2, 3, [0, 1, 1]), (1, 5, [-1, -1, -1])]
    with attach(model, targets, spare_columns=48) as handle, torch.no_grad():
        for site in handle.sites:
            assert isinstance(site, AugmentedSite)
            assert site._wide is not None
            site._wide[..., site._parameter.shape[2] :] = float("nan")
        came = []
        for batch, rank, rows in cases:
            adapter = random_adapter(targets, batch, rank=rank, dtype=torch.float32)
            with handle.applied(adapter, rows):
                assert augmented(handle) == (rows is None or max(rows) >= 0)
                poison = [torch.full((size,), float("nan")) for size in (30 * 24, 30 * 56, 30 * 52, 15 * 8)]
                del poison
                came.append(model(x))
    with attach(model, targets) as handle, torch.no_grad():
        for y, (batch, rank, rows) in zip(came, cases, strict=True):
            with handle.applied(random_adapter(targets, batch, rank=rank, dtype=torch.float32), rows):
                torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


def test_memory_behind_an_input_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 numbers of bfloat16 are a width at which torch's products on a CPU read on, and multiply by zero."""
    model, targets = frozen(torch.bfloat16, (80, 80)), stacked_targets(80, 80)
    adapter = random_adapter(targets, 1, dtype=torch.bfloat16)
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    with attach(model, targets, spare_columns=16) as handle, torch.no_grad(), handle.applied(adapter):
        assert augmented(handle)
        assert model(torch.randn(4, 64, 80, dtype=torch.bfloat16)).isfinite().all()


def test_trained_adapters_and_too_many_take_the_other_way() -> None:
    model, targets = frozen(), stacked_targets(*WIDTHS)
    x = torch.randn(2, 5, 8)
    trained = random_adapter(targets, 2, rank=2, dtype=torch.float32, trained=True)
    wide = random_adapter(targets, 2, rank=COLUMNS, dtype=torch.float32)
    dy = torch.randn_like(x)
    found = []
    for spare_columns in (0, COLUMNS):
        with attach(model, targets, spare_columns=spare_columns) as handle:
            with handle.applied(trained):
                assert not spare_columns or not augmented(handle)
                gradients = torch.autograd.grad(model(x), list(trained.state_dict().values()), dy)
            with handle.applied(wide):
                assert not spare_columns or not augmented(handle)
                found.append((*gradients, model(x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(float(gradient.abs().max()) > 0 for gradient in found[0][:-1])


def test_a_trained_base_keeps_its_gradients() -> None:
    """A base whose own weights are trained: the augmented product would hide them from autograd."""
    model, targets = frozen().requires_grad_(), stacked_targets(*WIDTHS)
    adapter = random_adapter(targets, 1, dtype=torch.float32)
    with attach(model, targets, spare_columns=16) as handle, handle.applied(adapter):
        assert not augmented(handle)
        model(torch.randn(2, 5, 8)).sum().backward()
    gradient = model.experts.down_proj.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("trained", ["base", "adapter"])
def test_gradients_that_begin_inside_of_a_scope_are_not_lost_without_a_word(trained: str) -> None:
    model, targets = frozen().requires_grad_(trained == "base"), stacked_targets(*WIDTHS)
    adapter = random_adapter(targets, 1, dtype=torch.float32, trained=trained == "adapter")
    x = torch.randn(2, 5, 8)
    with attach(model, targets, spare_columns=16) as handle, torch.no_grad(), handle.applied(adapter):
        assert augmented(handle)
        model(x)
        with torch.enable_grad(), pytest.raises(TargetError, match="was entered without gradients"):
            model(x)


def test_weights_that_were_moved_lose_their_room_and_nothing_else() -> None:
    model, targets = frozen(), stacked_targets(*WIDTHS)
    x, adapter = torch.randn(2, 5, 8), random_adapter(targets, 1, dtype=torch.float32)
    with attach(model, targets) as handle, handle.applied(adapter):
        expected = model(x)
    with attach(model, targets, spare_columns=16) as handle:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        with handle.applied(adapter):
            assert not augmented(handle)
            torch.testing.assert_close(model(x), expected)


def test_an_input_that_somebody_else_made_is_copied_not_written_behind() -> None:
    """The base's own tensors may be parts of larger ones: nothing may be written beside them."""
    model, targets = frozen(), stacked_targets(*WIDTHS)
    product, weight = model.experts.products["gate_up_proj"], model.experts.gate_up_proj
    adapter = random_adapter(targets, 1, dtype=torch.float32)
    routed = Routed.of(torch.randint(4, (6, 2)), 4)
    with attach(model, targets, spare_columns=16) as handle, torch.no_grad(), handle.applied(adapter):
        own = product.gather(torch.randn(6, 8), routed)
        larger = torch.randn(len(own), 8 + 16)
        kept, part = larger.clone(), larger[:, :8]
        y = product(part, weight, routed)
        assert torch.equal(larger, kept)
        own = product.gather(torch.randn(6, 8), routed)
        own.copy_(part)
        torch.testing.assert_close(product(own, weight, routed), y)
        model(torch.randn(1, 3, 8))  # the scope wants every target reached


def test_no_memory_for_room_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, targets = frozen(), stacked_targets(*WIDTHS)
    places = [parameter.stride() for parameter in model.parameters()]
    zeros, made = Tensor.new_zeros, []

    def few(*args: Any, **kwargs: Any) -> Tensor:
        made.append(args)
        if len(made) == len(targets):
            raise torch.OutOfMemoryError("out of memory")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(Tensor, "new_zeros", few)
    with pytest.raises(torch.OutOfMemoryError):
        attach(model, targets, spare_columns=16)
    assert [parameter.stride() for parameter in model.parameters()] == places
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    monkeypatch.undo()
    with attach(model, targets, spare_columns=16):
        pass


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_attached_in_one_mode_and_applied_in_another(mode: type[torch.no_grad]) -> None:
    model, targets = frozen(), stacked_targets(*WIDTHS)
    x, adapter = torch.randn(2, 5, 8), random_adapter(targets, 2, dtype=torch.float32)
    with mode():
        handle = attach(model, targets, spare_columns=32)
    with handle.applied(adapter):
        first = model(x)
    with torch.inference_mode(), handle.applied(adapter):
        second = model(x)
    handle.detach()
    torch.testing.assert_close(first, second.clone())


@pytest.mark.parametrize(
    ("spare_columns", "message"),
    [(-1, "spare_columns: expected a number from 0 .* got -1"), (True, "got True"), (1.5, r"got 1\.5")],
)
def test_rooms_that_are_none(spare_columns: int, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        attach(frozen(), stacked_targets(*WIDTHS), spare_columns=spare_columns)


def test_room_needs_stacked_experts_of_plain_numbers() -> None:
    with pytest.raises(
        TargetError, match="spare_columns: expected experts with stacked weights among the targets, found none"
    ):
        attach(Mixture(), mixture_targets(), spare_columns=16)
    with torch.device("meta"):
        model = StackedMixture(*WIDTHS)
    with pytest.raises(
        TargetError, match=r"gate_up_proj: room for adapters needs plain .* on meta; attach without room"
    ):
        attach(model, stacked_targets(*WIDTHS), spare_columns=16)


def test_compiled_with_changing_adapters() -> None:
    """One graph for all of them."""
    model, targets = frozen(), stacked_targets(*WIDTHS)
    x = torch.randn(2, 5, 8)
    adapters = [random_adapter(targets, 2, seed=seed, dtype=torch.float32) for seed in range(3)]
    with attach(model, targets) as handle, torch.no_grad():
        expected = []
        for adapter in adapters:
            with handle.applied(adapter):
                expected.append(model(x))
    torch._dynamo.reset()
    with attach(model, targets, spare_columns=16) as handle, torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        for number, (adapter, y) in enumerate(zip(adapters, expected, strict=True)):
            with handle.applied(adapter), torch._dynamo.config.patch(error_on_recompile=number > 0):
                assert augmented(handle)
                torch.testing.assert_close(compiled(x), y, rtol=1e-5, atol=1e-5)
