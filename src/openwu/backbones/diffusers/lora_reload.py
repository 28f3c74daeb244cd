"""diffusers' own loader for LoRA files: a pipeline's folder enters, its denoiser leaves, with a LoRA in it or without.

Only the denoiser and the scheduler are read: the loader asks no more of a pipeline.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from openwu.errors import CheckpointError

INDEX = "model_index.json"
DENOISERS = ("transformer", "unet")
"""Attributes of diffusers' pipelines that hold a denoiser."""


def denoiser_name(folder: Path) -> str:
    """Which component of the pipeline in a folder is its denoiser."""
    index = _index(folder)
    found = [name for name in DENOISERS if index.get(name, [None])[0]]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder / INDEX}: expected one of {', '.join(DENOISERS)}, got {', '.join(found) or index}"
        )
    return found[0]


def read_pipeline(folder: Path, component: str) -> Any:
    """The pipeline of a folder with nothing but its denoiser, in float32; pickles are not read.

    Raises ImportError without diffusers.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    parts = {name: part for name, part in _index(folder).items() if isinstance(part, list)}
    absent: dict[str, None] = dict.fromkeys(name for name in parts if name not in (component, "scheduler"))
    logging.disable_progress_bar()
    try:
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, **absent)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: expected a folder that diffusers reads as a pipeline: {error}") from error
    finally:
        logging.enable_progress_bar()


def load_lora(pipeline: Any, component: str, folder: Path) -> nn.Module:
    """The pipeline's denoiser with the LoRA of a folder in it."""
    pipeline.load_lora_weights(folder, local_files_only=True)
    denoiser = getattr(pipeline, component)
    assert isinstance(denoiser, nn.Module)
    return denoiser


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / INDEX}: expected a pipeline's JSON index: {error}") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{folder / INDEX}: expected a JSON object, got {type(index).__name__}")
    return index
