"""What must hold for every operator, on every kind of module that it takes: one line in CASES brings all tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.adapters.inject import attach
from openwu.adapters.merge import merged, merged_copy, merged_weights, merging_pays
from openwu.adapters.operators import operator_of
from openwu.adapters.operators.basis import multiplied_out
from openwu.adapters.updates import inner_products, relative_std
from openwu.config import GeneratorConfig, LayerGroup, PlainTarget
from openwu.editor.cache import AdapterCache, PackedAdapter
from openwu.errors import OpenwuError, TargetError
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.model import ParameterGenerator
from openwu.registry import OPERATORS
from openwu.types import Adapter, Target


class Case(NamedTuple):
    """An operator on a kind of module."""

    operator: str
    kind: str
    sums: bool = True
    """Whether adapters can be summed."""
    folds: bool = True
    """Whether weights can hold them."""


CASES = [
    Case("lora", "linear"),
    Case("lora", "conv"),
    Case("scale", "linear"),
    Case("scale", "rms_norm"),
    Case("offset", "linear"),
    Case("offset", "conv"),
    Case("scale_offset", "linear"),
    Case("scale_offset", "conv"),
    Case("scale_offset", "norm"),
    Case("scale_offset", "group_norm"),
    Case("rotation", "linear"),
    Case("rotation", "conv"),
    Case("dora", "linear", sums=False),
    Case("dora", "conv", sums=False),
    Case("basis_diagonal", "linear"),
    Case("basis_diagonal", "conv"),
    Case("basis_matrix", "linear"),
    Case("basis_mixture", "linear"),
    Case("basis_mixture", "conv"),
    Case("lora+offset", "linear"),
    Case("lora+scale_offset", "conv"),
    Case("lora+rotation", "linear"),
    Case("dora+scale", "linear", sums=False),
    Case("basis_diagonal+scale", "linear"),
    Case("prefix", "linear", folds=False),
    Case("prefix", "conv", folds=False),
    Case("prefix+offset", "linear", folds=False),
]
LINEAR = [case for case in CASES if case.kind == "linear"]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}-{case.kind}")
each_linear = pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.operator)


class RootMeanSquare(nn.Module):
    """A norm of another library: `RootMeanSquareNorm` below is its name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class RootMeanSquareNorm(RootMeanSquare):
    """With a name that says what it is."""


class PlusOneNorm(RootMeanSquare):
    """Multiplies by 1 + weight, as some language models do."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x


class Setting(NamedTuple):
    """A model of one module, its target, and what makes inputs of n rows."""

    model: nn.Sequential
    target: Target
    inputs: Callable[[int], Tensor]


def setting(
    case: Case, width: int = 3, pairs: int = 2, bias: bool = True, dtype: torch.dtype = torch.float64
) -> Setting:
    out = 2 * pairs
    modules: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(width, out, bias=bias),
        "conv": lambda: nn.Conv2d(width, out, 3, stride=2, padding=1, bias=bias),
        "norm": lambda: nn.LayerNorm(out, bias=bias),
        "group_norm": lambda: nn.GroupNorm(2, out),
        "rms_norm": lambda: RootMeanSquareNorm(out),
    }
    module = modules[case.kind]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.3)
    widths = {"linear": width, "conv": 9 * width}
    kernel = (3, 3) if case.kind == "conv" else None
    target = Target("0", widths.get(case.kind, out), out, kernel=kernel, operator=case.operator)
    tail = {"linear": (5, width), "conv": (width, 5, 4), "group_norm": (out, 3, 2)}.get(case.kind, (5, out))
    model = nn.Sequential(module).to(dtype).requires_grad_(False)
    return Setting(model, target, lambda rows: torch.randn(rows, *tail).to(dtype))


def drawn(target: Target, batch: int, rank: int, *, scale: float = 0.5, dtype: torch.dtype = torch.float64) -> Adapter:
    factors = {name: 0.6 * torch.randn(shape).to(dtype) for name, shape in target.shapes(batch, rank).items()}
    return Adapter((target,), {"0": factors}, scale)


def applied(model: nn.Module, adapter: Adapter, x: Tensor, rows: list[int] | None = None) -> Tensor:
    with attach(model, adapter.targets) as handle, handle.applied(adapter, rows):
        came = model(x)
    assert isinstance(came, Tensor)
    return came


def gradients(model: nn.Module, adapter: Adapter, x: Tensor, dy: Tensor, rows: list[int] | None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), *(part.detach().requires_grad_() for part in adapter.state_dict().values())]
    own = Adapter(adapter.targets, {"0": dict(zip(adapter.factors["0"], leaves[1:], strict=True))}, adapter.scale)
    y = applied(model, own, leaves[0], rows)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)]


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neutral_numbers_and_strengths_0_and_1_are_exact(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = setting(case, dtype=dtype)
    adapter, x = drawn(made.target, 2, 2, dtype=dtype), made.inputs(2)
    base, full = made.model(x), applied(made.model, adapter, x)
    assert not torch.equal(full, base)
    assert torch.equal(applied(made.model, adapter.scaled(1), x), full)
    neutral = adapter.factors["0"] | {
        name: torch.zeros_like(adapter.factors["0"][name]) for name in operator_of(case.operator).linear
    }
    for none in (adapter.scaled(0), Adapter(adapter.targets, {"0": neutral}, adapter.scale)):
        assert torch.equal(applied(made.model, none, x), base)
    halves = applied(made.model, adapter.scaled([0, 1]), x)
    assert torch.equal(halves[0], base[0])
    torch.testing.assert_close(halves[1], full[1])


@each_case
@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(st.integers(-1, 2), min_size=1, max_size=4),
    width=st.integers(1, 4),
    pairs=st.integers(1, 3),
    rank=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_batch_is_its_samples_one_by_one(
    case: Case, rows: list[int], width: int, pairs: int, rank: int, bias: bool, seed: int
) -> None:
    """Outputs, and gradients of inputs and factors; rows without an adapter are the base's bit for bit."""
    torch.manual_seed(seed)
    made = setting(case, width, pairs, bias)
    adapter, x = drawn(made.target, 3, rank), made.inputs(len(rows))
    dy = torch.randn_like(made.model(x))
    y, dx, *parts = gradients(made.model, adapter, x, dy, rows)
    expected = [torch.zeros_like(part) for part in adapter.state_dict().values()]
    for row, sample in enumerate(rows):
        own = slice(row, row + 1)
        if sample < 0:
            assert torch.equal(y[own], made.model(x[own]))
            one_dx = gradients(made.model, adapter.select([0]).scaled(0), x[own], dy[own], None)[1]
            torch.testing.assert_close(dx[own], one_dx)
            continue
        one_y, one_dx, *ones = gradients(made.model, adapter.select([sample]), x[own], dy[own], None)
        torch.testing.assert_close(y[own], one_y)
        torch.testing.assert_close(dx[own], one_dx)
        for total, part in zip(expected, ones, strict=True):
            total[sample if len(total) > 1 else 0] += part[0]
    for name, came, total in zip(adapter.factors["0"], parts, expected, strict=True):
        torch.testing.assert_close(came, total, msg=lambda text, name=name: f"{name}: {text}")


@each_case
@settings(max_examples=8, deadline=None)
@given(
    width=st.integers(1, 4),
    pairs=st.integers(1, 3),
    rank=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_folded_is_live(case: Case, width: int, pairs: int, rank: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    made = setting(case, width, pairs, bias)
    adapter, x = drawn(made.target, 1, rank), made.inputs(2)
    if not case.folds:
        with pytest.raises(TargetError, match=f"0: no weight can hold the operator '{re.escape(case.operator)}'"):
            merged_copy(made.model, adapter)
        with pytest.raises(TargetError, match="adds through a softmax, which no weight can hold"):
            merged_weights(made.model, adapter)
        assert not merging_pays(made.model, adapter.targets, rank, 1 << 40)
        return
    base, live = made.model(x), applied(made.model, adapter, x)
    torch.testing.assert_close(merged_copy(made.model, adapter)(x), live)
    with merged(made.model, adapter):
        torch.testing.assert_close(made.model(x), live)
    assert torch.equal(made.model(x), base)


@each_case
def test_sums_add_changes_from_the_base_or_are_refused(case: Case) -> None:
    torch.manual_seed(0)
    made = setting(case)
    one, x = drawn(made.target, 2, 2), made.inputs(2)
    other = drawn(made.target, 2, 2, scale=0.2)
    shared = {name: one.factors["0"][name] for name in operator_of(case.operator).shared}
    other = Adapter(other.targets, {"0": dict(other.factors["0"]) | shared}, other.scale)
    if not case.sums:
        with pytest.raises(TargetError, match="a sum of DoRA's changes is no DoRA"):
            Adapter.sum([one, other])
        return
    base = made.model(x)
    changes = [applied(made.model, each, x) - base for each in (one, other)]
    torch.testing.assert_close(applied(made.model, Adapter.sum([one, other]), x), base + changes[0] + changes[1])
    torch.testing.assert_close(applied(made.model, Adapter.sum([other, one]), x), base + changes[0] + changes[1])
    torch.testing.assert_close(applied(made.model, one.scaled(0.3), x), base + 0.3 * changes[0])


@each_linear
@pytest.mark.parametrize("samples", [[0, 1, 0], [1, 1, 1], [2, -1, 0]])
def test_packed_sequences(case: Case, samples: list[int]) -> None:
    torch.manual_seed(0)
    made = setting(case)
    adapter, lengths = drawn(made.target, 3, 2), [2, 0, 3]
    x = made.inputs(1)
    with attach(made.model, adapter.targets) as handle:
        with handle.applied(adapter, samples, segments=lengths):
            came = made.model(x)
        with pytest.raises(TargetError, match="the segments hold 5 tokens"):  # noqa: SIM117
            with handle.applied(adapter, samples, segments=lengths):
                made.model(x[:, :4])
    runs = [
        made.model(run) if sample < 0 else applied(made.model, adapter.select([sample]), run)
        for run, sample in zip(x[0].split(lengths), samples, strict=True)
    ]
    torch.testing.assert_close(came[0], torch.cat(runs))


@each_case
def test_adapters_are_stacked_packed_compared_and_saved(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = setting(case)
    adapter = drawn(made.target, 3, 2)
    adapter.save_pretrained(tmp_path)
    copies = [
        Adapter.stack([adapter.select([i]) for i in range(3)]),
        PackedAdapter.of(adapter).adapter(),
        Adapter.from_pretrained(tmp_path),
        Adapter.from_pretrained(tmp_path, model=made.model),
    ]
    for came in copies:
        assert (came.targets, came.scale, came.rank, came.batch) == (adapter.targets, 0.5, adapter.rank, 3)
        assert list(came.factors["0"]) == list(adapter.factors["0"])
        assert all(torch.equal(came.factors["0"][name], part) for name, part in adapter.factors["0"].items())
    products = inner_products(adapter)
    torch.testing.assert_close(products, products.T)
    assert relative_std(adapter.select([1, 1, 1])) < 1e-6 < relative_std(adapter)


@each_case
def test_a_generator_writes_it_and_learns(case: Case, tmp_path: Path) -> None:
    """Both paths of inference and a stored folder write the same; every parameter gets a gradient."""
    torch.manual_seed(0)
    made = setting(case, dtype=torch.float32)
    base = nn.ModuleList([made.model[0], setting(case, dtype=torch.float32).model[0]])
    target = PlainTarget("fc", made.target.in_dim, made.target.out_dim, case.operator)
    group = LayerGroup("", 2, (target,), name="all", paths=("0", "1"))
    wrapped = nn.ModuleList([nn.ModuleDict({"fc": each}) for each in base])
    generator = ParameterGenerator(GeneratorConfig(4, 4, 8, 5, 16, 8, 2, 1, (group,)), b_init_std=0.1)
    condition, x = torch.randn(2, 3, 5), made.inputs(2)
    wanted = [each(x).detach() * torch.tensor([0.7, 1.3]).view(2, *[1] * (x.ndim - 1)) + 0.2 for each in base]
    optimizer, losses = torch.optim.Adam(generator.parameters(), lr=3e-3), []
    with attach(wrapped, generator.targets) as handle:
        for _ in range(15):
            with handle.applied(generator(condition)):
                loss = sum((each(x) - goal).square().mean() for each, goal in zip(base, wanted, strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = {name: each for name, each in generator.named_parameters() if each.requires_grad}
    assert all(each.grad is not None and each.grad.any() for each in trained.values())
    generator.requires_grad_(False).save_pretrained(tmp_path)
    clear = generator(condition)
    assert clear.parameters_per_sample == generator.layout.adapter_size
    again = ParameterGenerator.from_pretrained(tmp_path)(condition)
    fast = FastGenerator(generator, FastOptions(chunk_layers=1))(condition)
    for name, part in clear.state_dict().items():
        assert torch.equal(again.state_dict()[name], part), name
        torch.testing.assert_close(fast.state_dict()[name], part)


def test_every_operator_is_tested() -> None:
    assert {name for case in CASES for name in case.operator.split("+")} == set(OPERATORS)


def test_multiplied_out_a_basis_is_a_lora() -> None:
    torch.manual_seed(0)
    for operator in ("basis_diagonal", "basis_matrix", "basis_mixture"):
        made = setting(Case(operator, "linear"))
        adapter, x = drawn(made.target, 2, 2), made.inputs(2)
        plain = multiplied_out(adapter)
        assert [target.operator for target in plain.targets] == ["lora"]
        torch.testing.assert_close(applied(made.model, plain, x), applied(made.model, adapter, x))
    with pytest.raises(TargetError, match="expected the same shared numbers in every adapter"):
        Adapter.stack([adapter, drawn(made.target, 1, 2)])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_prefix_is_attention_with_an_empty_slot(kind: str) -> None:
    """Against torch's softmax over one more slot, whose score is 0 and whose value is 0; large scores stay finite."""
    torch.manual_seed(0)
    made = setting(Case("prefix", kind))
    adapter, x = drawn(made.target, 1, 3), 40 * made.inputs(2)
    keys, values, thresholds = (part[0] for part in adapter.factors["0"].values())
    rows = x if kind == "linear" else F.unfold(x, 3, padding=1, stride=2).mT  # [n, m, in]
    total = torch.zeros(())
    for head in range(3):
        scores = rows @ keys[:, head].T + thresholds[:, head]
        shares = torch.cat([torch.zeros_like(scores[..., :1]), scores], -1).softmax(-1)[..., 1:]
        total = total + shares @ values[:, :, head]
    came, base = applied(made.model, adapter, x), made.model(x)
    change = came - base
    torch.testing.assert_close(change if kind == "linear" else change.flatten(2).mT, 0.5 * total)
    assert came.isfinite().all()


def test_a_cache_holds_a_basis_once() -> None:
    """However many adapters of one generator it holds; copies are nobody else's, and its bytes go with the last one."""
    torch.manual_seed(0)
    made = setting(Case("basis_matrix+offset", "linear"))
    adapters = [drawn(made.target, 1, 2) for _ in range(4)]
    names = operator_of("basis_matrix+offset").shared
    for each in adapters[1:3]:
        each.factors["0"].update({name: adapters[0].factors["0"][name] for name in names})  # type: ignore[attr-defined]
    own = sum(part.nbytes for name, part in adapters[0].factors["0"].items() if name not in names)
    basis = sum(adapters[0].factors["0"][name].nbytes for name in names)
    cache = AdapterCache(memory_bytes=3 * own + 2 * basis)
    keys = [f"{number:064x}" for number in range(4)]
    for key, each in zip(keys[:3], adapters, strict=False):
        cache.put(key, each)
    cache.put(keys[0], adapters[0])
    assert cache.statistics.memory_bytes == 3 * own + basis
    for key, each in zip(keys[:3], adapters, strict=False):
        came = cache.get(key)
        assert came is not None
        assert all(torch.equal(came.factors["0"][name], part) for name, part in each.factors["0"].items())
        came.factors["0"][names[0]].zero_()
    cache.put(keys[3], adapters[3])  # makes room by dropping one
    assert (cache.statistics.memory_bytes, cache.statistics.evictions) == (3 * own + 2 * basis, 1)
    for number in range(4, 7):
        cache.put(f"{number:064x}", adapters[3])
    assert cache.statistics.memory_bytes == 4 * own + basis  # the first basis went with the last entry that held it


def test_an_offset_on_the_modulation_map_offsets_shift_scale_and_gate() -> None:
    """AdaLN: (shift, scale, gate) = map(time), so that an offset of its output is one of all three, at every time."""
    torch.manual_seed(0)
    modulation = nn.Sequential(nn.Linear(4, 9)).requires_grad_(False)
    adapter = drawn(Target("0", 4, 9, operator="offset"), 2, 1, dtype=torch.float32)
    times = torch.randn(2, 4)
    expected = modulation(times) + 0.5 * adapter.factors["0"]["offset"]
    for came, part in zip(applied(modulation, adapter, times).chunk(3, dim=1), expected.chunk(3, dim=1), strict=True):
        torch.testing.assert_close(came, part)


class Routed(nn.Module):
    """A mixture of three experts, one for each token, whose router is a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1, keepdim=True)
        return sum(torch.where(chosen == i, expert(x), 0) for i, expert in enumerate(self.experts))


def test_an_offset_on_the_router_chooses_experts_for_each_request() -> None:
    torch.manual_seed(0)
    model, x = Routed().requires_grad_(False), torch.randn(4, 5, 4)
    offset = torch.full((2, 3), -1e9)
    offset[0, 2] = offset[1, 0] = 0
    adapter = Adapter((Target("gate", 4, 3, operator="offset"),), {"gate": {"offset": offset}}, 1.0)
    came = applied(model, adapter, x, [0, 1, -1, 0])
    assert torch.equal(came[2], model(x)[2])
    for row, expert in ((0, 2), (1, 0), (3, 2)):
        torch.testing.assert_close(came[row], model.experts[expert](x[row]))


def test_dora_has_the_row_norms_of_its_magnitudes() -> None:
    torch.manual_seed(0)
    made = setting(Case("dora", "linear"))
    adapter = drawn(made.target, 1, 2)
    before, after = made.model[0].weight, merged_copy(made.model, adapter)[0].weight
    expected = before.norm(dim=1) * (1 + 0.5 * adapter.factors["0"]["magnitude"][0])
    torch.testing.assert_close(after.norm(dim=1), expected.abs())


REFUSED: list[tuple[nn.Module, Target, str]] = [
    (nn.Linear(3, 5), Target("0", 3, 5, operator="rotation"), "0: the operator 'rotation' .* even output width, got 5"),
    (nn.LayerNorm(4), Target("0", 4, 4, operator="lora"), "0: expected an nn.Linear or nn.Conv2d, got LayerNorm"),
    (nn.LayerNorm(4), Target("0", 4, 6, operator="scale"), "expected a norm of width 4 -> 6, got LayerNorm of 4"),
    (Routed(), Target("0", 4, 3, operator="offset"), "0: expected an nn.Linear or nn.Conv2d, got Routed"),
    (nn.RMSNorm(4), Target("0", 4, 4, operator="offset"), "0: the operator 'offset' needs a norm with a bias, got RMS"),
    (nn.Linear(4, 4), Target("0", 4, 4, operator="lora+dora"), "factors of different names, got lora_A, lora_B twice"),
    (nn.Linear(4, 4), Target("0", 4, 4, operator="lora+lora"), "expected different names joined by '\\+'"),
    (nn.Linear(4, 4), Target("0", 4, 4, operator="lora+twist"), "expected one of lora, .* got 'twist'"),
    (
        nn.Linear(4, 4).to(torch.float8_e4m3fn),
        Target("0", 4, 4, operator="dora"),
        "'dora' reads the weight's row norms",
    ),
]


@pytest.mark.parametrize(("module", "target", "message"), REFUSED)
def test_an_operator_refuses_a_target_by_name(module: nn.Module, target: Target, message: str) -> None:
    with pytest.raises(OpenwuError, match=message):
        attach(nn.Sequential(module), [target])


def test_a_gain_is_not_merged_where_the_weight_is_no_factor() -> None:
    model = nn.Sequential(PlusOneNorm(4)).requires_grad_(False)
    adapter = drawn(Target("0", 4, 4, operator="scale"), 1, 1, dtype=torch.float32)
    x = torch.randn(2, 4)
    torch.testing.assert_close(applied(model, adapter, x), model(x) * (1 + 0.5 * adapter.factors["0"]["gain"]))
    with pytest.raises(TargetError, match="does not multiply by its weight alone"):
        merged_copy(model, adapter)
