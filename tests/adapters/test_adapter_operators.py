"""Operators beside LoRA: formula, rows, gradients, strength, sums, merging, storage, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from adapter_cases import Mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from openwu.adapters.inject import attach
from openwu.adapters.merge import merge_, merged, merged_copy, merging_pays, unmerge_
from openwu.adapters.operators import operator_of
from openwu.adapters.updates import inner_products, relative_std
from openwu.editor.cache import AdapterCache, PackedAdapter
from openwu.errors import OpenwuError, TargetError
from openwu.registry import OPERATORS
from openwu.types import Adapter, Target

VECTORS = ("scale", "offset", "scale_offset")
FACTORS = {"scale": ["gain"], "offset": ["offset"], "scale_offset": ["gain", "offset"]}


class Mixed(nn.Module):
    """A convolution and two linear modules, one of them without a bias: `[n, 3, 6, 6]` -> `[n, 36, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.plain = nn.Linear(4, 6, bias=False)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.plain(self.conv(x).flatten(2).mT)))


def model(dtype: torch.dtype = torch.float64) -> Mixed:
    torch.manual_seed(0)
    return Mixed().to(dtype).requires_grad_(False)


def targets(*operators: str) -> tuple[Target, ...]:
    conv, plain, last = operators * 3 if len(operators) == 1 else operators
    return (
        Target("conv", 27, 4, kernel=(3, 3), operator=conv),
        Target("plain", 4, 6, operator=plain),
        Target("last", 6, 5, operator=last),
    )


KINDS = [targets("scale"), targets("offset"), targets("scale_offset"), targets("scale", "lora", "scale_offset")]
each_kind = pytest.mark.parametrize("chosen", KINDS, ids=lambda chosen: "-".join(t.operator for t in chosen))


def random_adapter(
    chosen: Sequence[Target],
    batch: int = 1,
    *,
    scale: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    trained: bool = False,
) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    factors = {
        target.name: {
            name: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(trained)
            for name, shape in target.shapes(batch, 2).items()
        }
        for target in chosen
    }
    return Adapter(tuple(chosen), factors, scale)


def pictures(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(dtype)


def applied(base: nn.Module, adapter: Adapter, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    with attach(base, adapter.targets) as handle, handle.applied(adapter, rows):
        return base(x)


def by_hand(adapter: Adapter, name: str, y: Tensor, sample: int) -> Tensor:
    """The formula, for one sample's output with its channels last."""
    factors, s = adapter.factors[name], adapter.scale
    gain = factors["gain"][sample] if "gain" in factors else torch.zeros(y.shape[-1], dtype=y.dtype)
    offset = factors["offset"][sample] if "offset" in factors else torch.zeros(y.shape[-1], dtype=y.dtype)
    return y * (1 + s * gain) + s * offset


@pytest.mark.parametrize("operator", VECTORS)
@pytest.mark.parametrize("inner", [(), (3,), (2, 3)])
def test_a_linear_module_computes_the_formula(operator: str, inner: tuple[int, ...]) -> None:
    layer = nn.Sequential(nn.Linear(4, 6)).double().requires_grad_(False)
    adapter = random_adapter([Target("0", 4, 6, operator=operator)], 3)
    assert list(adapter.factors["0"]) == FACTORS[operator]
    x = torch.randn(3, *inner, 4, dtype=torch.float64)
    expected = torch.stack([by_hand(adapter, "0", layer(row), i) for i, row in enumerate(x)])
    torch.testing.assert_close(applied(layer, adapter, x), expected)
    one = adapter.select([1])
    torch.testing.assert_close(applied(layer, one, x), torch.stack([by_hand(one, "0", layer(row), 0) for row in x]))


@pytest.mark.parametrize("operator", VECTORS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_computes_the_formula(operator: str, layout: torch.memory_format) -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2)).double().requires_grad_(False).to(memory_format=layout)
    adapter = random_adapter([Target("0", 27, 4, operator=operator)], 2)
    x = pictures(2).to(memory_format=layout)
    rows = [by_hand(adapter, "0", layer(x)[i].movedim(0, -1), i).movedim(-1, 0) for i in range(2)]
    came = applied(layer, adapter, x)
    torch.testing.assert_close(came, torch.stack(rows))
    assert came.is_contiguous(memory_format=layout)


def gradients(base: nn.Module, adapter: Adapter, x: Tensor, dy: Tensor, rows: Sequence[int] | None) -> list[Tensor]:
    x = x.detach().requires_grad_()
    leaves = [x, *adapter.state_dict().values()]
    y = applied(base, adapter, x, rows)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(-1, 2), min_size=1, max_size=5), st.integers(0, 99))
def test_rows_get_the_adapters_of_their_samples(chosen: tuple[Target, ...], rows: list[int], seed: int) -> None:
    """Outputs, and gradients of inputs and factors; rows without an adapter are the base's."""
    base, adapter = model(), random_adapter(chosen, 3, seed=seed, trained=True)
    x = pictures(len(rows))
    dy = torch.randn_like(base(x))
    y, dx, *factors = gradients(base, adapter, x, dy, rows)
    expected = [torch.zeros_like(part) for part in adapter.state_dict().values()]
    for row, sample in enumerate(rows):
        own = slice(row, row + 1)
        if sample < 0:
            assert torch.equal(y[own], base(x[own]))
            continue
        one_y, one_dx, *one = gradients(base, adapter.select([sample]), x[own], dy[own], None)
        torch.testing.assert_close(y[own], one_y)
        torch.testing.assert_close(dx[own], one_dx)
        for total, part, whole in zip(expected, one, adapter.select([sample]).state_dict().values(), strict=True):
            assert part.shape == whole.shape
            total[sample] += part[0]
    for came, part in zip(factors, expected, strict=True):
        torch.testing.assert_close(came, part)


@pytest.mark.parametrize("operator", VECTORS)
@pytest.mark.parametrize("samples", [[0, 1, 0], [1, 1, 1], [2, -1, 0]])
@pytest.mark.parametrize("lead", [(), (1,)])
def test_packed_sequences(operator: str, samples: list[int], lead: tuple[int, ...]) -> None:
    layer = nn.Sequential(nn.Linear(4, 6)).double().requires_grad_(False)
    adapter = random_adapter([Target("0", 4, 6, operator=operator)], 3)
    lengths = [2, 0, 3]
    x = torch.randn(*lead, 5, 4, dtype=torch.float64)
    with attach(layer, adapter.targets) as handle:
        with handle.applied(adapter, samples, segments=lengths):
            came = layer(x)
        with pytest.raises(TargetError, match="the segments hold 5 tokens"):  # noqa: SIM117
            with handle.applied(adapter, samples, segments=lengths):
                layer(x[..., :4, :])
    parts = [
        layer(run) if sample < 0 else by_hand(adapter, "0", layer(run), sample)
        for run, sample in zip(x.reshape(5, 4).split(lengths), samples, strict=True)
    ]
    torch.testing.assert_close(came, torch.cat(parts).view(came.shape))


def test_a_convolution_refuses_segments_and_single_pictures() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    adapter = random_adapter([Target("0", 27, 4, operator="scale")], 1)
    with attach(layer, adapter.targets) as handle:
        with pytest.raises(TargetError, match="segments are runs of tokens"), handle.applied(adapter, segments=[36]):
            layer(pictures(1))
        with pytest.raises(TargetError, match=r"expected an input \[n, c, h, w\]"), handle.applied(adapter):
            layer(pictures(1)[0])


def test_a_shared_expert_sees_its_mixtures_tokens() -> None:
    """Tokens `[n * length, in]`, of rows with different adapters."""
    torch.manual_seed(0)
    base = Mixture().double().requires_grad_(False)
    adapter = random_adapter([Target("shared_mlp.down_proj", 5, 6, operator="scale_offset")], 2)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expert, tokens = base.shared_mlp, x.flatten(0, 1)
    with attach(base, adapter.targets) as handle, handle.applied(adapter):
        came = expert(tokens)
    plain = expert(tokens).view(2, 3, 6)
    rows = [by_hand(adapter, "shared_mlp.down_proj", plain[i], i) for i in range(2)]
    torch.testing.assert_close(came, torch.cat(rows))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_and_strength_0_are_the_base_bit_for_bit(chosen: tuple[Target, ...], dtype: torch.dtype) -> None:
    base, x = model(dtype), pictures(2, dtype)
    adapter = random_adapter(chosen, 2, dtype=dtype)
    zeros = {name: {part: each * 0 for part, each in parts.items()} for name, parts in adapter.factors.items()}
    for neutral in (adapter.scaled(0), Adapter(adapter.targets, zeros, adapter.scale), adapter.scaled([0, 0])):
        assert torch.equal(applied(base, neutral, x), base(x))
    assert torch.equal(applied(base, adapter.scaled(1), x), applied(base, adapter, x))
    assert not torch.equal(applied(base, adapter, x), base(x))
    halves = applied(base, adapter.scaled([0, 1]), x)
    assert torch.equal(halves[:1], base(x)[:1])
    assert not torch.equal(halves[1:], base(x)[1:])


def test_a_gain_is_rounded_once_in_16_bits() -> None:
    """y + y (s g), where 1 + s g would be 1."""
    layer = nn.Sequential(nn.Linear(8, 512)).bfloat16().requires_grad_(False)
    target = Target("0", 8, 512, operator="scale")
    gain = torch.full((1, 512), 0.003)
    x = torch.randn(4, 8).bfloat16()
    y = layer(x).float()
    came = applied(layer, Adapter((target,), {"0": {"gain": gain}}, 1.0), x).float()
    bias = float(((came - y) / y).mean())
    assert 0.0015 < bias < 0.0045, "on average, rounding keeps what each number alone cannot show"


@each_kind
def test_a_sum_adds_changes_from_the_base_in_any_order(chosen: tuple[Target, ...]) -> None:
    one, other = random_adapter(chosen, 2, scale=0.5), random_adapter(chosen, 2, scale=0.2, seed=1)
    name = chosen[-1].name
    layer = nn.ModuleDict({name: nn.Linear(6, 5)}).double().requires_grad_(False)
    last = [Adapter(chosen[-1:], {name: each.factors[name]}, each.scale) for each in (one, other)]

    def outputs(adapter: Adapter, x: Tensor) -> Tensor:
        with attach(layer, adapter.targets) as handle, handle.applied(adapter):
            return layer[name](x)

    x = torch.randn(2, 3, 6, dtype=torch.float64)
    y = layer[name](x)
    together = y + sum(outputs(each, x) - y for each in last)
    for order in (last, last[::-1]):
        torch.testing.assert_close(outputs(Adapter.sum(order), x), together)
    base, pixels = model(), pictures(2)
    torch.testing.assert_close(
        applied(base, Adapter.sum([one, other]).scaled(0.7), pixels),
        applied(base, Adapter.sum([other.scaled(0.7), one.scaled(0.7)]), pixels),
    )


@each_kind
def test_merged_parameters_compute_what_hooks_compute(chosen: tuple[Target, ...]) -> None:
    base, adapter, x = model(), random_adapter(chosen), pictures(2)
    base.conv.to(memory_format=torch.channels_last)
    before, live = base(x), applied(base, adapter, x)
    state = {name: each.clone() for name, each in base.state_dict().items()}
    twin = merged_copy(base, adapter)
    torch.testing.assert_close(twin(x), live)
    assert twin.conv.weight.is_contiguous(memory_format=torch.channels_last)
    with merged(base, adapter):
        torch.testing.assert_close(base(x), live)
    originals = merge_(base, adapter)
    torch.testing.assert_close(base(x), live)
    unmerge_(base, originals)
    assert torch.equal(base(x), before)
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(base.state_dict()[name], each) for name, each in state.items())


@pytest.mark.parametrize(("operator", "receives"), [("scale", False), ("offset", True), ("scale_offset", True)])
def test_a_module_without_bias_receives_one_for_its_offset(operator: str, receives: bool) -> None:
    base = model(torch.bfloat16)
    adapter = random_adapter(targets(operator)[1:2], dtype=torch.float32)
    originals = merge_(base, adapter)
    assert (base.plain.bias is not None) == receives
    if base.plain.bias is not None:
        assert base.plain.bias.dtype == torch.bfloat16
        assert originals["plain.bias"] is None
        torch.testing.assert_close(base.plain.bias, (0.5 * adapter.factors["plain"]["offset"][0]).bfloat16())
    unmerge_(base, originals)
    assert base.plain.bias is None
    assert merged_copy(base, adapter).plain.bias is not None or not receives


def test_a_shared_bias_is_not_merged() -> None:
    base = model()
    base.conv.bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    base.plain = nn.Linear(4, 4).double()
    base.plain.bias = base.conv.bias
    with pytest.raises(TargetError, match="plain: another module has the same bias"):
        merge_(base, random_adapter([Target("plain", 4, 4, operator="offset")]))
    assert not merging_pays(base, [Target("plain", 4, 4, operator="offset")], 1, 10**6)


@each_kind
def test_adapters_are_stacked_selected_cast_packed_cached_and_saved(chosen: tuple[Target, ...], tmp_path: Path) -> None:
    adapter = random_adapter(chosen, 3)
    rebuilt = Adapter.stack([adapter.select([i]) for i in range(3)])
    cache = AdapterCache(tmp_path / "cache", memory_bytes=0)
    cache.put("0" * 64, adapter.select([1]))
    adapter.save_pretrained(tmp_path / "folder")
    copies = [
        (rebuilt, adapter),
        (adapter.to(torch.float32).to(torch.float64), adapter.to(torch.float32)),
        (PackedAdapter.of(adapter).adapter(), adapter),
        (cache.get("0" * 64), adapter.select([1])),
        (Adapter.from_pretrained(tmp_path / "folder"), adapter),
        (Adapter.from_pretrained(tmp_path / "folder", model=model()), adapter),
    ]
    for came, expected in copies:
        assert came is not None
        assert (came.targets, came.scale, came.rank) == (expected.targets, expected.scale, expected.rank)
        assert list(came.state_dict()) == list(expected.state_dict())
        for name, part in expected.state_dict().items():
            assert torch.equal(came.state_dict()[name].to(part), part), name
    assert adapter.parameters_per_sample == sum(part[0].numel() for part in adapter.state_dict().values())


def test_updates_of_vectors_are_compared_as_vectors() -> None:
    adapter = random_adapter(targets("scale", "lora", "offset"), 3)
    flat = [
        torch.cat([adapter.factors["conv"]["gain"], adapter.factors["last"]["offset"]], dim=1),
        (adapter.factors["plain"]["lora_B"] @ adapter.factors["plain"]["lora_A"]).flatten(1),
    ]
    joined = adapter.scale * torch.cat(flat, dim=1)
    torch.testing.assert_close(inner_products(adapter), joined @ joined.T)
    assert relative_std(adapter.select([1, 1, 1])) < 1e-6 < relative_std(adapter)


@pytest.mark.parametrize("operator", VECTORS)
def test_compiled_code_runs_other_adapters_without_another_graph(operator: str) -> None:
    layer = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)).requires_grad_(False)
    chosen = [Target("0", 4, 6, operator=operator), Target("1", 6, 6, operator="lora")]
    x = torch.randn(2, 3, 4)
    handle = attach(layer, chosen)
    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for seed in range(3):
        adapter = random_adapter(chosen, 2, seed=seed, dtype=torch.float32)
        with handle.applied(adapter):
            torch.testing.assert_close(compiled(x), layer(x))
    assert graphs.frame_count == 1


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: Target("moe.w1", 4, 6, 3, operator="scale"), "operator 'scale' does not work on experts, got 3"),
    (lambda: Target("0", 4, 6, operator="twist").shapes(1, 2), r"expected one of lora, scale, .* got 'twist'"),
    (
        lambda: attach(model(), [*targets("scale"), Target("last", 6, 5, operator="offset")]),
        "last: named 2 times",
    ),
    (lambda: attach(model(), [Target("last", 6, 7, operator="scale")]), "expected a linear module 6 -> 7, got 6 -> 5"),
    (lambda: attach(model(), [Target("conv", 27, 5, operator="scale")]), "expected a convolution 27 -> 5"),
    (lambda: attach(nn.Sequential(nn.ReLU()), [Target("0", 1, 1, operator="scale")]), "got ReLU"),
    (lambda: random_adapter(targets("scale")).pairs, r"expected LoRA targets only, got conv \(scale\)"),
    (
        lambda: Adapter(targets("scale")[2:], {"last": {"offset": torch.zeros(1, 5)}}, 1.0),
        r"last: expected factors of shapes {'gain': \(1, 5\)}, in this order, got {'offset': \(1, 5\)}",
    ),
    (
        lambda: Adapter.sum([random_adapter(targets("scale")), random_adapter(targets("offset"))]),
        "expected the same targets",
    ),
    (
        lambda: applied(model(), random_adapter(targets("scale"), 2), pictures(3)),
        r"the adapter is for 2 rows, but the module's input has shape \(3, 3, 6, 6\)",
    ),
]


@pytest.mark.parametrize(("ask", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(OpenwuError, match=message):
        ask()


def test_an_adapter_of_another_operator_is_not_applied() -> None:
    base = model()
    with (
        attach(base, targets("scale")) as handle,
        pytest.raises(TargetError, match=r"unexpected: conv \(offset 27 -> 4"),
        handle.applied(random_adapter(targets("offset"))),
    ):
        base(pictures(1))


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_says_in_what_its_change_is_linear(name: str) -> None:
    target = Target("0", 4, 6, operator=name)
    names = [factor.name for factor in target.factors(2)]
    assert set(operator_of(name).linear) <= set(names)
    assert operator_of(name).linear
