"""Configs that the generator's tests share: the released size, and tiny ones that run in milliseconds."""

from __future__ import annotations

from typing import Any

import pytest

from openwu.config import GeneratorConfig, GroupedTarget, LayerGroup, PlainTarget


def _widths(in_dim: int, out_dim: int) -> dict[str, int]:
    return {"lora_A_dim": in_dim, "lora_B_dim": out_dim}


@pytest.fixture
def released_fields() -> dict[str, Any]:
    """`config.json` of the released checkpoint."""
    experts = {"w1": _widths(4096, 3072), "w2": _widths(3072, 4096), "w3": _widths(4096, 3072)}
    return {
        "model_type": "parameter_generator",
        "rank": 16,
        "alpha": 64,
        "token_dim": 1024,
        "output_dim": 1024,
        "input_dim": 4096,
        "d_model": 4096,
        "head_dim": 128,
        "dim_accumulation": 4,
        "num_base_model_layers": 32,
        "num_pg_layers": 24,
        "prefix": "model.layers.",
        "pg_mapping": {
            "self_attn.qkv_proj": _widths(4096, 6144),
            "self_attn.o_proj": _widths(4096, 4096),
            "mlp.shared_mlp.gate_and_up_proj": _widths(4096, 6144),
            "mlp.shared_mlp.down_proj": _widths(3072, 4096),
            "mlp.experts": {"type": "grouped", "num_experts": 64, "sub_weights": experts},
        },
    }


@pytest.fixture
def tiny_config() -> GeneratorConfig:
    """One group of three layers, in the released form."""
    targets = (PlainTarget("attn.qkv", 10, 30), PlainTarget("mlp.down", 24, 10))
    return _config((LayerGroup("layers.", 3, targets),))


@pytest.fixture
def groups_config() -> GeneratorConfig:
    """Groups of different widths: two layers with experts, three plain ones, and a single layer without an index."""
    experts = GroupedTarget("experts", 2, (PlainTarget("w1", 6, 7), PlainTarget("w2", 7, 6)))
    return _config(
        (
            LayerGroup("down.", 2, (PlainTarget("conv", 9, 8), experts), name="wide"),
            LayerGroup("up.", 3, (PlainTarget("conv", 18, 4),), name="narrow"),
            LayerGroup(
                "head.", 1, (PlainTarget("conv1", 5, 3), PlainTarget("conv2", 3, 5)), name="head", indexed=False
            ),
        )
    )


def _config(groups: tuple[LayerGroup, ...]) -> GeneratorConfig:
    return GeneratorConfig(
        rank=4,
        alpha=8,
        token_dim=6,
        input_dim=5,
        d_model=16,
        head_dim=8,
        dim_accumulation=2,
        num_pg_layers=2,
        groups=groups,
    )
