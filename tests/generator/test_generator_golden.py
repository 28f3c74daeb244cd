"""The generator against golden vectors: the same function as the specification, in float32 and bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openwu.config import GeneratorConfig
from openwu.generator.checkpoint import written_name
from openwu.generator.model import ParameterGenerator

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["generator_dense", "generator_experts"]
FLOAT32_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 0.03
"""Measured 0.017 at most, relative to a tensor's largest element: weights, condition and activations are rounded."""


def load_golden(name: str, dtype: torch.dtype = torch.float32) -> tuple[ParameterGenerator, Tensor, dict[str, Tensor]]:
    """The generator with the golden weights, the condition, and the expected outputs."""
    config = GeneratorConfig.from_dict(json.loads((GOLDEN / f"{name}.config.json").read_text()))
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    generator = ParameterGenerator(config)
    weights = {own: tensors[f"weights/{written_name(own, config)}"] for own in generator.state_dict()}
    assert len(weights) == sum(key.startswith("weights/") for key in tensors)
    generator.load_state_dict(weights)
    outputs = {key.removeprefix("output/"): tensor for key, tensor in tensors.items() if key.startswith("output/")}
    return generator.to(dtype), tensors["condition"].to(dtype), outputs


def relative_errors(came: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest difference / largest element, norm of the difference / norm)"""
    came, expected = came.double(), expected.double()
    difference = came - expected
    return float(difference.abs().max() / expected.abs().max()), float(difference.norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("samples", [slice(0, 2), slice(0, 1), slice(1, 2)], ids=["both", "first", "second"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, FLOAT32_TOLERANCE), (torch.float64, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE)],
)
def test_generator_computes_the_golden_adapter(name: str, samples: slice, dtype: torch.dtype, tolerance: float) -> None:
    generator, condition, expected = load_golden(name, dtype)
    scale = expected.pop("scale")
    with torch.no_grad():
        adapter = generator(condition[samples])
    came = adapter.state_dict()
    assert set(came) == set(expected)
    assert adapter.scale == generator.scale == float(scale)
    for key, tensor in came.items():
        assert tensor.dtype == dtype
        errors = relative_errors(tensor, expected[key][samples])
        assert max(errors) < tolerance, f"{key}: {errors}"


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_in_layer_and_mapping_order(name: str) -> None:
    generator, _, expected = load_golden(name)
    names = [target.name for target in generator.targets]
    assert {f"{name}.lora_A" for name in names} == {key for key in expected if key.endswith("lora_A")}
    config = generator.config
    assert names == [
        f"model.layers.{layer}.{weight[0]}"
        for layer in range(config.groups[0].num_layers)
        for weight in config.groups[0].weights()
    ]
