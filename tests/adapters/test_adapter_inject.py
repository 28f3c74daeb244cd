"""What `attach` and `applied` guarantee: everything is resolved or refused, and the model is always left as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from adapter_cases import SMALL_TARGETS, Small, random_adapter, relative_error, small_model
from torch import Tensor, nn

from openwu.adapters.inject import AdapterHandle, attach
from openwu.errors import OpenwuError, TargetError
from openwu.types import Adapter, Target


def image(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_scope_changes_the_output_and_ends() -> None:
    model, x = small_model(), image(2)
    before, names = model(x), list(model.state_dict())
    with attach(model, SMALL_TARGETS) as handle:
        assert list(model.state_dict()) == names
        assert torch.equal(model(x), before)
        with handle.applied(random_adapter(SMALL_TARGETS, 2)):
            assert not torch.isclose(model(x), before).all()
            assert list(model.state_dict()) == names
        assert torch.equal(model(x), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_scope_ends_with_an_exception_and_does_not_mask_it() -> None:
    model, x = small_model(), image(2)
    before = model(x)
    adapter = random_adapter(SMALL_TARGETS, 2)
    with attach(model, SMALL_TARGETS) as handle:
        with pytest.raises(ZeroDivisionError), handle.applied(adapter):
            raise ZeroDivisionError
        with pytest.raises(TargetError, match=r"3 rows"), handle.applied(random_adapter(SMALL_TARGETS, 3)):
            model(x)
        assert torch.equal(model(x), before)
        with handle.applied(adapter):
            model(x)


def test_scope_lets_go_of_the_adapter() -> None:
    model = small_model()
    with attach(model, SMALL_TARGETS) as handle:
        adapter = random_adapter(SMALL_TARGETS, 1)
        with handle.applied(adapter):
            model(image(1))
        kept = [value for site in handle._sites for value in vars(site).values() if isinstance(value, Tensor)]
        assert not kept


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    model = nn.ModuleDict({"near": nn.Linear(3, 4), "norm": nn.LayerNorm(3), "grouped": nn.Conv2d(4, 4, 3, groups=2)})
    model["conv"] = nn.Conv2d(3, 4, 3)
    targets = [
        Target("neer", 3, 4),
        Target("norm", 3, 3),
        Target("grouped", 18, 4),
        Target("conv", 3, 4),
        Target("near", 4, 4),
        Target("twice", 1, 1),
        Target("twice", 1, 1),
    ]
    with pytest.raises(TargetError) as error:
        attach(model, targets)
    for line in (
        "neer: no such module; near it are near",
        "norm: expected an nn.Linear or nn.Conv2d, got LayerNorm",
        "grouped: expected an ungrouped convolution, got one of 2 groups",
        "conv: expected a convolution 3 -> 4, got 3 channels * 3 * 3 = 27 -> 4",
        "near: expected a linear module 4 -> 4, got 3 -> 4",
        "twice: named 2 times",
    ):
        assert line in str(error.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_no_targets_are_refused() -> None:
    with pytest.raises(TargetError, match="no targets given"):
        attach(small_model(), [])


def test_a_module_under_two_names_is_one_target() -> None:
    linear = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": linear, "b": linear})
    with pytest.raises(TargetError, match=r"a: the same module as another target\n  b: the same module"):
        attach(model, [Target("a", 3, 3), Target("b", 3, 3)])
    attach(model, [Target("b", 3, 3)]).detach()


def test_targets_of_the_adapter_must_be_those_of_the_handle() -> None:
    model = small_model()
    other = (SMALL_TARGETS[0], Target("middle.0", 4, 8), Target("extra", 1, 1))
    with attach(model, SMALL_TARGETS) as handle, pytest.raises(TargetError) as error:
        handle.applied(random_adapter(other, 1)).__enter__()
    assert "missing from the adapter: last (lora 4 -> 5); middle.0 (lora 4 -> 4)" in str(error.value)
    assert "unexpected: extra (lora 1 -> 1); middle.0 (lora 4 -> 8)" in str(error.value)


def test_the_order_of_targets_does_not_matter() -> None:
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 1)
    turned = Adapter.from_pairs(adapter.targets[::-1], adapter.pairs, adapter.scale)
    with attach(model, SMALL_TARGETS) as handle:
        with handle.applied(adapter):
            y = model(image(1))
        with handle.applied(turned):
            assert torch.equal(model(image(1)), y)


class Fused(Small):
    """Computes a target's product without calling its module."""

    def forward(self, image: Tensor) -> Tensor:
        linear = self.middle[0]
        assert isinstance(linear, nn.Linear)
        hidden = nn.functional.linear(self.first(image).movedim(1, -1), linear.weight, linear.bias)
        return self.last(hidden.movedim(-1, 1))


def test_targets_that_are_not_reached_are_named() -> None:
    model = Fused()
    adapter = random_adapter(SMALL_TARGETS, 1, dtype=torch.float32)
    with attach(model, SMALL_TARGETS) as handle:
        with (
            pytest.raises(TargetError, match=r"1 of its 3 targets; .*Not reached: middle\.0$"),
            handle.applied(adapter),
        ):
            model(image(1, torch.float32))
        with (
            pytest.raises(TargetError, match=r"3 of its 3 targets; did it run in the scope\?"),
            handle.applied(adapter),
        ):
            pass


@pytest.mark.parametrize(
    ("batch", "rows", "came", "message"),
    [
        (2, None, 3, r"first: the adapter is for 2 rows, .* \(3, 3, 8, 8\); pass applied\(adapter, rows=...\)"),
        (2, [0, 1, 0], 2, r"first: the adapter is for 3 rows"),
        (1, [0, 0], 3, r"first: the adapter is for 2 rows"),
        (2, [0, 2], 2, r"0 to 1, or -1 for no adapter, got \[2\]"),
        (2, [-2, 0], 2, r"got \[-2\]"),
        (2, [], 2, r"got no rows"),
    ],
)
def test_rows_that_do_not_fit(batch: int, rows: list[int] | None, came: int, message: str) -> None:
    model = small_model()
    with (
        attach(model, SMALL_TARGETS) as handle,
        pytest.raises(TargetError, match=message),
        handle.applied(random_adapter(SMALL_TARGETS, batch), rows),
    ):
        model(image(came))


def test_an_unbatched_image_is_refused() -> None:
    model = small_model()
    with attach(model, SMALL_TARGETS) as handle:
        scope = handle.applied(random_adapter(SMALL_TARGETS, 1))
        with pytest.raises(TargetError, match=r"first: expected an input \[n, c, h, w\]"), scope:
            model(image(1)[0])


def test_attaching_twice_is_refused_until_detached() -> None:
    model = small_model()
    handle = attach(model, SMALL_TARGETS)
    with pytest.raises(TargetError, match=r"3 modules .* first among them"):
        attach(model, SMALL_TARGETS)
    with pytest.raises(TargetError, match="already carry"):
        attach(nn.Sequential(model.middle), [Target("0.0", 4, 4)])
    handle.detach()
    handle.detach()
    with pytest.raises(TargetError, match="detached"), handle.applied(random_adapter(SMALL_TARGETS, 1)):
        pass
    attach(model, SMALL_TARGETS).detach()


def test_parts_of_one_model_can_have_a_handle_each() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    with attach(model[1], [Target("0", 3, 3)]), pytest.raises(TargetError, match="already carry"):
        attach(model, [Target("0", 3, 3), Target("1.0", 3, 3)])
    with attach(model[1], [Target("0", 3, 3)]), attach(model[0:1], [Target("0", 3, 3)]):
        pass


def test_scopes_do_not_nest_and_block_detach() -> None:
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 1)
    handle = attach(model, SMALL_TARGETS)
    with handle.applied(adapter):
        with pytest.raises(TargetError, match="neither nest"), handle.applied(adapter):
            pass
        with pytest.raises(TargetError, match="leave its scope first"):
            handle.detach()
        model(image(1))
    handle.detach()


def in_thread(work: Callable[[], None]) -> BaseException | None:
    errors: list[BaseException] = []

    def caught() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    return errors[0] if errors else None


def test_another_thread_inside_the_scope_is_refused() -> None:
    model, x = small_model(), image(1)
    adapter = random_adapter(SMALL_TARGETS, 1)
    with attach(model, SMALL_TARGETS) as handle:
        with handle.applied(adapter):
            y = model(x)
            error = in_thread(lambda: model(x))
            assert isinstance(error, TargetError)
            assert "another thread" in str(error)
            assert "neither nest nor run in parallel" in str(in_thread(lambda: handle.applied(adapter).__enter__()))
            assert torch.equal(model(x), y)
        assert in_thread(lambda: model(x)) is None
        assert in_thread(lambda: check_scope(handle, model, adapter, y)) is None


def check_scope(handle: AdapterHandle, model: nn.Module, adapter: Adapter, expected: Tensor) -> None:
    with handle.applied(adapter):
        assert torch.equal(model(image(1)), expected)


def test_backward_may_run_in_another_thread() -> None:
    model, x = small_model(), image(1)
    adapter = random_adapter(SMALL_TARGETS, 1, trained=True)
    with attach(model, SMALL_TARGETS) as handle, handle.applied(adapter):
        loss = model(x).square().sum()
        assert in_thread(loss.backward) is None
    assert all(part.grad is not None for pair in adapter.pairs.values() for part in pair)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_an_adapter_is_cast_to_the_dtype_of_the_input(stored: torch.dtype, computed: torch.dtype) -> None:
    exact, x = small_model(), image(2)
    adapter = random_adapter(SMALL_TARGETS, 2)
    with attach(exact, SMALL_TARGETS) as handle, handle.applied(adapter):
        expected = exact(x)
    model = small_model(computed)
    with attach(model, SMALL_TARGETS) as handle, handle.applied(adapter.to(stored)):
        y = model(x.to(computed))
    assert y.dtype == computed
    low = torch.bfloat16 in (stored, computed)
    assert relative_error(y.double(), expected) < (2e-2 if low else 1e-6)


def test_autocast_computes_the_update_as_it_computes_the_module() -> None:
    model, x = small_model(torch.float32), image(2, torch.float32)
    adapter = random_adapter(SMALL_TARGETS, 2, dtype=torch.float32, trained=True)
    with attach(model, SMALL_TARGETS) as handle:
        with handle.applied(adapter):
            expected = model(x)
        with handle.applied(adapter), torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), expected) < 2e-2
    y.float().square().sum().backward()
    assert adapter.pairs["last"][0].grad is not None


def test_an_adapter_on_another_device_is_refused() -> None:
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 1).to("meta")
    with (
        attach(model, SMALL_TARGETS) as handle,
        pytest.raises(
            TargetError, match=r"first: the adapter is on meta and the module on cpu; .*adapter\.to\('cpu'\)"
        ),
        handle.applied(adapter),
    ):
        model(image(1))


def test_a_module_called_by_keyword_is_adapted() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    targets = [Target("0", 3, 3)]
    x = torch.randn(2, 3)
    with attach(model, targets) as handle, handle.applied(random_adapter(targets, 1, dtype=torch.float32)):
        assert torch.equal(model[0](input=x), model[0](x))


def test_a_copy_of_the_model_is_the_bare_model() -> None:
    model, x = small_model(), image(2)
    with attach(model, SMALL_TARGETS) as handle:
        with handle.applied(random_adapter(SMALL_TARGETS, 2)):
            y = model(x)
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(x), model(x))
        with attach(copied, SMALL_TARGETS) as other, other.applied(random_adapter(SMALL_TARGETS, 2)):
            assert torch.equal(copied(x), y)


def test_errors_are_openwu_errors() -> None:
    with pytest.raises(OpenwuError):
        attach(small_model(), [Target("nothing", 1, 1)])
