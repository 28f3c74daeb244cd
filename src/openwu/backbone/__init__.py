"""Base models, one file per family. A base model never knows that adapters exist."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from openwu.errors import OpenwuError

if TYPE_CHECKING:
    from openwu.protocols import Backbone

BACKBONES: dict[str, str] = {
    "instruct-pix2pix": "openwu.backbone.instruct_pix2pix:InstructPix2Pix",
    "instruct-pix2pix-xl": "openwu.backbone.instruct_pix2pix_xl:InstructPix2PixXL",
    "flux-kontext": "openwu.backbone.flux_kontext:FluxKontext",
    "flux2-dev": "openwu.backbone.flux2:Flux2Dev",
    "flux2-klein": "openwu.backbone.flux2:Flux2Klein",
    "qwen-image-edit": "openwu.backbone.qwen_image_edit:QwenImageEdit",
    "qwen-image-edit-plus": "openwu.backbone.qwen_image_edit:QwenImageEditPlus",
    "qwen-image-21": "openwu.backbone.qwen_image_21:QwenImage21",
    "longcat-image-edit": "openwu.backbone.longcat_image_edit:LongCatImageEdit",
    "hunyuan-image-3": "openwu.backbone.hunyuan_image_3:HunyuanImage3",
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
