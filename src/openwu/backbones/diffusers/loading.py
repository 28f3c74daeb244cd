"""Load diffusers pipelines from a folder or hub id, after every check that needs no weights.

Only safetensors are read, never pickles, and never code from the folder. Checked first: the pipeline's class, the files
of every part, and whether the weights fit into memory. At the end, diffusers' own loader of LoRA files: it proves an
export, and reads nothing of a pipeline but its denoiser and scheduler.
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
from openwu.kernels.memory import MemoryPlan, free_memory

INDEX = "model_index.json"
DENOISERS = ("transformer", "unet")
"""Attributes of diffusers' pipelines that hold a denoiser."""
HEADROOM = 1.1
"""How much more than its weights a loaded pipeline needs, at least."""

CONFIGS = (INDEX, "*/*.json")
"""What is downloaded to learn a pipeline's modules and widths."""

_FILES = (*CONFIGS, "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja")
"""What is downloaded: the parts, not the same weights once more in one file beside them."""

_SAMPLES, _SAMPLE = 64, 64 * 1024
"""How many pieces of how many bytes of a large file a fingerprint reads."""

_FP16 = re.compile(r"\.fp16[.-]")
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor", "processor")
"""Parts of a pipeline whose names end like this hold no weights."""


def load_pipeline(
    folder: str | Path,
    classes: Sequence[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    extra: str = "diffusers",
    plan: QuantisationPlan | None = None,
) -> Any:
    """Load a pipeline of one of `classes`. `dtype` None: float32 on a CPU, else bfloat16.

    `plan`: what to quantise, after all weights were loaded into main memory. Raises CheckpointError for a folder that
    is no such pipeline, OpenwuError for missing packages (of our `extra`) and too little memory.
    """
    if plan is not None:
        check_quantise(plan.how)
    diffusers = library("diffusers", extra)
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    path = local_folder(folder, revision)
    found = check_class(path, classes)
    variant = check_weights(path)
    check_memory(path, dtype, device, plan)
    try:
        with quiet(diffusers.utils.logging, library("transformers", extra).utils.logging):
            pipeline = getattr(diffusers, found).from_pretrained(
                path, dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: diffusers cannot load this pipeline: {error}") from error
    if plan is not None:
        quantise_(getattr(pipeline, plan.part), plan.paths(path), plan.how, dtype, device)
    return pipeline.to(device)


def check_local(folder: str | Path, revision: str | None, classes: Sequence[str]) -> None:
    """Check class and files of a local folder; of a hub id only its form, since nothing is downloaded."""
    if not _is_hub_id(folder):
        path = local_folder(folder, revision)
        check_class(path, classes)
        check_weights(path)


def local_folder(folder: str | Path, revision: str | None, files: Sequence[str] = _FILES) -> Path:
    """Return the folder itself, or the local copy of a hub id's `files`, downloaded if they are not there yet."""
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
        return Path(hub.snapshot_download(str(folder), revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}: no such folder here, and it cannot be downloaded at revision {revision or 'main'}: {reason}; "
            "check the name, your network and whether the weights ask for a licence to be accepted"
        ) from error


def _is_hub_id(folder: str | Path) -> bool:
    """Tell whether a name that is no local path may be a hub id."""
    parts = str(folder).split("/")
    return not Path(folder).exists() and len(parts) == 2 and all(parts) and not str(folder).startswith((".", "~"))


def check_class(folder: Path, classes: Sequence[str]) -> str:
    """Return the name of the pipeline's class. Raises CheckpointError if it is none of `classes`."""
    found = _read_index(folder).get("_class_name")
    if found not in classes:
        raise CheckpointError(
            f"{folder}: expected a pipeline of class {' or '.join(classes)}, got {found!r}; choose the model that fits "
            "this folder (`openwu models` lists them), or the folder that fits the model"
        )
    return str(found)


def _read_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline's index. Raises CheckpointError for a folder without a readable one."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        held = sorted(each.name for each in folder.iterdir())[:6]
        raise CheckpointError(
            f"{folder}: expected a diffusers pipeline with {INDEX} ({error}); the folder holds {held or 'nothing'}"
        ) from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{folder / INDEX}: expected a JSON object, got {type(index).__name__}")
    return index


def check_weights(folder: Path) -> str | None:
    """Return the weights' variant ("fp16") if only that one exists, else None.

    Raises CheckpointError if a part of the pipeline has no safetensors.
    """
    parts = [
        name
        for name, value in _read_index(folder).items()
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


def check_memory(folder: Path, dtype: torch.dtype, device: torch.device, plan: QuantisationPlan | None = None) -> None:
    """Raise OpenwuError if the weights in `dtype` do not fit into the device's free memory, with the numbers.

    Main memory holds all weights before some are quantised; another device only receives the quantised ones.
    """
    needed = sum(part_numbers(folder).values()) * dtype.itemsize
    if plan is not None and device.type != "cpu":
        needed -= plan.saved(folder, weight_files(folder / plan.part), dtype.itemsize)
    stored = str(dtype).removeprefix("torch.") + ("" if plan is None else f" and {plan.how}")
    advice = "use a smaller dtype, another device or a smaller base"
    if plan is None and device.type != "cpu":
        advice = "use quantise (8bit, 4bit), a smaller dtype, another device or a smaller base"
    memory = MemoryPlan({"loading": {f"weights in {stored}": int(HEADROOM * needed)}})
    memory.check(device, free_memory(device), advice, str(folder))


def part_numbers(folder: Path) -> dict[str, int]:
    """Count the weights of every part of a pipeline, from the headers of its safetensors (one variant of each)."""
    files = {part.name: weight_files(part) for part in sorted(folder.iterdir()) if part.is_dir()}
    return {name: sum(map(_numbers, found)) for name, found in files.items() if found}


def weight_files(part: Path) -> list[Path]:
    """List the safetensors of a pipeline's part, of one variant."""
    files = sorted(part.glob("*.safetensors"))
    return [file for file in files if not _FP16.search(file.name)] or files


def hollow_pipeline(folder: Path, denoiser: str, extra: str = "diffusers") -> SimpleNamespace:
    """Build a pipeline's parts without weights: the denoiser on the meta device, of others the configs alone.

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
        if denoiser not in parts:
            raise KeyError(denoiser)
        return SimpleNamespace(**parts, components=parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: expected a config.json that diffusers reads in every part, got {error}"
        ) from error


@dataclass(frozen=True)
class HollowPart:
    """An encoder without its weights: its config, and its modules on request."""

    folder: Path
    config: Any

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """Build the modules on the meta device from the config; return none where transformers cannot."""
        try:
            kind = getattr(library("transformers"), _read_index(self.folder.parent)[self.folder.name][1])
            with torch.device("meta"):
                made: nn.Module = kind(self.config)
        except Exception:  # models of many authors; a missing module is reported when it is used
            return []
        return list(made.named_modules())


def pipeline_fingerprint(folder: Path) -> str:
    """Hash a pipeline's configs, tokenizers and weights; of large files, samples spread over the file."""
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
            for number in range(_SAMPLES):
                opened.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
                yield opened.read(_SAMPLE)


def _numbers(file: Path) -> int:
    """Count the numbers in a safetensors file."""
    return sum(math.prod(shape) for _, shape in read_header(file).values())


def denoiser_name(folder: Path) -> str:
    """Return which component of the pipeline in a folder is its denoiser. Raises CheckpointError unless it has one."""
    index = _read_index(folder)
    found = [name for name in DENOISERS if index.get(name, [None])[0]]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder / INDEX}: expected one of {', '.join(DENOISERS)}, got {', '.join(found) or index}"
        )
    return found[0]


def load_denoiser(folder: Path, component: str) -> Any:
    """Load a pipeline in float32 with nothing but its denoiser and scheduler; pickles are not read.

    Raises CheckpointError for a folder that diffusers cannot load, ImportError without diffusers.
    """
    import diffusers

    parts = {name: part for name, part in _read_index(folder).items() if isinstance(part, list)}
    absent: dict[str, None] = dict.fromkeys(name for name in parts if name not in (component, "scheduler"))
    try:
        with quiet(diffusers.utils.logging):
            return diffusers.DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, **absent
            )
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: expected a folder that diffusers reads as a pipeline: {error}") from error


def load_lora(pipeline: Any, component: str, folder: Path) -> nn.Module:
    """Load the LoRA of a folder into a pipeline, by diffusers' own loader, and return its denoiser."""
    pipeline.load_lora_weights(folder, local_files_only=True)
    denoiser = getattr(pipeline, component)
    assert isinstance(denoiser, nn.Module)
    return denoiser
