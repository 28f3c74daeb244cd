"""Stacked experts: against a loop over tokens and experts in float64, gradients too; what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import StackedMixture, random_adapter, relative_error, stacked_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from openwu.adapters.inject import attach
from openwu.adapters.merge import merged, merged_copy
from openwu.errors import TargetError
from openwu.types import Adapter, Target

few = settings(max_examples=20, deadline=None)


def slowly(model: StackedMixture, adapter: Adapter, x: Tensor, rows: list[int]) -> Tensor:
    """Token by token, expert by expert, from the formula; x `[n, length, d]`."""
    out = []
    for row, sample in zip(x, rows, strict=True):
        weights, chosen = model.gate(row)
        for token, w, experts in zip(row, weights, chosen.tolist(), strict=True):
            total = torch.zeros_like(token)
            for k, e in enumerate(experts):
                gate_up, down = (
                    weight[e] + (adapter.scale * b[sample, e] @ a[sample, e] if sample >= 0 else 0)
                    for weight, (a, b) in (
                        (model.experts.gate_up_proj, adapter.pairs["experts.gate_up_proj"]),
                        (model.experts.down_proj, adapter.pairs["experts.down_proj"]),
                    )
                )
                gate, up = (gate_up @ token).chunk(2)
                total = total + w[k] * (down @ (F.silu(gate) * up))
            out.append(total)
    return torch.stack(out).view(x.shape)


@few
@given(
    rows=st.lists(st.integers(-1, 2), min_size=1, max_size=4),
    length=st.integers(1, 4),
    top_k=st.integers(1, 3),
    widths=st.sampled_from([(6, 5), (8, 4)]),
    rank=st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_every_row_has_its_own_experts(
    rows: list[int], length: int, top_k: int, widths: tuple[int, int], rank: int, dtype: torch.dtype, seed: int
) -> None:
    """Widths (8, 4) in float32 take the grouped products, the others the reference."""
    torch.manual_seed(seed)
    model = StackedMixture(*widths, top_k=top_k).to(dtype)
    targets = stacked_targets(*widths)
    adapter = random_adapter(targets, 3, rank=rank, seed=seed, dtype=dtype, trained=True)
    x = torch.randn(len(rows), length, widths[0], dtype=dtype, requires_grad=True)
    with attach(model, targets) as handle, handle.applied(adapter, rows):
        came = model(x)
    expected = slowly(model, adapter, x, rows)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(came, expected, rtol=tolerance, atol=tolerance)
    wanted = [x, *adapter.state_dict().values()]
    dy = torch.randn_like(x)
    for one, other in zip(
        *(torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True) for y in (came, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_layer_waits_for_no_device(samples: int) -> None:
    model = StackedMixture(8, 8).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        targets = stacked_targets(8, 8)
        adapter = random_fake_adapter(targets, samples)
        x = torch.randn(3, 4, 8, dtype=torch.bfloat16)
        with attach(model, targets) as handle, handle.applied(adapter):
            assert model(x).shape == x.shape


def random_fake_adapter(targets: list[Target], batch: int) -> Adapter:
    weights = {
        t.name: (torch.randn(shapes[0], dtype=torch.bfloat16), torch.randn(shapes[1], dtype=torch.bfloat16))
        for t in targets
        for shapes in [list(t.shapes(batch, 8).values())]
    }
    return Adapter.from_pairs(tuple(targets), weights, 0.5)


def test_combining_is_deterministic_and_reads_no_old_memory() -> None:
    """Buffers full of NaN lie where results are allocated; nothing of them may come through."""
    torch.manual_seed(0)
    model, targets = StackedMixture(8, 4), stacked_targets(8, 4)
    adapter = random_adapter(targets, 2, dtype=torch.float32)
    x = torch.randn(2, 9, 8)
    with attach(model, targets) as handle, handle.applied(adapter):
        first = model(x)
        for _ in range(5):
            poison = [torch.full((size,), float("nan")) for size in (36 * 8, 36 * 4, 36 * 8, 18 * 8, 36)]
            del poison
            assert torch.equal(model(x), first)
    assert first.isfinite().all()


@pytest.mark.parametrize("which", ["module", "everywhere", "none"])
def test_what_another_hook_has_seen_stays_as_it_was(which: str) -> None:
    """The update is written into a product's output, but not where somebody else may have kept it."""
    torch.manual_seed(0)
    model, targets = StackedMixture(8, 4).requires_grad_(False), stacked_targets(8, 4)
    adapter = random_adapter(targets, 2, dtype=torch.float32)
    x = torch.randn(2, 9, 8)
    product = model.experts.products["gate_up_proj"]
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, _: object, y: Tensor) -> None:
        if module is product:
            kept.append((y, y.clone()))

    hook = {
        "module": lambda: product.register_forward_hook(keep),
        "everywhere": lambda: nn.modules.module.register_module_forward_hook(keep),
        "none": lambda: None,
    }[which]()
    with attach(model, targets) as handle, torch.no_grad():
        after = product.register_forward_hook(keep)
        with handle.applied(adapter):
            came = model(x)
        after.remove()
    if hook is not None:
        hook.remove()
        seen, then = kept[0]
        assert torch.equal(seen, then)
        assert not torch.equal(seen, kept[-1][0])
    torch.testing.assert_close(came, slowly(model, adapter, x, [0, 1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_with_and_without_gradients_the_result_is_the_same(mode: type[torch.no_grad]) -> None:
    torch.manual_seed(0)
    model, targets = StackedMixture(8, 4).requires_grad_(False), stacked_targets(8, 4)
    trained = random_adapter(targets, 3, dtype=torch.float32, trained=True)
    x = torch.randn(3, 7, 8)
    with attach(model, targets) as handle:
        with handle.applied(trained):
            expected = model(x)
        with mode(), handle.applied(trained.detach()):
            came = model(x)
    assert expected.requires_grad
    assert not came.requires_grad
    torch.testing.assert_close(came, expected.detach(), rtol=1e-5, atol=1e-5)


def test_merged_stacked_experts() -> None:
    torch.manual_seed(0)
    model, targets = StackedMixture().double(), stacked_targets()
    adapter = random_adapter(targets, 1)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    base = model(x)
    with attach(model, targets) as handle, handle.applied(adapter):
        applied = model(x)
    assert relative_error(merged_copy(model, adapter)(x), applied) < 1e-12
    with merged(model, adapter):
        assert relative_error(model(x), applied) < 1e-12
    assert torch.equal(model(x), base)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([Target("experts.gate_up_proj", 6, 9, 4)], r"\(4, 9, 6\), got \(4, 10, 6\)"),
        ([Target("experts.down_proj", 5, 6, 3)], r"\(3, 6, 5\), got \(4, 6, 5\)"),
        ([*stacked_targets(), Target("experts.w9", 5, 6, 4)], r"experts\.w9: .* got no such parameter"),
    ],
)
def test_targets_that_do_not_fit(targets: list[Target], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        attach(StackedMixture(), targets)


def test_experts_computed_in_one_piece_are_refused() -> None:
    model = StackedMixture()
    model.experts.products = nn.ModuleDict()
    with pytest.raises(TargetError, match=r"call openwu\.backbones\.causal_lm\.experts\.group_experts"):
        attach(model, stacked_targets())


def test_a_mixture_that_does_not_run_is_named() -> None:
    model, targets = StackedMixture(), stacked_targets()
    adapter = random_adapter(targets, 1, dtype=torch.float32)
    with attach(model, targets) as handle, pytest.raises(TargetError, match="did it run"), handle.applied(adapter):
        pass
