"""The fast path against the clear one: odd sizes, pieces, masks, dtypes, changed weights, poisoned memory, threads."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openwu.config import GeneratorConfig, LayerGroup, PlainTarget
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.model import ParameterGenerator
from openwu.types import Adapter, Condition


def odd_config(blocks: int = 3) -> GeneratorConfig:
    """Five layers of 3 * 9 positions, and one layer of another group; nothing is a power of two but the head."""
    targets = (PlainTarget("qkv", 37, 50), PlainTarget("down", 24, 10))
    groups = (
        LayerGroup("layers.", 5, targets, name="layers"),
        LayerGroup("head.", 1, (PlainTarget("conv", 9, 4),), name="head", indexed=False),
    )
    return GeneratorConfig(6, 3, 11, 7, 24, 8, 2, blocks, groups)


@pytest.fixture
def generator() -> ParameterGenerator:
    torch.manual_seed(0)
    made = ParameterGenerator(odd_config(), b_init_std=0.3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.requires_grad_(False)


def poisoned(fast: FastGenerator, condition: Condition | Tensor) -> Adapter:
    """The result of a call whose memory held NaN."""
    fast(condition)
    fast.workspace.poison()
    return fast(condition)


def difference(came: Adapter, expected: Adapter) -> float:
    """The largest error of a tensor, relative to its norm."""
    errors = []
    for key, tensor in expected.detach().state_dict().items():
        other = came.state_dict()[key]
        assert other.shape == tensor.shape
        assert other.dtype == tensor.dtype
        errors.append(float((other.double() - tensor.double()).norm() / tensor.double().norm()))
    return max(errors)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        FastOptions(),
        FastOptions(chunk_bytes=1),
        FastOptions(chunk_bytes=60 * 24 * 32),
        FastOptions(chunk_bytes=170 * 24 * 32),
        FastOptions(chunk_layers=2),
        FastOptions(keep_first_block=False),
        FastOptions(joined_bytes=0),
    ],
    ids=["whole", "one row", "some layers", "whole samples", "two layers", "no first block", "side by side"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_the_adapter_is_the_reference_to_rounding(
    generator: ParameterGenerator, batch: int, options: FastOptions, dtype: torch.dtype, tolerance: float
) -> None:
    generator.to(dtype)
    condition = torch.randn(batch, 4, 7, dtype=dtype)
    came = poisoned(FastGenerator(generator, options), condition)
    assert difference(came, generator(condition)) < tolerance
    assert came.scale == generator.scale
    assert came.targets == generator.targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_the_reference(
    generator: ParameterGenerator, dtype: torch.dtype
) -> None:
    condition = torch.randn(2, 5, 7)
    generator.to(dtype)
    truth = copy.deepcopy(generator).double()(condition.to(dtype))
    clear = difference(generator(condition).to(torch.float64), truth)
    fast = difference(poisoned(FastGenerator(generator), condition).to(torch.float64), truth)
    assert 0 < fast < 1.2 * clear


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_are_those_of_the_reference(
    generator: ParameterGenerator, residual: torch.dtype | None, parameters: torch.dtype, autocast: bool
) -> None:
    generator.to(parameters).residual_dtype = residual
    condition = torch.randn(2, 5, 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, came = generator(condition), poisoned(FastGenerator(generator), condition)
    exact = parameters == torch.float32 and not autocast and residual != torch.bfloat16
    assert difference(came, expected) < (1e-5 if exact else 0.05)


def test_masked_samples_are_those_of_the_reference(generator: ParameterGenerator) -> None:
    generator.double()
    mask = torch.tensor([[True] * 4, [False, True, False, True], [True, False, False, False]])
    tokens = torch.randn(3, 4, 7, dtype=torch.float64).masked_fill(~mask[..., None], float("nan"))
    for options in (FastOptions(), FastOptions(chunk_bytes=1)):
        came = poisoned(FastGenerator(generator, options), Condition(tokens, mask))
        assert difference(came, generator(Condition(tokens, mask))) < 1e-13


def test_one_block_and_lengths_in_turn(generator: ParameterGenerator) -> None:
    single = ParameterGenerator(odd_config(blocks=1)).double()
    for each in (single, generator.double()):
        fast = FastGenerator(each)
        for length in (1, 9, 2, 9):
            condition = torch.randn(1, length, 7, dtype=torch.float64)
            assert difference(fast(condition), each(condition)) < 1e-13


def test_changed_weights_are_noticed(generator: ParameterGenerator) -> None:
    condition = torch.randn(1, 4, 7)
    fast = FastGenerator(generator)

    def check() -> None:
        assert difference(fast(condition), generator(condition)) < 1e-5

    check()
    with torch.no_grad():
        for parameter in generator.parameters():
            before = fast(condition)
            parameter.mul_(1.1)
            check()
            assert difference(fast(condition), before) > 1e-7
    generator.load_state_dict({key: 0.9 * value for key, value in generator.state_dict().items()}, assign=True)
    check()
    generator.double()
    condition = condition.double()
    check()
    generator.float()
    check()


def test_weights_behind_autograds_back_need_to_be_forgotten(generator: ParameterGenerator) -> None:
    condition = torch.randn(1, 4, 7)
    fast = FastGenerator(generator)
    fast(condition)
    generator.norm_tokens.weight.data.mul_(2)
    fast.forget()
    assert fast.workspace.nbytes == 0
    assert difference(fast(condition), generator(condition)) < 1e-5


def test_inference_mode_and_plain_calls_mix(generator: ParameterGenerator) -> None:
    condition = torch.randn(1, 4, 7)
    fast = FastGenerator(generator)
    with torch.inference_mode():
        first = fast(condition)
        made_there = FastGenerator(copy.deepcopy(generator))
        for _ in range(2):
            assert difference(made_there(condition), first) < 1e-6
            with torch.no_grad():
                for parameter in made_there.generator.parameters():
                    parameter.add_(0)  # not counted by torch: everything is made anew
    assert difference(fast(condition), generator(condition)) < 1e-5


def test_results_do_not_change_with_later_calls(generator: ParameterGenerator) -> None:
    fast = FastGenerator(generator)
    first = fast(torch.randn(2, 4, 7))
    kept = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    fast(torch.randn(2, 4, 7))
    fast.workspace.poison()
    assert all(torch.equal(tensor, kept[key]) for key, tensor in first.state_dict().items())


def test_workspace_is_bounded_by_the_piece() -> None:
    config = odd_config()
    generator = ParameterGenerator(config)
    limit = 64 * 1024
    fast = FastGenerator(generator, FastOptions(chunk_bytes=limit))
    fast(torch.randn(1, 4, 7))
    stream = 5 * generator.layout.groups[0].positions_per_layer * config.d_model * 4
    condition = 2 * 4 * config.d_model * 4
    assert stream < fast.workspace.nbytes <= stream + condition + limit


def test_tables_are_bounded(generator: ParameterGenerator) -> None:
    fast = FastGenerator(generator)
    for length in range(1, 40):
        fast(torch.randn(1, length, 7))
    assert len(fast.tables) == fast.tables.kept


def test_threads_wait_for_one_another(generator: ParameterGenerator) -> None:
    fast = FastGenerator(generator)
    conditions = [torch.randn(1, 4, 7) for _ in range(4)]
    came: dict[int, list[Adapter]] = {}

    def work(number: int) -> None:
        came[number] = [fast(conditions[number]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, adapters in came.items():
        expected = generator(conditions[number])
        assert all(difference(adapter, expected) < 1e-5 for adapter in adapters)


def test_copies_have_their_own_memory(generator: ParameterGenerator) -> None:
    fast = FastGenerator(generator, FastOptions(chunk_layers=2))
    condition = torch.randn(1, 4, 7)
    expected = fast(condition)
    other = copy.deepcopy(fast)
    assert other.options == fast.options
    assert other.generator is not generator
    assert difference(other(condition), expected) == 0
    with torch.no_grad():
        other.generator.norm_final.weight.zero_()
    assert difference(fast(condition), expected) == 0


def test_no_gradients_and_the_same_refusals(generator: ParameterGenerator) -> None:
    fast = FastGenerator(generator.requires_grad_(True))
    assert not any(tensor.requires_grad for tensor in fast(torch.randn(1, 4, 7)).state_dict().values())
    with pytest.raises(ValueError, match=r"condition: expected \[b, L, 7\]"):
        fast(torch.randn(1, 4, 8))
    for name in ("chunk_bytes", "chunk_layers"):
        with pytest.raises(ValueError, match=f"{name}: expected a number above 0 or None, got 0"):
            FastOptions(**{name: 0})


def test_a_loaded_checkpoint_is_the_same_function(generator: ParameterGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path / "saved")
    loaded = ParameterGenerator.from_pretrained(tmp_path / "saved")
    condition = torch.randn(1, 4, 7)
    assert difference(FastGenerator(loaded)(condition), generator(condition)) < 1e-5
