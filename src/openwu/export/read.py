"""Load an adapter from any supported file or folder: a folder of ours or of PEFT, or a LoRA file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from openwu.errors import CheckpointError, OpenwuError
from openwu.export.files import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS, check_numbers, read_config, read_tensors
from openwu.export.fit import fitted
from openwu.export.lora_file import read_lora_file
from openwu.export.native import FORMAT, read_native
from openwu.export.peft import read_peft
from openwu.export.peft_ia3 import read_ia3
from openwu.export.peft_operators import read_norms, read_rotations
from openwu.types import Adapter

SUFFIX = ".safetensors"


def load_adapter(path: Path, model: nn.Module | None = None, skip_text_encoders: bool = False) -> Adapter:
    """Read any format, on the CPU, in the dtypes of the file. `model`: must have every target, and explains names.

    Raises CheckpointError for files that are damaged, are no adapter, or hold NaN, infinite or complex numbers.
    """
    try:
        file = _lora_file(path)
        if file is None:
            adapter = _read_folder(path, WEIGHTS, model)
        elif _has_config(file):
            adapter = _read_folder(file.parent, file.name, model)
        else:
            tensors, metadata = read_tensors(file)
            adapter = read_lora_file(tensors, metadata, model, skip_text_encoders)
        return adapter if model is None else fitted(adapter, model)
    except OpenwuError as error:
        told = str(error)
        raise CheckpointError(told if told.startswith(str(path)) else f"{path}: {told}") from error


def _lora_file(path: Path) -> Path | None:
    """The file where a path holds one LoRA file; None where it is a folder with a config, or should be."""
    if path.is_file():
        if path.suffix != SUFFIX:
            raise CheckpointError(f"expected a folder or a {SUFFIX} file, got a {path.suffix or 'nameless'} file")
        return path
    if not path.is_dir() or (path / CONFIG).exists():
        return None
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return path / DIFFUSERS_WEIGHTS
    files = [file for file in sorted(path.glob(f"*{SUFFIX}")) if file.name != WEIGHTS]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"expected one {SUFFIX} file, got {names}; name the one that is meant")
    return files[0] if files else None


def _has_config(file: Path) -> bool:
    """Whether the config in a file's folder is the file's: it has the name that belongs to it, or is the only one."""
    if not (file.parent / CONFIG).is_file():
        return False
    return file.name == WEIGHTS or list(file.parent.glob(f"*{SUFFIX}")) == [file]


def _read_folder(folder: Path, weights: str, model: nn.Module | None) -> Adapter:
    config = read_config(folder, weights)
    tensors, metadata = read_tensors(folder / weights)
    check_numbers(tensors)
    if config.get("format") == FORMAT:
        return read_native(config, tensors)
    if config.get("peft_type") == "LORA":
        return read_peft(config, tensors, metadata, model)
    if config.get("peft_type") == "IA3":
        return read_ia3(config, tensors, metadata, model)
    if config.get("peft_type") == "ROAD":
        return read_rotations(config, tensors, metadata, model)
    if config.get("peft_type") == "LN_TUNING":
        return read_norms(config, tensors, model)
    came = {key: config[key] for key in ("format", "peft_type") if key in config}
    raise CheckpointError(
        f"{CONFIG}: expected format {FORMAT!r} or peft_type 'LORA', 'IA3', 'ROAD' or 'LN_TUNING', got "
        f"{came or 'neither key'}"
    )
