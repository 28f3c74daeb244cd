"""Adapters through whole video pipelines that are no bases here: Wan VACE, and LTX-2 in context, with random weights.

One adapter for a clip under `openwu.attach`, against the same adapter merged into the pipeline's denoiser.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from adapter_cases import random_adapter
from PIL import Image
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.adapters.merge import merged
from openwu.errors import TargetError
from openwu.types import Target

SIDE = 64
VACE_TARGETS = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_out.0", "ffn.net.0.proj")
LTX2_TARGETS = (*VACE_TARGETS[:4], "ff.net.0.proj", "ff.net.2")


def clip(frames: int) -> list[Image.Image]:
    """A gradient that moves."""
    picture = np.linspace(0, 255, SIDE * SIDE * 3).reshape(SIDE, SIDE, 3).astype(np.uint8)
    return [Image.fromarray(np.roll(picture, 3 * i, axis=1)) for i in range(frames)]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets_of(module: nn.Module, names: tuple[str, ...]) -> list[Target]:
    return [
        Target(name, each.in_features, each.out_features)
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear) and name.endswith(names) and "audio" not in name
    ]


@pytest.fixture(scope="module")
def vace() -> Any:
    return tiny_pipelines.wan_vace()


@pytest.fixture(scope="module")
def ltx2() -> Any:
    return tiny_pipelines.ltx2_in_context()


def edited_by_vace(pipeline: Any) -> Tensor:
    """`[5, 3, h, w]`; the pipeline takes one clip at a time, and calls its denoiser twice for guidance."""
    frames: Tensor = pipeline(
        video=clip(5), mask=[Image.new("L", (SIDE, SIDE), 255)] * 5, prompt_embeds=drawn(1, 8, 16, seed=0),
        negative_prompt_embeds=drawn(1, 8, 16, seed=1), height=SIDE, width=SIDE, num_frames=5, num_inference_steps=2,
        guidance_scale=4.0, output_type="pt", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    return frames[0]


def edited_by_ltx2(pipeline: Any, requests: list[int], *, extra_guidance: bool = False) -> Tensor:
    """Latents `[b, C, 2, h, w]` of edits of one clip, one for each request.

    Guidance stacks the rows: first all without, then all with the words. `extra_guidance`: two more calls of the
    denoiser, of b rows each.
    """
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    words = torch.cat([drawn(1, 8, 32, seed=request) for request in requests])
    mask = torch.ones(len(requests), 8, dtype=torch.long)
    latents: Tensor = pipeline(
        reference_conditions=[LTX2ReferenceCondition(clip(17))], prompt_embeds=words, prompt_attention_mask=mask,
        negative_prompt_embeds=torch.zeros_like(words), negative_prompt_attention_mask=mask,
        height=SIDE, width=SIDE, num_frames=17, num_inference_steps=2, guidance_scale=3.0,
        stg_scale=float(extra_guidance), audio_stg_scale=0.0, spatio_temporal_guidance_blocks=[1],
        modality_scale=2.0 if extra_guidance else 1.0, audio_modality_scale=1.0, output_type="latent",
        latents=torch.cat([drawn(1, 4, 2, 1, 1, seed=7)] * len(requests)), noise_scale=1.0,
        generator=[torch.Generator().manual_seed(0) for _ in requests],
    ).frames  # fmt: skip
    return latents


@torch.no_grad()
def test_one_adapter_goes_through_the_whole_of_wan_vace(vace: Any) -> None:
    targets = targets_of(vace.transformer, VACE_TARGETS)
    assert any(target.name.startswith("vace_blocks") for target in targets)
    adapter = random_adapter(targets, 1, scale=0.5, dtype=torch.float32)
    plain = edited_by_vace(vace)
    with attach(vace.transformer, targets) as handle, handle.applied(adapter):
        hooked = edited_by_vace(vace)
    with merged(vace.transformer, adapter):
        expected = edited_by_vace(vace)
    torch.testing.assert_close(hooked, expected, rtol=0, atol=1e-4)
    assert bool(((hooked - plain).abs().amax((1, 2, 3)) > 1e-3).all()), "every frame"
    assert torch.equal(edited_by_vace(vace), plain)


@torch.no_grad()
@pytest.mark.parametrize("extra_guidance", [False, True])
def test_one_adapter_goes_through_the_whole_of_ltx2_in_context(ltx2: Any, extra_guidance: bool) -> None:
    """With every guidance that it has: an adapter of one sample serves calls of two rows and of one."""
    targets = targets_of(ltx2.transformer, LTX2_TARGETS)
    adapter = random_adapter(targets, 1, scale=0.5, dtype=torch.float32)
    plain = edited_by_ltx2(ltx2, [0], extra_guidance=extra_guidance)
    with attach(ltx2.transformer, targets) as handle, handle.applied(adapter):
        hooked = edited_by_ltx2(ltx2, [0], extra_guidance=extra_guidance)
    with merged(ltx2.transformer, adapter):
        expected = edited_by_ltx2(ltx2, [0], extra_guidance=extra_guidance)
    torch.testing.assert_close(hooked, expected, rtol=0, atol=1e-3)
    assert float((hooked - plain).abs().max()) > 1e-2


@torch.no_grad()
def test_two_edits_of_a_clip_share_a_call_of_ltx2(ltx2: Any) -> None:
    targets = targets_of(ltx2.transformer, LTX2_TARGETS)
    adapters = random_adapter(targets, 2, scale=0.5, dtype=torch.float32)
    with attach(ltx2.transformer, targets) as handle:
        with handle.applied(adapters, rows=[0, 1, 0, 1]):
            both = edited_by_ltx2(ltx2, [3, 4])
        for request in (0, 1):
            with handle.applied(adapters.select([request])):
                alone = edited_by_ltx2(ltx2, [3 + request])
            torch.testing.assert_close(both[[request]], alone, rtol=0, atol=1e-3)
        # Its further guidance calls the denoiser with fewer rows than the map has: said, and not guessed.
        with pytest.raises(TargetError, match="rows"), handle.applied(adapters, rows=[0, 1, 0, 1]):
            edited_by_ltx2(ltx2, [3, 4], extra_guidance=True)
