"""Pipelines with random weights whose text encoder sees pictures: Qwen-VL with a picture tower of one or two layers.

The processors are assembled from their parts, since their own constructors ask for a video processor, and that for
torchvision.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_pipelines import CHAT, autoencoder, byte_letters

MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WIDTH = 16


def tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    words = [*byte_letters(), "<|endoftext|>", *MARKS]
    vocab = {word: number for number, word in enumerate(words)}
    made = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=list(MARKS))
    made.chat_template = CHAT
    return made


def marks(made: Any) -> dict[str, int]:
    """The ids that a config of Qwen-VL names."""
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    return {name: made.convert_tokens_to_ids(mark) for name, mark in names.items()}


def processor(kind: str, patch: int) -> Any:
    """`Qwen2VLProcessor` or `Qwen3VLProcessor` without a video processor."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    made = object.__new__(getattr(transformers, kind))
    made.tokenizer = tokenizer()
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 2**20}
    made.image_processor = Qwen2VLImageProcessorPil(patch_size=patch, size=size)
    made.video_processor = None
    made.image_token, made.video_token = "<|image_pad|>", "<|video_pad|>"
    made.image_token_id, made.video_token_id = (
        made.tokenizer.convert_tokens_to_ids(mark) for mark in (made.image_token, made.video_token)
    )
    made.chat_template = CHAT
    return made


def attentive(model: Any) -> Any:
    """Enlarge queries and keys: a random model attends uniformly, so that positions matter little."""
    for layer in model.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 10
    return model


def qwen25_vl() -> Any:
    """Qwen2.5-VL that sees patches of 14 pixels; a token is 2 x 2 of them."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "patch_size": 14,
            "out_hidden_size": WIDTH, "fullatt_block_indexes": [0],
        },
        **marks(tokenizer()),
    )  # fmt: skip
    return attentive(Qwen2_5_VLForConditionalGeneration(config))


def qwen_image_parts(**transformer: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    return {
        "vae": AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.1, 0.9, 1.3],
        ),
        "transformer": QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), **transformer,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        "text_encoder": qwen25_vl(),
        "tokenizer": tokenizer(),
        "processor": processor("Qwen2VLProcessor", 14),
    }  # fmt: skip


def qwen_image_edit() -> Any:
    from diffusers import QwenImageEditPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return QwenImageEditPipeline(**qwen_image_parts())


def qwen_image_edit_plus() -> Any:
    """With the modulation of 2511: tokens that are no noise have time 0."""
    from diffusers import QwenImageEditPlusPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return QwenImageEditPlusPipeline(**qwen_image_parts(zero_cond_t=True))


def longcat_image_edit() -> Any:
    """Instructions of 48 tokens at most instead of 512."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        LongCatImageEditPipeline,
        LongCatImageTransformer2DModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = LongCatImageEditPipeline(
            vae=autoencoder(channels=16, scaling_factor=0.36, shift_factor=0.11),
            transformer=LongCatImageTransformer2DModel(
                in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 6, 6],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_encoder=qwen25_vl(), tokenizer=tokenizer(), text_processor=processor("Qwen2VLProcessor", 14),
        )  # fmt: skip
        pipeline.tokenizer_max_length = 48
        return pipeline


def qwen3_vl() -> Any:
    """Build a Qwen3-VL with patches of 16 pixels; a token is 2 x 2 of them, and is added anew after layer 1."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 320, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "patch_size": 16,
            "out_hidden_size": WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        **marks(tokenizer()),
    )  # fmt: skip
    return attentive(Qwen3VLForConditionalGeneration(config))


def qwen_image_21(**pipeline: Any) -> Any:
    """Latents of a sixteenth of the sides, without patches."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return QwenImage21Pipeline(
            vae=AutoencoderKLQwenImage21(
                base_dim=8, decoder_base_dim=None, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
                latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.1, 0.9, 1.3],
            ),
            transformer=QwenImage21Transformer2DModel(
                in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
                context_in_dim=WIDTH, axes_dims_rope=(4, 6, 6),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_encoder=qwen3_vl(), processor=processor("Qwen3VLProcessor", 16), **pipeline,
        )  # fmt: skip
