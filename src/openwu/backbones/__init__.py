"""Base models, one file per family. A base model never knows that adapters exist."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from openwu.errors import OpenwuError

if TYPE_CHECKING:
    from openwu.backbones.protocol import Backbone

BACKBONES: dict[str, str] = {
    "instruct-pix2pix": "openwu.backbones.diffusers.instruct_pix2pix:InstructPix2Pix",
    "instruct-pix2pix-xl": "openwu.backbones.diffusers.instruct_pix2pix:InstructPix2PixXL",
    "flux-kontext": "openwu.backbones.diffusers.flux_kontext:FluxKontext",
    "flux2-dev": "openwu.backbones.diffusers.flux2:Flux2Dev",
    "flux2-klein": "openwu.backbones.diffusers.flux2:Flux2Klein",
    "qwen-image-edit": "openwu.backbones.diffusers.qwen_image_edit:QwenImageEdit",
    "qwen-image-edit-plus": "openwu.backbones.diffusers.qwen_image_edit:QwenImageEditPlus",
    "qwen-image-21": "openwu.backbones.diffusers.qwen_image_21:QwenImage21",
    "longcat-image-edit": "openwu.backbones.diffusers.longcat_image_edit:LongCatImageEdit",
    "hunyuan-image-3": "openwu.backbones.hunyuan_image_3.base:HunyuanImage3",
}
"""Name -> "module:Class" of a `protocols.Backbone`. One line adds a base; docs/adding-a-base.md says how."""


def backbone_class(name: str) -> type[Backbone]:
    """The class of a base, imported on first use; its module must not import the base's libraries until it loads."""
    if name not in BACKBONES:
        raise OpenwuError(
            f"model: expected one of {', '.join(BACKBONES)}, got {name!r}; `openwu models` describes them"
        )
    module, _, attribute = BACKBONES[name].partition(":")
    found: type[Backbone] = getattr(importlib.import_module(module), attribute)
    return found
