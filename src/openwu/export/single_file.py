"""Write one sample as a LoRA file of diffusers (`pytorch_lora_weights`) or ComfyUI (`comfyui_lora.safetensors`).

ComfyUI's keys are `{stem}.lora_down.weight` `[r, in]`, `{stem}.lora_up.weight` `[out, r]` (convolutions
`[r, in, kh, kw]` and `[out, r, 1, 1]`) and the number `{stem}.alpha`; ComfyUI adds `alpha / r * up @ down` to the
weight. Which stems it knows depends on whose module names the targets carry (ComfyUI's `comfy/lora.py`, function
`model_lora_keys_unet`):

| component | stem | names |
|---|---|---|
| `diffusion_model` | `diffusion_model.{target}` | those of ComfyUI's own model (Qwen-Image's are diffusers' too) |
| `transformer` | `transformer.{target}` | diffusers' names, which ComfyUI translates for Flux, SD3, Qwen-Image, ... |
| `unet` | `lora_unet_{target, dots as underscores}` | diffusers' names of a UNet; ComfyUI translates them |

Shapes: r rank, kh and kw height and width of a convolution's kernel.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from openwu.errors import OpenwuError
from openwu.export.comfyui_names import family_of, unknown_names
from openwu.export.files import COMFYUI_WEIGHTS, DIFFUSERS_WEIGHTS, listed, write
from openwu.export.fit import folded, in_file_shape, refuse_all_but_plain_lora, single
from openwu.types import Adapter

DIFFUSERS_COMPONENTS = ("transformer", "unet")
"""Attributes of diffusers' pipelines that hold a denoiser."""


def save_diffusers(adapter: Adapter, folder: Path, model: nn.Module | None, component: str | None) -> None:
    """Write one sample. A convolution needs its `kernel`, which `model` tells where the targets do not."""
    component = DIFFUSERS_COMPONENTS[0] if component is None else component
    if component not in DIFFUSERS_COMPONENTS:
        raise OpenwuError(
            f"component: expected one of {', '.join(DIFFUSERS_COMPONENTS)} for diffusers, got {component!r}"
        )
    adapter = single(adapter, "diffusers", model)
    refuse_all_but_plain_lora(adapter, "diffusers")
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        a, b = in_file_shape(adapter, target)
        tensors[f"{component}.{target.name}.lora_A.weight"] = a
        tensors[f"{component}.{target.name}.lora_B.weight"] = folded(b, adapter.scale)
    write(folder, DIFFUSERS_WEIGHTS, tensors)


COMFYUI_COMPONENTS = ("diffusion_model", "transformer", "unet")


def save_comfyui(adapter: Adapter, folder: Path, model: nn.Module | None, component: str | None) -> None:
    """Write one sample. Raises OpenwuError for experts, for names that become equal without their dots, and for names
    of a known model (see `comfyui_names`) that ComfyUI would leave out."""
    family = family_of(model)
    if component is None:
        component = COMFYUI_COMPONENTS[0] if family is None else family.components[0]
    if component not in COMFYUI_COMPONENTS:
        raise OpenwuError(f"component: expected one of {', '.join(COMFYUI_COMPONENTS)} for comfyui, got {component!r}")
    adapter = single(adapter, "comfyui", model)
    refuse_all_but_plain_lora(adapter, "comfyui")
    names = [target.name for target in adapter.targets]
    if family is not None and (unknown := unknown_names(family, names, component)):
        raise OpenwuError(
            f"comfyui: ComfyUI does not know {len(unknown)} of {len(names)} modules and would leave them out: "
            f"{listed(unknown)}; it knows most names of {type(model).__name__}, with component="
            f"{family.components[0]!r}, got {component!r}: leave the others out, or merge the adapter into the weights"
        )
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        name = stem(target.name, component)
        if f"{name}.alpha" in tensors:
            raise OpenwuError(f"comfyui: {target.name}: another target is {name} too; use another component")
        a, b = in_file_shape(adapter, target)
        tensors[f"{name}.lora_down.weight"] = a
        tensors[f"{name}.lora_up.weight"] = b
        tensors[f"{name}.alpha"] = torch.tensor(adapter.scale * len(a), dtype=torch.float32)
    write(folder, COMFYUI_WEIGHTS, tensors)


def stem(name: str, component: str) -> str:
    """What a target's keys begin with."""
    return "lora_unet_" + name.replace(".", "_") if component == "unet" else f"{component}.{name}"
