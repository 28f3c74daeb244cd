"""Which of diffusers' module names ComfyUI translates, by model family: facts found by running ComfyUI's own loader.

ComfyUI looks keys up in a table that its `model_lora_keys_unet` makes of its own model; what is not in the table, it
logs and leaves out. The rules here say which names of a diffusers denoiser are in it. They were compared with the
tables of ComfyUI 0.19.3 for a small model of every family: every linear module and convolution of diffusers' class,
and the shape of the (slice of the) weight that the name stands for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn


class Family(NamedTuple):
    """What ComfyUI knows of one of diffusers' denoisers."""

    components: tuple[str, ...]
    """Components under which it knows the names, the usual one first."""
    names: re.Pattern[str]
    """The names that it knows."""


_EMBEDDERS = r"x_embedder|context_embedder|norm_out\.linear|proj_out"
_TIME_AND_TEXT = r"time_text_embed\.(timestep|guidance|text)_embedder\.linear_[12]"
_ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_MLP = r"ff(_context)?\.net\.(0\.proj|2)"
_FLUX_BLOCKS = (
    rf"transformer_blocks\.\d+\.(norm1(_context)?\.linear|{_ATTENTION}|{_MLP})|"
    r"single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])"
)
_FLUX2_BLOCKS = (
    rf"transformer_blocks\.\d+\.({_ATTENTION}|ff(_context)?\.linear_(in|out))|"
    r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
_SD3_BLOCKS = rf"transformer_blocks\.\d+\.(norm1(_context)?\.linear|{_ATTENTION}|attn2\.(to_[qkv]|to_out\.0)|{_MLP})"
_UNET_PARTS = (
    r"conv_in|conv_out|(time|add|class)_embedding\.linear_[12]|"
    r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.("
    r"resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|"
    r"attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))|"
    r"(down|up)samplers\.0\.conv)"
)


def _family(components: Sequence[str], *names: str) -> Family:
    return Family(tuple(components), re.compile("|".join(names)))


FAMILIES: dict[str, Family] = {
    "FluxTransformer2DModel": _family(["transformer"], _EMBEDDERS, _TIME_AND_TEXT, _FLUX_BLOCKS),
    "LongCatImageTransformer2DModel": _family(["transformer"], _EMBEDDERS, _FLUX_BLOCKS),
    "Flux2Transformer2DModel": _family(["transformer"], _EMBEDDERS, _FLUX2_BLOCKS),
    "QwenImageTransformer2DModel": _family(
        ["transformer", "diffusion_model", "unet"],
        r"img_in|txt_in|norm_out\.linear|proj_out|time_text_embed\.timestep_embedder\.linear_[12]",
        rf"transformer_blocks\.\d+\.((img|txt)_mod\.1|{_ATTENTION}|(img|txt)_mlp\.net\.(0\.proj|2))",
    ),
    "SD3Transformer2DModel": _family(
        ["transformer"], r"pos_embed\.proj|context_embedder|norm_out\.linear|proj_out", _TIME_AND_TEXT, _SD3_BLOCKS
    ),
    "UNet2DConditionModel": _family(["unet"], _UNET_PARTS),
}
"""Class of a diffusers denoiser -> its family."""


def family_of(model: nn.Module | None) -> Family | None:
    """What ComfyUI knows of a model's names; None for models that are not in the table."""
    return None if model is None else FAMILIES.get(type(model).__name__)


def unknown_names(family: Family, names: Sequence[str], component: str) -> list[str]:
    """The names that ComfyUI does not translate under a component; all of them where it is the wrong one."""
    return list(names) if component not in family.components else [n for n in names if not family.names.fullmatch(n)]
