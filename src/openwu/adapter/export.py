"""Folders of adapters: an `Adapter` enters and a folder is written, or a folder is read and an `Adapter` leaves.

Both formats hold `adapter_config.json` and `adapter_model.safetensors`. The native one keeps a batch of samples bit
for bit, experts too; its config has `format`, `version`, `batch`, `rank`, `scale`, `instructions` and `targets`.
PEFT's holds one sample, of linear modules and convolutions. A folder appears whole or not at all; one that exists is
replaced only if it is an adapter folder.

Shapes: b samples, E experts, r rank, kh and kw height and width of a convolution's kernel.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.errors import CheckpointError, OpenwuError, TargetError
from openwu.types import Adapter, Target

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FORMAT = "openwu-adapter"
VERSION = 1
PEFT_PREFIX = "base_model.model."
PEFT_REFUSED = (
    "use_dora",
    "use_rslora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
)
"""Options of PEFT under which the folder's A and B would mean something else than `W x + alpha / r * B (A x)`."""


def save_native(adapter: Adapter, folder: Path) -> None:
    """Write any adapter: `{target}.lora_A` `[b, (E,) r, A_dim]`, `{target}.lora_B` `[b, (E,) B_dim, r]`."""
    _write(folder, native_config(adapter), adapter.state_dict())


def native_config(adapter: Adapter) -> dict[str, Any]:
    """All of an adapter but its tensors, as plain JSON values; `native_adapter` puts both together again."""
    targets = [
        {"name": t.name, "in_dim": t.in_dim, "out_dim": t.out_dim, "experts": t.experts, "kernel": t.kernel}
        for t in adapter.targets
    ]
    sizes = {"batch": adapter.batch, "rank": adapter.rank, "scale": adapter.scale}
    config = {"format": FORMAT, "version": VERSION, **sizes, "instructions": list(adapter.instructions)}
    return {**config, "targets": targets}


def save_peft(adapter: Adapter, folder: Path) -> None:
    """Write one sample as PEFT reads it: `base_model.model.{target}.lora_{A,B}.weight`.

    A convolution's A is `[r, in, kh, kw]` there: its target must know its `kernel` (`with_kernels` reads it off the
    model), or it is written like a linear module's and PEFT refuses the shape. PEFT's own convolutions ignore
    dilation and padding mode.
    """
    if adapter.batch != 1:
        raise OpenwuError(f"peft: a folder holds one sample, got {adapter.batch}; save each adapter.select([i])")
    if experts := [target.name for target in adapter.targets if target.experts is not None]:
        raise OpenwuError(f"peft: experts are not supported yet, got {', '.join(experts)}; save with format='openwu'")
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        a, b = (part[0] for part in adapter.weights[target.name])
        if target.kernel is not None:
            a, b = a.reshape(len(a), -1, *target.kernel), b[:, :, None, None]
        tensors[f"{PEFT_PREFIX}{target.name}.lora_A.weight"] = a
        tensors[f"{PEFT_PREFIX}{target.name}.lora_B.weight"] = b
    alpha = adapter.scale * adapter.rank
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [target.name for target in adapter.targets],
    }
    _write(folder, config, tensors)


def with_kernels(adapter: Adapter, model: nn.Module) -> Adapter:
    """The same adapter, its targets knowing the kernels of the model's convolutions."""
    modules = dict(model.named_modules())

    def known(target: Target) -> Target:
        module = modules.get(target.name)
        if not isinstance(module, nn.Conv2d):
            return target
        height, width = module.kernel_size
        return replace(target, kernel=(height, width))

    return replace(adapter, targets=tuple(known(target) for target in adapter.targets))


def load_adapter(folder: Path) -> Adapter:
    """Read a folder of either format, on the CPU, in the dtypes of the file."""
    config, tensors = _read(folder)
    try:
        if config.get("format") == FORMAT:
            return native_adapter(config, tensors)
        if config.get("peft_type") == "LORA":
            return _peft(config, tensors)
        came = {key: config[key] for key in ("format", "peft_type") if key in config}
        raise CheckpointError(f"{CONFIG}: expected format {FORMAT!r} or peft_type 'LORA', got {came or 'neither key'}")
    except (CheckpointError, TargetError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def native_adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """What `native_config` and `Adapter.state_dict` gave -> the adapter; CheckpointError where they do not fit."""
    if config.get("version") != VERSION:
        raise CheckpointError(f"expected version {VERSION} of {FORMAT}, got {config.get('version')!r}; update openwu")
    try:
        targets = tuple(_target(entry) for entry in config["targets"])
        scale, sizes = float(config["scale"]), (int(config["batch"]), int(config["rank"]))
        instructions = tuple(str(text) for text in config.get("instructions", ()))
        weights = _pairs(tensors, [target.name for target in targets], "{name}.lora_{part}")
        adapter = Adapter(targets, weights, scale, instructions)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG}: expected batch, rank, scale and targets, got {error!r}") from error
    if (adapter.batch, adapter.rank) != sizes:
        raise CheckpointError(f"expected batch and rank {sizes}, got tensors of {(adapter.batch, adapter.rank)}")
    return adapter


def _target(entry: Mapping[str, Any]) -> Target:
    kernel = entry["kernel"]
    return Target(
        name=entry["name"],
        in_dim=int(entry["in_dim"]),
        out_dim=int(entry["out_dim"]),
        experts=None if entry["experts"] is None else int(entry["experts"]),
        kernel=None if kernel is None else (int(kernel[0]), int(kernel[1])),
    )


def _peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    refused = [key for key in PEFT_REFUSED if config.get(key)]
    if refused or config.get("bias", "none") != "none":
        raise CheckpointError(f"{CONFIG}: expected a plain LoRA, got one with {', '.join(refused) or 'bias'}")
    end = ".lora_A.weight"
    names = [key.removeprefix(PEFT_PREFIX).removesuffix(end) for key in tensors if key.endswith(end)]
    listed = config.get("target_modules")
    if isinstance(listed, list) and set(listed) == set(names):
        names = listed
    targets, weights = [], {}
    for name, (a, b) in _pairs(tensors, names, PEFT_PREFIX + "{name}.lora_{part}.weight").items():
        kernel = (a.shape[2], a.shape[3]) if a.ndim == 4 else None
        weights[name] = (a.flatten(1)[None], b.flatten(1)[None])
        targets.append(Target(name, a[0].numel(), len(b), kernel=kernel))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise CheckpointError(f"{CONFIG}: expected numbers r and lora_alpha, got {rank!r} and {alpha!r}")
    adapter = Adapter(tuple(targets), weights, alpha / rank)
    if adapter.rank != rank:
        raise CheckpointError(f"expected rank {rank}, got tensors of rank {adapter.rank}")
    return adapter


def _pairs(tensors: Mapping[str, Tensor], names: Sequence[str], key: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Target name -> (A, B), of tensors that must be exactly these."""
    keys = {name: (key.format(name=name, part="A"), key.format(name=name, part="B")) for name in names}
    expected = {part for pair in keys.values() for part in pair}
    missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unexpected or not names:
        raise CheckpointError(f"{WEIGHTS}: tensors do not fit {CONFIG}; missing {missing}, unexpected {unexpected}")
    if scalars := [part for part in expected if tensors[part].ndim < 2]:
        raise CheckpointError(f"{WEIGHTS}: expected matrices, got other shapes for {sorted(scalars)}")
    return {name: (tensors[a], tensors[b]) for name, (a, b) in keys.items()}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    files = [folder / CONFIG, folder / WEIGHTS]
    if missing := [file.name for file in files if not file.is_file()]:
        came = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: expected {CONFIG} and {WEIGHTS}; missing {missing}, got {came}")
    try:
        config = json.loads(files[0].read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{files[0]}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{files[0]}: expected a JSON object, got {type(config).__name__}")
    try:
        return config, load_file(files[1])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{files[1]}: expected a whole safetensors file: {error}") from error


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    # A generator may hand out views of one large tensor; the format wants each tensor on its own.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with _replaced(folder.resolve()) as draft:
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(own, draft / WEIGHTS, metadata={"format": "pt"})


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
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
    foreign = held - {CONFIG, WEIGHTS, "README.md"}
    if foreign or (held and CONFIG not in held):
        raise OpenwuError(f"{folder}: not an adapter folder, so not overwritten; it holds {sorted(foreign or held)}")
