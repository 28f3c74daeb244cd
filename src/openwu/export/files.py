"""Read and write the files of adapters; a folder appears whole or not at all.

A folder that exists is replaced only if it is an adapter folder.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openwu.errors import CheckpointError, OpenwuError
from openwu.files.writing import atomic_file

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
KNOWN = MAIN | {WEIGHTS, "README.md", "provenance.json"}
"""An adapter folder holds nothing else; the last is a training's record."""


NAMED = re.compile(r"(.*\.lora_[AB])\.([^.]+)\.(weight|bias)")
"""Key of a factor with its adapter's name, `x.lora_A.default.weight`."""
SHOWN = 5
"""How many names an error lists."""


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
        with atomic_file(draft / weights) as part:  # for its permissions: others shall read it, too
            save_file(own, part, metadata={"format": "pt", **(metadata or {})})


def read_config(folder: Path, weights: str = WEIGHTS) -> dict[str, Any]:
    """The folder's `adapter_config.json`; raises CheckpointError where it or the weights beside it are missing."""
    if missing := [name for name in (CONFIG, weights) if not (folder / name).is_file()]:
        came = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: expected {CONFIG} and {weights}; missing {missing}, got {came}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG}: expected a JSON object, got {type(config).__name__}")
    return config


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: expected a whole safetensors file: {error}") from error


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Refuse complex, NaN and infinite numbers; CheckpointError names the tensors."""
    if wrong := [name for name, tensor in tensors.items() if tensor.is_complex()]:
        raise CheckpointError(f"expected real numbers, got complex ones in {listed(wrong)}")
    if wrong := [name for name, tensor in tensors.items() if not _finite(tensor)]:
        raise CheckpointError(
            f"expected finite numbers, got NaN or infinity in {len(wrong)} tensors: {listed(wrong)}; the training "
            "diverged or the file is damaged"
        )


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # float8 has no isfinite
        tensor = tensor.to(torch.float32)
    return bool(tensor.isfinite().all())


def listed(keys: Iterable[str]) -> str:
    """The first few keys, for error messages."""
    keys = sorted(keys)
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def plain_keys(tensors: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """The tensors under keys without adapter names and traces of `torch.compile`.

    `x.lora_A.cat.weight` becomes `x.lora_A.weight`; CheckpointError where a file has several adapters. `_orig_mod.`
    goes unless the model is compiled itself.
    """
    if several := {found[2] for key in tensors if (found := NAMED.fullmatch(key))}:
        unnamed = any(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
        if len(several) > 1 or unnamed:
            names = ", ".join(sorted(several)) + (" and one without a name" if unnamed else "")
            raise CheckpointError(f"expected one adapter, got {names}; save the one that is meant in a file of its own")
    compiled = model is not None and any("_orig_mod" in name for name, _ in model.named_modules())
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = NAMED.sub(r"\1.\3", key)
        if not compiled:
            name = re.sub(r"(^|\.)_orig_mod\.", r"\1", name)
        if name in plain:
            raise CheckpointError(f"{key}: the file has {name} twice")
        plain[name] = tensor
    return plain


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
