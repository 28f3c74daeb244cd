"""Every kernel, computed by Triton's interpreter on the CPU, against its reference; run by `test_ops_kernels.py`.

In a process of its own: `TRITON_INTERPRET=1` must be set before a kernel is made. What kernels write to holds NaN
before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import interpreter
import pytest
import torch
from torch import Tensor

from openwu.adapters.inject import attach
from openwu.config import GeneratorConfig, LayerGroup, PlainTarget
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.model import ParameterGenerator
from openwu.kernels import autotune as kernels
from openwu.kernels import dispatch, norm, rotary, trials
from openwu.kernels import low_rank as lora
from openwu.kernels import low_rank_triton as lora_kernel
from openwu.kernels import norm_triton as norm_kernel
from openwu.kernels import rotary_triton as rotary_kernel
from openwu.kernels.autotune import Choices, plain_torch, relative_error
from openwu.kernels.grouped import group_ends
from openwu_bench.adapters import ExpertsLayer, random_adapter

interpreter.correct()

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""One unit in the last place, for half precision: both round once, of sums in another order."""
EPS = 1e-6


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN."""
    empty = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(torch, "empty_like", lambda x: filled(x.shape, dtype=x.dtype, device=x.device))


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def turning(*shape: int) -> Tensor:
    angles = 10 * draw(*shape, seed=7)
    return torch.polar(torch.ones_like(angles), angles)


def close(came: Tensor, expected: Tensor) -> None:
    assert relative_error([came], [expected]) <= TOLERANCE[came.dtype]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    came = [draw(*each.shape, dtype=each.dtype, seed=20 + i) for i, each in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, inputs, came))


HEADS = {  # x and the part of its heads that is turned, turns
    "layers": ((2, 3, 2, 9, 24), 6, (3, 1, 1, 12)),
    "positions, one head of six numbers": ((2, 3, 1, 6), 1, (3, 1, 3)),
    "own keys of every sample": ((2, 3, 4, 8), 2, (2, 3, 1, 4)),
    "many heads": ((2, 70, 128), 70, (1, 1, 64)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HEADS)
def test_rotary(case: str, dtype: torch.dtype) -> None:
    shape, turned, of_turns = HEADS[case]
    whole, turns = draw(*shape, dtype=dtype), turning(*of_turns)
    x = whole[..., :turned, :]
    expected = rotary.apply_rotary(x, turns)
    inputs = x.detach().clone().as_strided(x.shape, x.clone().stride()).requires_grad_()
    rows, contiguous = rotary_kernel.rows(x, turns), rotary_kernel.rows(inputs, turns)
    assert rows is not None
    assert contiguous is not None
    came = rotary_kernel.apply_rotary(contiguous).view(x.shape)
    close(came, expected)
    ours, theirs = (gradients([out], [inputs]) for out in (came, rotary.apply_rotary(inputs, turns)))
    close(ours[0], theirs[0])
    untouched = whole[..., turned:, :].clone()
    with interpreter.each_number_once():
        rotary_kernel.apply_rotary_(rows)
    assert torch.equal(x, came)
    assert torch.equal(whole[..., turned:, :], untouched)


def test_rotary_leaves_what_it_cannot_address() -> None:
    x = draw(4, 6, 2, 8)
    assert rotary_kernel.rows(x, turning(6, 1, 4)) is not None
    assert rotary_kernel.rows(x.transpose(0, 1), turning(4, 1, 4)) is None
    assert rotary_kernel.rows(x[..., ::2], turning(6, 1, 2)) is None
    assert rotary_kernel.rows(x[..., :5], turning(6, 1, 2)) is None
    assert rotary_kernel.rows(x, turning(6, 2, 4)) is None
    assert rotary_kernel.rows(x, turning(6, 1, 4).to(torch.complex128)) is None


NORMS = [  # stream, update, weight, result
    (torch.float32, torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("width", [1, 37, 64])
@pytest.mark.parametrize("dtypes", NORMS, ids=["float32", "bfloat16", "stream in float32"])
def test_norm_of_a_strided_stream_in_place(dtypes: tuple[torch.dtype, ...], width: int) -> None:
    stream, added, weighted, result = dtypes
    whole = draw(2, 3, 5, width, dtype=stream)
    weight = draw(width, dtype=weighted, seed=1)
    update = draw(2, 3, 2, width, dtype=added, seed=2)
    x = whole[:, :, 1:3]
    untouched = whole[:, :, 3:].clone()
    for each in (update, None):
        expected = x.clone()
        normed = norm.add_rms_norm_(expected, each, weight, EPS, result)
        with interpreter.each_number_once():
            came = norm_kernel.add_rms_norm_(x, each, weight, EPS, result)
        close(came, normed)
        assert torch.equal(x, expected)  # the sum is rounded as two steps round it
    assert torch.equal(whole[:, :, 3:], untouched)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtypes", NORMS, ids=["float32", "bfloat16", "stream in float32"])
def test_norm_and_gradients(dtypes: tuple[torch.dtype, ...], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_kernel, "PARTS", 2)
    stream, added, weighted, result = dtypes
    x, update = draw(1, rows, 37, dtype=stream), draw(1, rows, 37, dtype=added, seed=1)
    weight = draw(37, dtype=weighted, seed=2)
    inputs = [each.requires_grad_() for each in (x, update, weight)]
    ours, plain = (list(each.add_rms_norm(x, update, weight, EPS, result)) for each in (norm_kernel, norm))
    assert torch.equal(ours[0], plain[0])
    close(ours[1], plain[1])
    with interpreter.each_number_once():
        came_gradients = gradients(ours, inputs)
    pairs = list(zip(came_gradients, gradients(plain, inputs), strict=True))
    ours, plain = ([each.rms_norm(x, weight, EPS, result)] for each in (norm_kernel, norm))
    close(ours[0], plain[0])
    pairs += zip(gradients(ours, [x, weight]), gradients(plain, [x, weight]), strict=True)
    total = norm_kernel.add_rms_norm(x, update, weight, EPS, result)[0]  # the norm is not used further
    pairs += zip(gradients([total], [x, update]), gradients([x + update.to(stream)], [x, update]), strict=True)
    for came, expected in pairs:
        assert came.dtype == expected.dtype
        assert relative_error([came], [expected]) <= 4 * TOLERANCE[torch.bfloat16 if result != stream else result]


SEGMENTS = {  # ends of groups, widths in and out, rank
    "one group": ([5], 33, 70, 1),
    "groups without rows, first, last and between": ([0, 7, 7, 40, 40], 20, 130, 5),
    "more groups than rows": ([0, 1, 1, 1, 2, 3, 3], 64, 8, 17),
    "tiles of large groups": ([65, 200], 8, 16, 16),
}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SEGMENTS)
def test_low_rank_of_sorted_rows(case: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    ends, in_dim, out_dim, rank = SEGMENTS[case]
    count, groups = ends[-1], len(ends)
    sizes = torch.diff(torch.tensor([0, *ends]))
    group_t = torch.arange(groups).repeat_interleave(sizes)
    assert group_ends(group_t, groups).tolist() == ends
    y = draw(count, out_dim + 3, dtype=dtype)[:, :out_dim]
    x = draw(in_dim, count, dtype=dtype, seed=1).t()
    a = draw(groups, rank, in_dim, dtype=stored, seed=2)
    b = draw(out_dim, groups, rank, dtype=stored, seed=3).transpose(0, 1)
    assert lora_kernel.fits(y, x, a)
    with interpreter.each_number_once():
        came = lora_kernel.add_sorted(y, x, a, b, 0.75, torch.tensor(ends, dtype=torch.int32))
    # In float64, with A x rounded as every way rounds it.
    wide = lora.add_routed(*(each.double() for each in (y, x, a.to(dtype), b.to(dtype))), 0.75, group_t)
    assert came.dtype == dtype
    assert relative_error([came], [wide.to(dtype)]) <= (1e-5 if dtype == torch.float32 else 2 * TOLERANCE[dtype])


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Choices]:
    """On this CPU as on a GPU, with kernels that always win where they agree."""
    seconds = itertools.count()
    choices = Choices(timer=lambda _run, _device: float(next(seconds)))
    monkeypatch.setattr(kernels, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(dispatch, "CHOICES", choices)
    monkeypatch.setattr(trials, "MAX_ELEMENTS", 2**7)
    yield choices
    assert not choices.failed
    assert all(choices.chosen.values())


def names(choices: Choices) -> set[object]:
    return {key[0] for key in choices.chosen}


def tiny() -> ParameterGenerator:
    """Two layers of two positions, two blocks."""
    torch.manual_seed(0)
    groups = (LayerGroup("layers.", 2, (PlainTarget("linear", 8, 8),), name="layers"),)
    made = ParameterGenerator(GeneratorConfig(2, 2, 8, 5, 16, 8, 2, 2, groups), b_init_std=0.3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_path_of_the_generator(chosen: Choices, dtype: torch.dtype) -> None:
    generator = tiny().to(dtype)
    condition = draw(2, 3, 5, dtype=dtype)
    fast = FastGenerator(generator)
    fast(condition)
    fast.workspace.poison()
    came = fast(condition)
    assert names(chosen) == {"rotary embedding in place", "residual addition and RMSNorm in place", "RMSNorm"}
    assert "triton" in fast.described
    before = dict(chosen.chosen)
    off = FastGenerator(generator, FastOptions(kernels=False))
    assert "triton" not in off.described
    expected = off(condition)
    assert chosen.chosen == before
    for name, tensor in expected.state_dict().items():
        error = (came.state_dict()[name] - tensor).float().norm() / tensor.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.05)


def test_training_of_the_generator(chosen: Choices) -> None:
    generator, condition = tiny(), draw(2, 3, 5)
    parameters = list(generator.parameters())

    def gradient() -> list[Tensor]:
        a, b = generator(condition).pairs["layers.0.linear"]
        return list(torch.autograd.grad((a.sin().sum() + b.square().sum()), parameters, materialize_grads=True))

    came = gradient()
    assert names(chosen) == {"rotary embedding", "residual addition and RMSNorm", "RMSNorm"}
    with plain_torch():
        expected = gradient()
    for one, other in zip(came, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2])
def test_adapters_of_stacked_experts(chosen: Choices, samples: int) -> None:
    torch.manual_seed(0)
    layer = ExpertsLayer(8, 12, experts=3, top_k=2)
    adapter = random_adapter(layer.targets(), samples, rank=3, dtype=torch.float32, seed=1)
    x = draw(2, 4, 8)
    with attach(layer, adapter.targets) as handle, handle.applied(adapter):
        with torch.no_grad():
            came = layer(x)
        assert names(chosen) == {"low-rank update of sorted rows"}
        count = len(chosen.chosen)
        expected = layer(x)  # gradients are wanted: plain torch
        assert len(chosen.chosen) == count
    torch.testing.assert_close(came, expected.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(came, layer(x), atol=1e-3)


TRIALS: dict[str, Callable[[], kernels.Trial]] = {
    "_rotate_kernel": lambda: trials.of_apply_rotary_(draw(2, 2, 8)),
    "_add_sorted": lambda: trials.of_sorted(draw(9, 8), draw(9, 8), draw(3, 2, 8), draw(3, 8, 2), 0.0),
    "_forward": lambda: trials.of_add_rms_norm_(draw(3, 8), draw(3, 8), draw(8), EPS, torch.float32),
    "_backward": lambda: trials.of_add_rms_norm(draw(3, 8), draw(3, 8), draw(8), EPS, torch.float32),
}


@pytest.mark.parametrize("name", TRIALS)
def test_a_kernel_that_does_nothing_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def __getitem__(self, _: object) -> Callable[..., None]:
            return lambda *_, **__: None

    for module in (rotary_kernel, norm_kernel, lora_kernel):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, Idle())
    trial = TRIALS[name]()
    with torch.enable_grad():
        error = relative_error(trial.kernel(), trial.reference())
    # An update of scale 0 changes nothing, so the result is NaN, as the memory was.
    assert not error <= trial.tolerance
