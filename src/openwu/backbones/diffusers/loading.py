"""Pipelines on disk: a folder or hub id enters; a diffusers pipeline leaves, or an error that says what to do.

Only safetensors are read, never pickles, and never code from the folder. Everything that can be known without loading
is checked first: the pipeline's class, the files of every part, and whether the weights fit into memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from openwu.backbones.quantised import QuantisationPlan, check_quantise, quantise_
from openwu.errors import CheckpointError, OpenwuError
from openwu.extras import library, quiet
from openwu.files.hashing import of_bytes
from openwu.files.headers import read_header

INDEX = "model_index.json"
HEADROOM = 1.1
"""How much more than its weights a loaded pipeline needs, at least."""

_FILES = (INDEX, "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja")
"""What is downloaded: the parts, not the same weights once more in one file beside them."""

_SAMPLES, _SAMPLE = 64, 64 * 1024
"""How many pieces of how many bytes stand for a large file in a fingerprint."""

_FP16 = re.compile(r"\.fp16[.-]")
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor", "processor")
"""Parts of a pipeline whose names end like this hold no weights."""


def load_pipeline(
    folder: str | Path,
    classes: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    extra: str = "diffusers",
    quantisation_plan: QuantisationPlan | None = None,
) -> Any:
    """A pipeline of one of `classes` from a folder or a hub id; `dtype` None: float32 on a CPU, else bfloat16.

    `fewer`: what to quantise. The machine's memory holds all weights first: what is known to fit is the result.
    """
    if quantisation_plan is not None:
        check_quantise(quantisation_plan.how)
    diffusers = library("diffusers", extra)
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    path = local_folder(folder, revision)
    found = check_class(path, classes)
    variant = check_weights(path)
    check_memory(path, dtype, device, quantisation_plan)
    try:
        with quiet(diffusers.utils.logging, library("transformers", extra).utils.logging):
            pipeline = getattr(diffusers, found).from_pretrained(
                path, dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: diffusers cannot load this pipeline: {error}") from error
    if quantisation_plan is not None:
        quantise_(
            getattr(pipeline, quantisation_plan.part),
            quantisation_plan.paths(path),
            quantisation_plan.how,
            dtype,
            device,
        )
    return pipeline.to(device)


def check_local(folder: str | Path, revision: str | None, classes: Sequence[str]) -> None:
    """Everything that can be known without loading but memory. Of a hub id only its form: nothing is downloaded."""
    if not _is_hub_id(folder):
        path = local_folder(folder, revision)
        check_class(path, classes)
        check_weights(path)


def local_folder(folder: str | Path, revision: str | None) -> Path:
    """The folder itself, or the local copy of a hub id, downloaded where it is not there yet."""
    path = Path(folder)
    if path.is_dir():
        if revision is not None:
            raise OpenwuError(f"revision: expected none with the local folder {folder}, got {revision!r}; leave it out")
        return path
    if not _is_hub_id(folder):
        raise CheckpointError(
            f"{folder}: expected a folder with a diffusers pipeline ({INDEX}) or a hub id such as 'organisation/name', "
            f"got a {'file' if path.is_file() else 'path that does not exist'}"
        )
    hub = library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(str(folder), revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}: no such folder here, and it cannot be downloaded at revision {revision or 'main'}: {reason}; "
            "check the name, your network and whether the weights ask for a licence to be accepted"
        ) from error


def _is_hub_id(folder: str | Path) -> bool:
    """Whether a name that is no path here may be one of the hub's."""
    parts = str(folder).split("/")
    return not Path(folder).exists() and len(parts) == 2 and all(parts) and not str(folder).startswith((".", "~"))


def check_class(folder: Path, classes: Sequence[str]) -> str:
    """The name of the pipeline's class, which must be one of `classes`."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        held = sorted(each.name for each in folder.iterdir())[:6]
        raise CheckpointError(
            f"{folder}: expected a diffusers pipeline with {INDEX} ({error}); the folder holds {held or 'nothing'}"
        ) from error
    found = index.get("_class_name") if isinstance(index, dict) else None
    if found not in classes:
        raise CheckpointError(
            f"{folder}: expected a pipeline of class {' or '.join(classes)}, got {found!r}; choose the model that fits "
            "this folder (`openwu models` lists them), or the folder that fits the model"
        )
    return str(found)


def check_weights(folder: Path) -> str | None:
    """The variant of the weights ("fp16") where only that one is there. Raises where a part has no safetensors."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    parts = [
        name
        for name, value in index.items()
        # A list that does not begin with a library's name is no part but a setting, such as a schedule.
        if isinstance(value, list) and value and isinstance(value[0], str) and not name.endswith(_WITHOUT_WEIGHTS)
    ]
    missing, variants = [], set()
    for part in parts:
        files = [file.name for file in (folder / part).glob("*.safetensors")]
        if not files:
            missing.append(part)
        elif all(_FP16.search(file) for file in files):
            variants.add("fp16")
    if missing:
        held = {part: sorted(file.name for file in (folder / part).glob("*"))[:4] or "nothing" for part in missing}
        raise CheckpointError(
            f"{folder}: expected safetensors in every part of the pipeline, found none in {', '.join(missing)} "
            f"({held}); pickles are not read: choose a revision with safetensors, or convert them with diffusers"
        )
    return variants.pop() if variants else None


def check_memory(
    folder: Path, dtype: torch.dtype, device: torch.device, quantisation_plan: QuantisationPlan | None = None
) -> None:
    """Raise when the weights in `dtype` do not fit into the device's free memory, with the numbers.

    In the machine's memory all of them stand before some are quantised; on another device only what is quantised.
    """
    needed = weight_bytes(folder, dtype)
    if quantisation_plan is not None and device.type != "cpu":
        needed -= quantisation_plan.saved(folder, weight_files(folder / quantisation_plan.part), dtype.itemsize)
    needed, free = int(HEADROOM * needed), free_memory(device)
    if free is not None and needed > free:
        how = str(dtype).removeprefix("torch.") + ("" if quantisation_plan is None else f" and {quantisation_plan.how}")
        less = "a smaller dtype, another device or a smaller base"
        if quantisation_plan is None and device.type != "cpu":
            less = "quantise (8bit, 4bit), " + less
        raise OpenwuError(
            f"{folder}: the weights need about {needed / 1e9:.1f} GB in {how}, but "
            f"{device} has {free / 1e9:.1f} GB free; use {less}"
        )


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of all weights of a pipeline in `dtype`, from the headers of its safetensors (one variant of each part)."""
    return sum(part_numbers(folder).values()) * dtype.itemsize


def part_numbers(folder: Path) -> dict[str, int]:
    """Part of a pipeline -> how many numbers its weights are, from the headers of its safetensors."""
    numbers = {}
    for part in sorted(each for each in folder.iterdir() if each.is_dir()):
        files = weight_files(part)
        if files:
            numbers[part.name] = sum(_numbers(file) for file in files)
    return numbers


def weight_files(part: Path) -> list[Path]:
    """The safetensors of a pipeline's part, of one variant."""
    files = sorted(part.glob("*.safetensors"))
    return [file for file in files if not _FP16.search(file.name)] or files


def hollow_pipeline(folder: Path, denoiser: str, extra: str = "diffusers") -> SimpleNamespace:
    """The parts of a pipeline without their weights: the denoiser on the meta device, of others the configs alone.

    Raises CheckpointError where a config is missing or broken.
    """
    diffusers, transformers = library("diffusers", extra), library("transformers", extra)
    parts: dict[str, Any] = {}
    try:
        for file in sorted(folder.glob("*/config.json")):
            config = json.loads(file.read_text(encoding="utf-8"))
            if file.parent.name == denoiser:
                with torch.device("meta"):
                    parts[denoiser] = getattr(diffusers, config["_class_name"]).from_config(config)
            elif "model_type" in config:
                parts[file.parent.name] = HollowPart(file.parent, transformers.AutoConfig.from_pretrained(file.parent))
            else:
                parts[file.parent.name] = SimpleNamespace(config=SimpleNamespace(**config))
        return SimpleNamespace(**{denoiser: parts.pop(denoiser)}, **parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: expected a config.json that diffusers reads in every part, got {error}"
        ) from error


@dataclass(frozen=True)
class HollowPart:
    """An encoder without its weights."""

    folder: Path
    config: Any

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """Its modules on the meta device, made from the config; none where transformers cannot make it so."""
        try:
            index = json.loads((self.folder.parent / INDEX).read_text(encoding="utf-8"))
            kind = getattr(library("transformers"), index[self.folder.name][1])
            with torch.device("meta"):
                made: nn.Module = kind(self.config)
        except Exception:  # models of many authors; who asks for a module of it finds out later
            return []
        return list(made.named_modules())


def pipeline_fingerprint(folder: Path) -> str:
    """Depends on a pipeline's configs, tokenizers and weights. Of large files only samples are read, not every byte."""
    return of_bytes(_sampled(folder)).hexdigest()


def _sampled(folder: Path) -> Iterator[bytes]:
    for file in sorted(folder.glob("*/*")):
        if file.suffix not in (".json", ".txt", ".model", ".jinja", ".safetensors") or not file.is_file():
            continue
        size = file.stat().st_size
        yield f"{file.relative_to(folder).as_posix()} {size}\n".encode()
        with file.open("rb") as opened:
            if size <= _SAMPLES * _SAMPLE:
                yield opened.read()
                continue
            for place in range(_SAMPLES):
                opened.seek(place * (size - _SAMPLE) // (_SAMPLES - 1))
                yield opened.read(_SAMPLE)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a CUDA device or of this machine; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _numbers(file: Path) -> int:
    """How many numbers a safetensors file holds."""
    return sum(math.prod(shape) for _, shape in read_header(file).values())
