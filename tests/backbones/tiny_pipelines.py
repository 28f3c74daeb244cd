"""Real pipelines with random weights, small enough for a 64 x 64 edit in a second; tokenizers are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def byte_letters() -> list[str]:
    """The 256 characters by which byte-level tokenizers write bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    written = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [written[byte] for byte in range(256)]


def clip_tokenizer(length: int = 32) -> Any:
    from transformers import CLIPTokenizer

    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def clip_text_encoder(width: int = 16, length: int = 32) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, bos_token_id=512, eos_token_id=513, pad_token_id=513, projection_dim=width,
    )  # fmt: skip
    return CLIPTextModel(config)


def t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in letters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def t5_encoder(width: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5EncoderModel(config)


def siglip2(folder: Path) -> Path:
    """The folder of a SigLIP 2 that is no pipeline: a condition for any base."""
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

    layer = {"num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Siglip2Config(
            text_config={"vocab_size": 514, "hidden_size": 16, "intermediate_size": 32, "projection_size": 24,
                         "max_position_embeddings": 32, **layer},
            vision_config={"hidden_size": 24, "intermediate_size": 32, "num_patches": 256, "patch_size": 16, **layer},
        )  # fmt: skip
        Siglip2Model(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=16).save_pretrained(folder)
    return folder


def autoencoder(channels: int = 4, **more: Any) -> Any:
    """Latents of an eighth of the sides, as the published ones have."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8], norm_num_groups=4, latent_channels=channels, layers_per_block=1, **more,
    )  # fmt: skip


def instruct_pix2pix(**scheduler: Any) -> Any:
    """Widths of 8 and 16, so that there are two layer groups."""
    from diffusers import (
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=8, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
        )  # fmt: skip
        return StableDiffusionInstructPix2PixPipeline(
            vae=autoencoder(), text_encoder=clip_text_encoder(), tokenizer=clip_tokenizer(), unet=unet,
            scheduler=EulerAncestralDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                steps_offset=1, **scheduler,
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def instruct_pix2pix_xl(**changes: Any) -> Any:
    """Blocks of one and two transformer layers; the second text encoder is narrower than the first."""
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=8, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), transformer_layers_per_block=(1, 2),
            use_linear_projection=True, cross_attention_dim=24, attention_head_dim=2, norm_num_groups=4,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 8,
        )  # fmt: skip
        return StableDiffusionXLInstructPix2PixPipeline(
            vae=autoencoder(), text_encoder=clip_text_encoder(), tokenizer=clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(clip_text_encoder(width=8).config), tokenizer_2=clip_tokenizer(),
            unet=unet, add_watermarker=False,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                steps_offset=1,
            ),
            **changes,
        )  # fmt: skip


def flux_kontext(guidance_embeds: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
            guidance_embeds=guidance_embeds,
        )  # fmt: skip
        return FluxKontextPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=autoencoder(scaling_factor=0.36, shift_factor=0.11),
            text_encoder=clip_text_encoder(), tokenizer=clip_tokenizer(),
            text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(), transformer=transformer,
        )  # fmt: skip


def wan_autoencoder(**more: Any) -> Any:
    """Latents of an eighth of the sides and a quarter of the frames."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.1, 0.9, 1.0, 1.2], **more,
    )  # fmt: skip


def wan_text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}


def lucy_edit(expand_timesteps: bool = True) -> Any:
    from diffusers import LucyEditPipeline, UniPCMultistepScheduler, WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LucyEditPipeline(
            tokenizer=t5_tokenizer(), text_encoder=wan_text_encoder(), vae=wan_autoencoder(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
            ),
            transformer=WanTransformer3DModel(
                in_channels=8, out_channels=4, num_layers=2, rope_max_seq_len=64, **WAN
            ),
            expand_timesteps=expand_timesteps,
        )  # fmt: skip


def wan_vace() -> Any:
    """Control of 8 channels of latents and 8 x 8 of a mask."""
    from diffusers import UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanVACETransformer3DModel(
            in_channels=4, out_channels=4, num_layers=2, vace_layers=[0], vace_in_channels=2 * 4 + 64,
            rope_max_seq_len=64, **WAN,
        )  # fmt: skip
        for name, parameter in transformer.named_parameters():
            if "vace_blocks" in name and "proj_out" in name:  # begins at zero, and would hide the control
                parameter.data.normal_(std=0.2)
        pipeline = WanVACEPipeline(
            tokenizer=t5_tokenizer(), text_encoder=wan_text_encoder(), vae=wan_autoencoder(), transformer=transformer,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
            ),
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def ltx2_in_context() -> Any:
    """Without a text encoder: it is called with the states of prompts. Latents of a 64th of the sides."""
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2InContextPipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = LTX2InContextPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=AutoencoderKLLTX2Video(
                latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8),
                layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
            ),
            audio_vae=AutoencoderKLLTX2Audio(
                base_channels=8, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=16, resolution=32
            ),
            text_encoder=None, tokenizer=None,
            connectors=LTX2TextConnectors(
                caption_channels=16, text_proj_in_factor=2, rope_double_precision=False,
                **{f"{which}_connector_{name}": value for which in ("video", "audio") for name, value in heads.items()},
            ),
            transformer=LTX2VideoTransformer3DModel(
                in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
                audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
                audio_cross_attention_dim=16, num_layers=2, caption_channels=16,
            ),
            vocoder=LTX2Vocoder(
                in_channels=32, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
                resnet_kernel_sizes=[3], resnet_dilations=[[1]],
            ),
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    words = [*byte_letters(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHAT
    return tokenizer


def flux2_parts(text_width: int, guidance_embeds: bool, heads: int = 2) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        block_out_channels=[8, 8, 8, 8], norm_num_groups=4, latent_channels=4, layers_per_block=1
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-0.2, 0.2, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 1.5, 16))
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=heads, joint_attention_dim=3 * text_width, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler, "tokenizer": qwen_tokenizer()}


def flux2_klein(is_distilled: bool = False, heads: int = 2) -> Any:
    """As many thin layers in the text encoder as the pipeline's default layers need. The denoiser: 16 * heads wide."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=320, hidden_size=8, intermediate_size=16, num_hidden_layers=28, num_attention_heads=1,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        )  # fmt: skip
        parts = flux2_parts(8, guidance_embeds=False, heads=heads)
        return Flux2KleinPipeline(text_encoder=Qwen3ForCausalLM(config), is_distilled=is_distilled, **parts)


def flux2_dev() -> Any:
    """Mistral 3 with a picture tower that the pipeline never uses; a tokenizer stands for its processor."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Mistral3Config(
            text_config={
                "model_type": "mistral", "vocab_size": 320, "hidden_size": 8, "intermediate_size": 16,
                "num_hidden_layers": 31, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8,
                "max_position_embeddings": 512,
            },
            vision_config={
                "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 1, "head_dim": 8, "image_size": 32, "patch_size": 16,
            },
        )  # fmt: skip
        encoder = Mistral3ForConditionalGeneration(config)
        return Flux2Pipeline(text_encoder=encoder, **flux2_parts(8, guidance_embeds=True))
