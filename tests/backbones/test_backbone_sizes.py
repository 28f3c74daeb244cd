"""Layer groups of the published architectures, built without memory: how many weights, how many generated numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openwu.backbones import backbone_class
from openwu.editor.compatibility import target_widths

RANK = 16


def denoiser(name: str) -> Any:
    from diffusers import (
        Flux2Transformer2DModel,
        FluxTransformer2DModel,
        QwenImage21Transformer2DModel,
        QwenImageTransformer2DModel,
        UNet2DConditionModel,
    )

    with torch.device("meta"):
        if name == "instruct-pix2pix":
            return UNet2DConditionModel(in_channels=8, cross_attention_dim=768, attention_head_dim=8)
        if name == "flux-kontext":
            return FluxTransformer2DModel(guidance_embeds=True)
        if name.startswith("qwen"):
            return QwenImage21Transformer2DModel() if name == "qwen-image-21" else QwenImageTransformer2DModel()
        small = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
        return Flux2Transformer2DModel(**(small if name == "flux2-klein" else {}))


@pytest.mark.parametrize(
    ("name", "layers", "weights", "numbers"),
    [
        ("instruct-pix2pix", [5, 5, 6], 160, 6.0e6),
        ("flux-kontext", [19, 38], 418, 65e6),
        ("flux2-klein", [5, 20], 100, 24e6),
        ("flux2-dev", [8, 48], 192, None),
        ("qwen-image-edit", [1, 59], 60 * 12 - 4, 106e6),
        ("qwen-image-21", [32], 224, 42e6),
    ],
)
def test_published_sizes(name: str, layers: list[int], weights: int, numbers: float | None) -> None:
    kind: Any = backbone_class(name)
    base = object.__new__(kind)
    base.pipeline = SimpleNamespace(**{kind.denoiser_name: denoiser(name)})
    groups = base.layer_groups()
    assert sorted(group.num_layers for group in groups) == sorted(layers)
    widths = target_widths(groups)
    assert len(widths) == weights
    if numbers is not None:
        assert sum(RANK * (a + b) for a, b, _ in widths.values()) == pytest.approx(numbers, rel=0.02)
