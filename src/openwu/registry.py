"""Extension points by name: plain dicts name -> "module:Class", and the one function that resolves them.

One line here adds a base, a condition encoder, an operator, an export format, a benchmark or an editor to compare with;
the module behind it is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

DEFAULT_BASE = "embedded"
"""The base whose model comes inside the package."""

BASES: dict[str, str] = {
    "instruct-pix2pix": "openwu.backbones.diffusers.instruct_pix2pix:InstructPix2Pix",
    "instruct-pix2pix-xl": "openwu.backbones.diffusers.instruct_pix2pix:InstructPix2PixXL",
    "flux-kontext": "openwu.backbones.diffusers.flux_kontext:FluxKontext",
    "flux2-dev": "openwu.backbones.diffusers.flux2:Flux2Dev",
    "flux2-klein": "openwu.backbones.diffusers.flux2:Flux2Klein",
    "qwen-image-edit": "openwu.backbones.diffusers.qwen_image_edit:QwenImageEdit",
    "qwen-image-edit-plus": "openwu.backbones.diffusers.qwen_image_edit:QwenImageEditPlus",
    "qwen-image-21": "openwu.backbones.diffusers.qwen_image_21:QwenImage21",
    "lucy-edit": "openwu.backbones.diffusers.lucy_edit:LucyEdit",
    "longcat-image-edit": "openwu.backbones.diffusers.longcat_image_edit:LongCatImageEdit",
    "hunyuan-image-3": "openwu.backbones.hunyuan_image_3.base:HunyuanImage3",
    "embedded": "openwu.backbones.embedded.base:EmbeddedBase",
}
"""Base models: classes that inherit from `openwu.backbones.protocol.Backbone`; docs/adding-a-base.md says how."""

CONDITION_ENCODERS: dict[str, str] = {
    "base": "openwu.conditions.segments:BaseCondition",
    "denoiser-states": "openwu.conditions.denoiser_states:DenoiserStates",
    "part-states": "openwu.conditions.part_states:PartStates",
    "segments": "openwu.conditions.segments:Segments",
    "siglip2": "openwu.conditions.siglip2:Siglip2",
}
"""Condition encoders that replace a base's own: classes that inherit from `openwu.conditions.Encoder`."""

OPERATORS: dict[str, str] = {
    "lora": "openwu.adapters.operators.lora:Lora",
    "scale": "openwu.adapters.operators.scale_offset:Scale",
    "offset": "openwu.adapters.operators.scale_offset:Offset",
    "scale_offset": "openwu.adapters.operators.scale_offset:ScaleOffset",
    "rotation": "openwu.adapters.operators.rotation:Rotation",
    "dora": "openwu.adapters.operators.dora:Dora",
    "basis_diagonal": "openwu.adapters.operators.basis:BasisDiagonal",
    "basis_matrix": "openwu.adapters.operators.basis:BasisMatrix",
    "basis_mixture": "openwu.adapters.operators.basis:BasisMixture",
    "prefix": "openwu.adapters.operators.prefix:Prefix",
}
"""Operators, as a `Target` and a generator's config name them: classes that inherit from
`openwu.adapters.operators.Operator`; docs/adding-an-operator.md says how."""

EXPORT_FORMATS: dict[str, str] = {
    "openwu": "openwu.export.native:save_native",
    "peft": "openwu.export.peft:save_peft",
    "diffusers": "openwu.export.single_file:save_diffusers",
    "comfyui": "openwu.export.single_file:save_comfyui",
}
"""Formats of adapter folders: functions that write one; docs/adding-an-export-format.md says how."""

BENCHMARKS: dict[str, str] = {
    "gedit": "openwu.evaluation.benchmarks.gedit:load",
    "imgedit": "openwu.evaluation.benchmarks.imgedit:load",
    "own": "openwu.evaluation.benchmarks.own:load",
    "real": "openwu.evaluation.benchmarks.real:load",
    "cases": "openwu.evaluation.benchmarks.listing:load",
}
"""Benchmarks: functions (folder, working folder, partial) -> cases."""

SYSTEMS: dict[str, str] = {
    "gpt-image-1.5": "openwu.evaluation.systems.openai_images:gpt_image_15",
    "gpt-image-2": "openwu.evaluation.systems.openai_images:gpt_image_2",
    "openai-compatible": "openwu.evaluation.systems.openai_images:compatible",
    "nano-banana-2": "openwu.evaluation.systems.gemini:nano_banana_2",
    "nano-banana-pro": "openwu.evaluation.systems.gemini:nano_banana_pro",
    "seedream-4.5": "openwu.evaluation.systems.seedream:seedream_45",
    "step1x-edit": "openwu.evaluation.systems.local:step1x_edit",
    "qwen-image-edit": "openwu.evaluation.systems.local:qwen_image_edit",
    "qwen-image-edit-2511": "openwu.evaluation.systems.local:qwen_image_edit_2511",
    "longcat-image-edit": "openwu.evaluation.systems.local:longcat_image_edit",
    "flux2-dev": "openwu.evaluation.systems.local:flux2_dev",
    "flux-kontext": "openwu.evaluation.systems.local:flux_kontext",
    "input": "openwu.evaluation.systems.restorers:copy_input",
    "unsharp": "openwu.evaluation.systems.restorers:unsharp",
    "nlm": "openwu.evaluation.systems.restorers:nlm",
    "bm3d": "openwu.evaluation.systems.restorers:bm3d",
    "realesrgan": "openwu.evaluation.systems.restorers:realesrgan",
    "realesrgan-small": "openwu.evaluation.systems.restorers:realesrgan_small",
}
"""Editors to compare with: functions that make a `openwu.evaluation.systems.System` from `SystemOptions`."""

ADAPTER_READER = "openwu.export.read:load_adapter"
"""The function that reads an adapter in any format."""

OPERATOR_OF = "openwu.adapters.operators:operator_of"
"""The function that finds an operator by its name."""


def module_of(path: str) -> str:
    """Return the module of "module:name"."""
    return path.partition(":")[0]


def resolve(path: str) -> Any:
    """Import "module:name" and return the object of that name."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f'path: expected "module:name", got {path!r}')
    return getattr(importlib.import_module(module), name)
