"""What the tests of exports share: random adapters, tiny pipelines of diffusers with random weights, their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.export.files import COMFYUI_WEIGHTS, DIFFUSERS_WEIGHTS, WEIGHTS
from openwu.export.proof import find_base
from openwu.types import Adapter, Target

FILES = {"peft": WEIGHTS, "diffusers": DIFFUSERS_WEIGHTS, "comfyui": COMFYUI_WEIGHTS}


def random_adapter(
    targets: Sequence[Target], batch: int = 1, *, scale: float = 0.3, dtype: torch.dtype = torch.float32
) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    pair = lambda t: tuple(torch.randn(s, generator=draw).to(dtype) for s in t.shapes(batch, 2).values())  # noqa: E731
    return Adapter.from_pairs(tuple(targets), {t.name: pair(t) for t in targets}, scale)


def targets_of(model: nn.Module, names: Sequence[str]) -> list[Target]:
    found = []
    for name in names:
        weight = model.get_submodule(name).weight
        found.append(Target(name, weight[0].numel(), len(weight)))
    return found


def answer(model: nn.Module, adapter: Adapter, run: Callable[[nn.Module], Tensor]) -> Tensor:
    with torch.no_grad(), attach(model, adapter.targets) as handle, handle.applied(adapter):
        return run(model)


def relative_error(came: Tensor, expected: Tensor) -> float:
    return float((came - expected).norm() / expected.norm())


def flux_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **absent)


def run_flux(transformer: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return transformer(
        hidden_states=torch.randn(1, 16, 4, generator=draw),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=draw),
        pooled_projections=torch.randn(1, 32, generator=draw),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )[0]


FLUX = (
    "proj_out",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.ff.net.0.proj",
    "single_transformer_blocks.0.attn.to_v",
    "single_transformer_blocks.0.proj_mlp",
)
"""`proj_out` is also how the name of a module ends that is not adapted."""


def unet_pipeline() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    absent = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    return StableDiffusionInstructPix2PixPipeline(
        unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False, **dict.fromkeys(absent)
    )


def run_unet(unet: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 8, 8, 8, generator=draw), torch.randn(1, 4, 8, generator=draw)
    return unet(sample, torch.tensor([3]), text, return_dict=False)[0]


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET = (
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.attentions.0.proj_in",
    f"{ATTENTION}.attn1.to_q",
    f"{ATTENTION}.attn2.to_out.0",
    f"{ATTENTION}.ff.net.0.proj",
)

PIPELINES = {
    "transformer": (flux_pipeline, run_flux, FLUX),
    "unet": (unet_pipeline, run_unet, UNET),
}


def adapter_of(folder: Path, component: str, dtype: torch.dtype = torch.float32) -> Adapter:
    base = find_base(folder / component)
    return random_adapter(targets_of(base.model, PIPELINES[component][2]), dtype=dtype)
