"""diffusers' LoRA folder: one sample's adapter enters, `pytorch_lora_weights.safetensors` is written.

Keys are `{component}.{target}.lora_A.weight` `[r, in]` and `.lora_B.weight` `[out, r]` (convolutions `[r, in, kh, kw]`
and `[out, r, 1, 1]`), where the component is the pipeline's attribute that holds the denoiser. There is no alpha: the
scale is multiplied into B, because a LoRA without alphas means `B A` to diffusers.

Shapes: r rank, kh and kw height and width of a convolution's kernel.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from openwu.adapter.export.files import DIFFUSERS_WEIGHTS, write
from openwu.adapter.export.fit import folded, in_file_shape, refuse_experts, single
from openwu.errors import OpenwuError
from openwu.types import Adapter

COMPONENTS = ("transformer", "unet")
"""Attributes of diffusers' pipelines that hold a denoiser."""


def save_diffusers(adapter: Adapter, folder: Path, model: nn.Module | None, component: str | None) -> None:
    """Write one sample. A convolution needs its `kernel`, which `model` tells where the targets do not."""
    component = COMPONENTS[0] if component is None else component
    if component not in COMPONENTS:
        raise OpenwuError(f"component: expected one of {', '.join(COMPONENTS)} for diffusers, got {component!r}")
    adapter = single(adapter, "diffusers", model)
    refuse_experts(adapter, "diffusers")
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        a, b = in_file_shape(adapter, target)
        tensors[f"{component}.{target.name}.lora_A.weight"] = a
        tensors[f"{component}.{target.name}.lora_B.weight"] = folded(b, adapter.scale)
    write(folder, DIFFUSERS_WEIGHTS, tensors)
