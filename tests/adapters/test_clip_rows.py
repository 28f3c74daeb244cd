"""Denoisers of video pipelines: all latent frames of a clip lie in one row, so a clip's adapter reaches all of them.

Tiny random weights of what diffusers' LucyEditPipeline, WanVACEPipeline and LTX2InContextPipeline denoise with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from adapter_cases import random_adapter
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.errors import TargetError
from openwu.types import Target

FRAMES, SIDE, WORDS = 3, 4, 5
TOKENS = FRAMES * (SIDE // 2) ** 2
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}


@dataclass(frozen=True)
class Denoiser:
    """A video denoiser, and a call of it for some of two clips: `[b, frames, numbers]`."""

    module: nn.Module
    call: Callable[[list[int]], Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan(kind: str, channels: int, **more: Any) -> Denoiser:
    """Latents `[b, c, f, h, w]`; Lucy-Edit's have those of the source clip beside them."""
    diffusers = pytest.importorskip("diffusers")
    module = getattr(diffusers, kind)(
        in_channels=channels, out_channels=4, num_layers=2, rope_max_seq_len=32, **WAN, **more
    ).eval()
    latents, words = drawn(2, channels, FRAMES, SIDE, SIDE), drawn(2, WORDS, 16, seed=1)
    control = drawn(2, 6, FRAMES, SIDE, SIDE, seed=2)

    def call(rows: list[int]) -> Tensor:
        given = {"control_hidden_states": control[rows]} if "VACE" in kind else {}
        (out,) = module(
            hidden_states=latents[rows],
            timestep=torch.full((len(rows),), 500),
            encoder_hidden_states=words[rows],
            return_dict=False,
            **given,
        )
        return out.transpose(1, 2).flatten(2)

    return Denoiser(module, call)


def lucy() -> Denoiser:
    return wan("WanTransformer3DModel", 8)


def vace() -> Denoiser:
    return wan("WanVACETransformer3DModel", 4, vace_layers=[0], vace_in_channels=6)


def ltx2() -> Denoiser:
    """Tokens `[b, frames * h * w, c]`, and a few of the sound."""
    diffusers = pytest.importorskip("diffusers")
    module = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    ).eval()
    latents, words, sound = drawn(2, TOKENS, 4), drawn(2, WORDS, 16, seed=1), drawn(2, 4, 4, seed=2)

    def call(rows: list[int]) -> Tensor:
        out = module(
            hidden_states=latents[rows],
            audio_hidden_states=sound[rows],
            encoder_hidden_states=words[rows],
            audio_encoder_hidden_states=words[rows],
            timestep=torch.full((len(rows), TOKENS), 500.0),
            audio_timestep=torch.full((len(rows), 4), 500.0),
            num_frames=FRAMES,
            height=SIDE // 2,
            width=SIDE // 2,
            audio_num_frames=4,
            return_dict=False,
        )[0]
        return out.unflatten(1, (FRAMES, -1)).flatten(2)

    return Denoiser(module, call)


DENOISERS = {"lucy": (lucy, "blocks"), "wan-vace": (vace, "vace_blocks"), "ltx2": (ltx2, "transformer_blocks")}


def linear_targets(module: nn.Module, within: str) -> list[Target]:
    """Attention's queries and values, and the first map of the feed-forward layers."""
    return [
        Target(name, each.in_features, each.out_features)
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear)
        and name.startswith(within)
        and name.endswith(("attn1.to_q", "attn1.to_v", "attn2.to_q", "ffn.net.0.proj", "ff.net.0.proj"))
        and "audio" not in name
    ]


@pytest.fixture(params=sorted(DENOISERS))
def denoiser(request: pytest.FixtureRequest) -> tuple[Denoiser, list[Target]]:
    make, within = DENOISERS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make()
        with torch.no_grad():
            for parameter in made.module.parameters():
                if not parameter.any():  # output maps that begin at zero would hide everything
                    parameter.normal_(std=0.1)
    return made, linear_targets(made.module, within)


@torch.no_grad()
def test_two_clips_of_a_batch_have_an_adapter_each_in_all_of_their_frames(
    denoiser: tuple[Denoiser, list[Target]],
) -> None:
    made, targets = denoiser
    assert len(targets) >= 4
    adapter = random_adapter(targets, 2, scale=0.2, dtype=torch.float32)
    plain = made.call([0, 1])
    with attach(made.module, targets) as handle:
        with handle.applied(adapter):
            both = made.call([0, 1])
        for clip in (0, 1):
            with handle.applied(adapter.select([clip])):
                assert torch.allclose(both[[clip]], made.call([clip]), atol=1e-4)
        # Stacked guidance: both rows are one clip's; and one without an adapter.
        with handle.applied(adapter, rows=[1, -1]):
            mixed = made.call([1, 1])
        assert torch.allclose(mixed[0], both[1], atol=1e-4)
        assert torch.allclose(mixed[1], plain[1], atol=1e-4)
    changes = (both - plain).abs().amax(-1)
    assert changes.shape == (2, FRAMES)
    assert bool((changes > 1e-4).all())
    assert torch.equal(made.call([0, 1]), plain)


def test_a_target_that_the_denoiser_lacks_is_refused(denoiser: tuple[Denoiser, list[Target]]) -> None:
    made, targets = denoiser
    with pytest.raises(TargetError, match="missing"):
        attach(made.module, [*targets, Target("blocks.9.missing", 24, 24)])
