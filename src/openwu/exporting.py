"""Export of an adapter with proof: an adapter and its base enter, a folder that the target library reads leaves.

The export is written beside its place, reloaded there by the library (PEFT, diffusers) or, for ComfyUI, which is no
library, by a resolver that does what ComfyUI does with keys. Every adapted module then answers the same random input
with the reloaded adapter and with live injection. Only what agrees takes its place.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from openwu.adapter.export.files import replaced
from openwu.adapter.export.fit import single
from openwu.adapter.inject import resolve
from openwu.backbone.lora_reload import INDEX, denoiser_name, read_pipeline
from openwu.embedded import WEIGHTS, EmbeddedModel
from openwu.errors import CheckpointError, TargetError
from openwu.reloading import CHECKS, LIBRARIES, Base, Live, check_native
from openwu.types import Adapter

CONFIG = "config.json"


@dataclass(frozen=True)
class Outcome:
    """What became of an export."""

    checked: bool
    told: str
    """What was compared and how well it agreed, or why nothing was."""


def find_base(folder: Path | None) -> Base:
    """The base in a folder: a diffusers pipeline or an embedded model; of None, the embedded model inside the package.

    Raises CheckpointError, or ImportError where the folder needs a library that is not there.
    """
    if folder is not None and (folder / INDEX).is_file():
        component = denoiser_name(folder)
        pipeline = read_pipeline(folder, component)
        return Base(getattr(pipeline, component).requires_grad_(False), component, pipeline)
    if folder is not None and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: expected a base model's folder with {INDEX} (a diffusers pipeline) or {CONFIG} (an embedded "
            "model); openwu.exporting.export takes any other base as a module"
        )
    model = EmbeddedModel.from_pretrained(WEIGHTS if folder is None else folder)
    model.handle.detach()
    config = model.config.backbone
    draw = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, config.cell, config.cell, generator=draw)
    planes = torch.randn(1, 3, config.cell, config.cell, generator=draw)
    text = torch.randn(1, 4, config.text_dim, generator=draw)
    return Base(model.backbone, run=lambda base: torch.as_tensor(base(picture, planes, text)))


def fits(adapter: Adapter, base: Base) -> bool:
    """Whether the base has all of the adapter's targets."""
    try:
        resolve(base.model, adapter.targets)
    except TargetError:
        return False
    return True


def export(
    adapter: Adapter,
    output: Path,
    format: str,
    *,
    base: Base | None = None,
    component: str | None = None,
    check: bool = True,
    unavailable: str = "",
) -> Outcome:
    """Write one sample's adapter in a format and prove that the library reads it; ExportError where it does not.

    A failure leaves nothing behind and whatever was at `output` as it was. Without `base` nothing is compared, and
    `unavailable` says why there is none.
    """
    if component is None and base is not None and format in ("diffusers", "comfyui"):
        component = base.component
    model = None if base is None else base.model
    with replaced(output.resolve()) as draft:
        adapter.save_pretrained(draft, format, component=component, model=model)
        return _checked(adapter, draft, format, base, check, unavailable)


def _checked(
    adapter: Adapter,
    folder: Path,
    format: str,
    base: Base | None,
    check: bool,
    unavailable: str,
) -> Outcome:
    missing = [name for name in LIBRARIES.get(format, ()) if importlib.util.find_spec(name) is None]
    if not check:
        return Outcome(False, "the check was left out")
    if format == "openwu":
        return Outcome(True, check_native(adapter, folder))
    if missing:
        return Outcome(False, f"{' and '.join(missing)} not installed; pip install 'openwu[diffusers]' has both")
    if base is None:
        return Outcome(False, unavailable or "no base model to compare on; pass --base FOLDER")
    if format == "diffusers" and base.pipeline is None:
        return Outcome(
            False, "diffusers loads LoRA into its pipelines, and the base is none; pass --base PIPELINE_FOLDER"
        )
    live = Live.of(single(adapter, format, base.model), base)
    return Outcome(True, CHECKS[format](live, folder))
