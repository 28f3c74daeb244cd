"""Modules, inputs and row numbers that adapters do not fit: adapted right, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adapter_cases import random_adapter
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.adapters.merge import check_applied, merged_copy
from openwu.errors import TargetError
from openwu.types import Adapter, Target

TARGET = Target("0", 6, 5)
X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Keyword(nn.Linear):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class WithLora(nn.Linear):
    """Somebody else's update in a forward of its own: does not depend on the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., :5].tanh()


class Upcast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.double(), self.weight.double(), self.bias.double()).to(x.dtype)


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (2, 0, 2, 0)))


def applied(model: nn.Module, adapter: Adapter, *args: Any, **kwargs: Any) -> Tensor:
    with attach(model, adapter.targets) as handle, handle.applied(adapter):
        y: Tensor = model[0](*args, **kwargs)
    return y


@pytest.mark.parametrize("kind", [Doubled, Activated])
def test_a_forward_that_does_more_than_the_weight_is_refused(kind: type[nn.Linear]) -> None:
    model, adapter = nn.Sequential(kind(6, 5)), random_adapter([TARGET], 1, dtype=torch.float32)
    for _ in range(2):
        with pytest.raises(TargetError, match=rf"0: {kind.__name__} has a forward of its own"):
            applied(model, adapter, X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Keyword, WithLora, Upcast])
def test_a_forward_of_its_own_is_adapted_where_it_computes_with_the_weight(
    kind: type[nn.Linear], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, adapter = nn.Sequential(kind(6, 5)).to(dtype), random_adapter([TARGET], 1, dtype=dtype)
    came, expected = applied(model, adapter, X.to(dtype)), merged_copy(model, adapter)[0](X.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(came, expected, rtol=tolerance, atol=tolerance)


def test_a_convolution_that_pads_by_itself_is_refused() -> None:
    target = Target("0", 27, 5, kernel=(3, 3))
    with pytest.raises(TargetError, match="0: Padded has a forward of its own"):
        applied(
            nn.Sequential(Padded(3, 5, 3)), random_adapter([target], 1, dtype=torch.float32), X.new_ones(1, 3, 8, 8)
        )


def test_inputs_by_keyword_and_outputs_that_are_no_tensor() -> None:
    torch.manual_seed(0)
    adapter = random_adapter([TARGET], 1, dtype=torch.float32)
    keyword = nn.Sequential(Keyword(6, 5))
    assert torch.equal(applied(keyword, adapter, hidden_states=X), applied(keyword, adapter, X))
    with pytest.raises(TargetError, match=r"0: expected .* Pair got Tensor and returned tuple"):
        applied(nn.Sequential(Pair(6, 5)), adapter, X)


def test_an_input_of_one_dimension() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = random_adapter([TARGET], 1, dtype=torch.float32)
    torch.testing.assert_close(applied(model, adapter, X[0, 0]), merged_copy(model, adapter)(X[0, 0]))
    with pytest.raises(TargetError, match=r"is for 2 rows, but the module's input has shape \(6,\)"):
        applied(model, random_adapter([TARGET], 2, dtype=torch.float32), X[0, 0])


WRONG = [
    [True, False],
    torch.tensor([True, False]),
    np.array([True, False]),
    [0.9, 0.3],
    [-0.5, 1],
    torch.tensor([0.0, 1.0]),
    torch.tensor([[0, 1]]),
    torch.tensor(0),
    ["0", "1"],
    "01",
    [None, 0],
    [float("nan"), 0],
    [[0], [1]],
    {0, 1},
    {0: 1, 1: 0},
    1,
]


@pytest.mark.parametrize("values", WRONG, ids=repr)
def test_rows_and_segments_are_whole_numbers(values: Any) -> None:
    model, adapter = nn.Sequential(nn.Linear(6, 5)), random_adapter([TARGET], 2, dtype=torch.float32)
    with attach(model, [TARGET]) as handle:
        with pytest.raises(TargetError, match=r"rows: expected .*whole numbers"), handle.applied(adapter, values):
            pass
        with pytest.raises(TargetError, match="segments: expected"), handle.applied(adapter, segments=values):
            pass
        with handle.applied(adapter, [0, 1]):
            model(X)


@pytest.mark.parametrize("rows", [torch.tensor([1, 0]), np.array([1, 0]), range(1, -1, -1), (np.int64(1), 0)])
def test_whole_numbers_of_every_kind_are_rows(rows: Any) -> None:
    torch.manual_seed(0)
    model, adapter = nn.Sequential(nn.Linear(6, 5)), random_adapter([TARGET], 2, dtype=torch.float32)
    with attach(model, [TARGET]) as handle:
        with handle.applied(adapter, [1, 0]):
            expected = model(X)
        with handle.applied(adapter, rows):
            assert torch.equal(model(X), expected)


def test_layers_that_put_tokens_first_are_refused_for_several_samples() -> None:
    """As many tokens as samples, so that shapes do not tell."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0))
    targets = [Target("0.linear1", 6, 8), Target("0.linear2", 8, 6)]
    x, one, two = torch.randn(2, 2, 6), *(random_adapter(targets, n, dtype=torch.float32) for n in (1, 2))
    with attach(model, targets) as handle:
        with handle.applied(one):
            torch.testing.assert_close(model(x), merged_copy(model, one)(x))
        with pytest.raises(TargetError, match=r"0\.linear1: .* 0 has batch_first=False"), handle.applied(two):
            model(x)


def test_the_output_projection_of_torchs_attention_can_be_merged_alone() -> None:
    model, targets = nn.MultiheadAttention(6, 2), [Target("out_proj", 6, 6)]
    with pytest.raises(TargetError, match=r"out_proj: nn\.MultiheadAttention computes with its weight"):
        attach(model, targets)
    assert merged_copy(model, random_adapter(targets, 1, dtype=torch.float32)).out_proj is not model.out_proj


def test_a_compiled_model_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(TargetError, match="attach to its _orig_mod before it runs"):
        attach(compiled, [TARGET])
    attach(model, [TARGET]).detach()


class Twice(nn.Module):
    """Calls a layer once as a module, and once some other way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(6, 6), way

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(x))
        if self.way == "forward":
            return self.layer.forward(x)
        if self.way == "weight":
            return nn.functional.linear(x, self.layer.weight, self.layer.bias)
        return self.layer(x)


def test_a_layer_that_is_reached_in_part_is_refused_in_the_check() -> None:
    torch.manual_seed(0)
    targets = [Target("layer", 6, 6)]
    adapter = random_adapter(targets, 2, dtype=torch.float32)
    check_applied(Twice("module"), adapter, lambda model: model(X))
    for way in ("forward", "weight"):
        with pytest.raises(TargetError, match=r"(?s)merge the adapter.*layer: torch's linear\(\) got its weight"):
            check_applied(Twice(way), adapter, lambda model: model(X))


def test_the_check_takes_a_handle_that_is_attached() -> None:
    model, adapter = nn.Sequential(nn.Linear(6, 5)), random_adapter([TARGET], 1, dtype=torch.float32)
    check_applied(model, adapter, lambda held: held(X))
    with attach(model, [TARGET]) as handle:
        check_applied(model, adapter, lambda held: held(X), handle=handle)
