"""Files of adapters: tensors and a config enter, a folder is written whole or not at all; or they are read again.

A folder that exists is replaced only if it is an adapter folder.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openwu.errors import CheckpointError, OpenwuError
from openwu.files.writing import whole_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
COMFYUI_WEIGHTS = "comfyui_lora.safetensors"

PREFIX = "base_model.model."
"""What stands before a module's name in PEFT's files."""

METADATA = "openwu"
"""Key of a safetensors file's metadata under which stands, as JSON, what a foreign format leaves out."""

MAIN = frozenset({CONFIG, DIFFUSERS_WEIGHTS, COMFYUI_WEIGHTS})
"""An adapter folder holds one of these."""
KNOWN = MAIN | {WEIGHTS, "README.md"}
"""An adapter folder holds nothing else."""


def write(
    folder: Path,
    weights: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A folder with one file of tensors, named `weights`, and `adapter_config.json` where a config is given."""
    # A generator may hand out views of one large tensor; the format wants each tensor on its own.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with replaced(folder.resolve()) as draft:
        if config is not None:
            (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with whole_file(draft / weights) as part:  # for its permissions: others shall read it, too
            save_file(own, part, metadata={"format": "pt", **(metadata or {})})


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `adapter_config.json`; raises CheckpointError where it or the weights beside it are missing."""
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        came = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: expected {CONFIG} and {WEIGHTS}; missing {missing}, got {came}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG}: expected a JSON object, got {type(config).__name__}")
    return config


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: expected a whole safetensors file: {error}") from error


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A draft folder beside `folder` that takes its place when nothing failed."""
    token = uuid.uuid4().hex
    draft, former = (folder.with_name(f".{folder.name}.{token}.{kind}") for kind in ("draft", "former"))
    try:
        if folder.exists():
            _check_adapter_folder(folder)
        draft.mkdir(parents=True)
        yield draft
        if folder.exists():
            folder.rename(former)
        try:
            draft.rename(folder)
        except OSError:
            if former.exists():
                former.rename(folder)
            raise
    except (OSError, SafetensorError) as error:
        raise OpenwuError(f"{folder}: cannot write an adapter folder there: {error}") from error
    finally:
        for left in (draft, former):
            shutil.rmtree(left, ignore_errors=True)


def _check_adapter_folder(folder: Path) -> None:
    """Refuse to replace anything but an adapter folder or an empty one."""
    if not folder.is_dir():
        raise OpenwuError(f"{folder}: expected a folder to write the adapter to, got a file")
    held = {file.name for file in folder.iterdir()}
    foreign = held - KNOWN
    if foreign or (held and not held & MAIN):
        raise OpenwuError(f"{folder}: not an adapter folder, so not overwritten; it holds {sorted(foreign or held)}")
