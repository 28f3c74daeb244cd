"""Read and write generator folders, the released checkpoint included; estimate their memory before loading.

Shapes: n base layers of a group, hw positions of one, d width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openwu.config import RELEASED_GROUP, ConfigError, GeneratorConfig
from openwu.errors import CheckpointError
from openwu.files.writing import atomic_set
from openwu.generator.layout import GeneratorLayout
from openwu.kernels.modules import without_weights

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = 5 * 10**9

_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = frozenset(_TORCH_DTYPES)

Module = TypeVar("Module", bound=nn.Module)


class _Entry(NamedTuple):
    """What a file's header says about one tensor."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str


class _Stored(NamedTuple):
    """What the headers of a folder's weight files say."""

    entries: dict[str, _Entry]
    placed: dict[str, str]
    """Tensor name -> file, from the index; empty where one file holds everything."""
    unreadable: frozenset[str]
    """Files whose contents are unknown."""


def written_name(name: str, config: GeneratorConfig) -> str:
    """A parameter's name in the module -> its name in the files."""
    if name.startswith(("hidden_in.", "more_in.")):
        return name
    return "model." + (name.removeprefix(f"groups.{RELEASED_GROUP}.") if config.is_released_form else name)


def read_shape(folder: Path) -> tuple[GeneratorConfig, int, torch.dtype]:
    """Config, number of parameters and widest dtype of a folder's generator, from headers alone."""
    problems: list[str] = []
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder with {CONFIG_FILE} and safetensors, got none")
    config, stored = _read_config(folder, problems), _read_headers(folder, problems)
    if config is None or not stored.entries:
        raise _error(folder, problems)
    found = [_TORCH_DTYPES[each.dtype] for each in stored.entries.values() if each.dtype in _DTYPES]
    dtype = max(found, key=lambda each: each.itemsize, default=torch.float32)
    return config, sum(prod(each.shape) for each in stored.entries.values()), dtype


def load_generator(
    folder: Path, build: Callable[[GeneratorConfig], Module], *, dtype: torch.dtype | None, device: torch.device
) -> Module:
    """Build the module that `config.json` describes and fill it from the folder's safetensors."""
    module, entries = _planned(folder, build, dtype)
    state: dict[str, Tensor] = {}
    for name, entry in entries.items():
        # Opened once per tensor, since pages that a mapped file has read count as ours until it is closed; and copied,
        # since a mapped tensor would change or crash with its file.
        with safe_open(folder / entry.file, "pt") as file:
            state[name] = file.get_tensor(entry.name).to(device=device, dtype=dtype, copy=True)
    module.load_state_dict(state, assign=True)
    return module


def outline_generator(folder: Path, build: Callable[[GeneratorConfig], Module], *, dtype: torch.dtype | None) -> Module:
    """Build the module on the meta device, after all checks of `load_generator`; no weights are read."""
    return _planned(folder, build, dtype)[0]


def _planned(
    folder: Path, build: Callable[[GeneratorConfig], Module], dtype: torch.dtype | None
) -> tuple[Module, dict[str, _Entry]]:
    """Return the module on the meta device, and where each of its parameters stands. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected a folder with {CONFIG_FILE} and safetensors, got a "
            f"{'file' if folder.exists() else 'path that does not exist'}; download the checkpoint and pass its folder"
        )
    problems: list[str] = []
    config = _read_config(folder, problems)
    stored = _read_headers(folder, problems)
    if config is None:
        raise _error(folder, problems)
    with without_weights():
        module = build(config)
    own_names = {written_name(name, config): name for name in module.state_dict()}
    expected = {written: tuple(module.get_parameter(name).shape) for written, name in own_names.items()}
    problems += _name_problems(expected, stored) + _tensor_problems(expected, stored.entries, dtype)
    if problems:
        raise _error(folder, problems)
    return module, {name: stored.entries[written] for written, name in own_names.items()}


def save_generator(module: nn.Module, config: GeneratorConfig, folder: Path, max_shard_size: int) -> None:
    """Write the folder that `load_generator` reads. Until everything is on the disk, nothing in `folder` changes."""
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size: expected a number of bytes above 0, got {max_shard_size}")
    tensors = {written_name(name, config): tensor for name, tensor in module.state_dict().items()}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError(f"{folder}: expected weights to save, got a generator on the meta device")
    try:
        with atomic_set(
            folder, last=CONFIG_FILE, stale=(WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")
        ) as draft:
            _write(draft, tensors, config, max_shard_size)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot write the checkpoint: {error}") from error


def _read_config(folder: Path, problems: list[str]) -> GeneratorConfig | None:
    try:
        return GeneratorConfig.from_dict(_read_json(folder / CONFIG_FILE))
    except ConfigError as error:
        problems += [f"{CONFIG_FILE}: {problem}" for problem in error.problems]
    except (OSError, ValueError) as error:
        problems.append(f"{CONFIG_FILE}: expected a readable JSON file, got {error}")
    return None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_headers(folder: Path, problems: list[str]) -> _Stored:
    placed = _read_index(folder, problems) if (folder / INDEX_FILE).exists() else {}
    single = (folder / WEIGHTS_FILE).exists()
    if single and (folder / INDEX_FILE).exists():
        problems.append(f"expected {WEIGHTS_FILE} or {INDEX_FILE}, got both; remove the one that is out of date")
    elif not single and not (folder / INDEX_FILE).exists():
        problems.append(f"expected {WEIGHTS_FILE}, or {INDEX_FILE} and its files, got neither (pickles are not read)")
    entries: dict[str, _Entry] = {}
    unreadable = set()
    for file in sorted(set(placed.values())) or [WEIGHTS_FILE] * single:
        try:
            with safe_open(folder / file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    if name in entries:
                        problems.append(f"{name}: expected in one file, got it in {entries[name].file} and {file}")
                    header = shard.get_slice(name)
                    entries[name] = _Entry(name, file, tuple(header.get_shape()), header.get_dtype())
        except (OSError, SafetensorError) as error:
            problems.append(f"{file}: expected a complete safetensors file, got {error}")
            unreadable.add(file)
    if not entries and not unreadable:
        unreadable.add(WEIGHTS_FILE)
    return _Stored(entries, placed, frozenset(unreadable))


def _read_index(folder: Path, problems: list[str]) -> dict[str, str]:
    try:
        index = _read_json(folder / INDEX_FILE)
    except (OSError, ValueError) as error:
        problems.append(f"{INDEX_FILE}: expected a readable JSON file, got {error}")
        return {}
    placed = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(placed, dict) or not placed:
        problems.append(f"{INDEX_FILE}: expected an object weight_map tensor -> file, got {placed!r}")
        return {}
    sound = {}
    for name, file in placed.items():
        if isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file:
            sound[name] = file
        else:
            problems.append(f"{INDEX_FILE}: {name}: expected the name of a safetensors file, got {file!r}")
    return sound


def _name_problems(expected: Mapping[str, Any], stored: _Stored) -> list[str]:
    problems = []
    absent = [name for name in expected if name not in stored.entries]
    if stored.placed:
        lost = [name for name in absent if stored.placed.get(name, "") not in {"", *stored.unreadable}]
        problems += [f"{stored.placed[name]}: {name} is missing, which the index places there" for name in lost]
        unlisted = [name for name in expected if name not in stored.placed]
        if unlisted:
            problems.append(f"{INDEX_FILE}: missing entries: {', '.join(unlisted)}")
    elif absent and not stored.unreadable:
        problems.append(f"missing tensors: {', '.join(absent)}")
    unexpected = sorted({*stored.entries, *stored.placed} - set(expected))
    if unexpected:
        problems.append(f"unexpected tensors: {', '.join(unexpected)}")
    return problems


def _tensor_problems(
    expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, _Entry], dtype: torch.dtype | None
) -> list[str]:
    problems = []
    by_dtype: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if name in expected and entry.shape != expected[name]:
            problems.append(f"{name}: expected shape {list(expected[name])}, got {list(entry.shape)}")
        if entry.dtype not in _DTYPES:
            problems.append(f"{name}: expected one of {sorted(_DTYPES)}, got {entry.dtype}")
        else:
            by_dtype.setdefault(entry.dtype, []).append(name)
    if len(by_dtype) > 1 and dtype is None:
        found = "; ".join(f"{code} ({', '.join(names)})" for code, names in sorted(by_dtype.items()))
        problems.append(f"expected one dtype for all tensors, or `dtype=` to convert them, got {found}")
    return problems


def _write(folder: Path, tensors: Mapping[str, Tensor], config: GeneratorConfig, max_shard_size: int) -> None:
    fields = config.to_dict()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    fields |= {key: dtype for key in ("dtype", "torch_dtype") if key in fields}
    _write_json(folder / CONFIG_FILE, fields)
    shards = _shards(tensors, max_shard_size)
    files = [WEIGHTS_FILE]
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, shard in zip(files, shards, strict=True):
        save_file({name: tensors[name].cpu().contiguous() for name in shard}, folder / file, {"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Tensor], max_size: int) -> list[list[str]]:
    """Tensor names in order, cut so that no file exceeds `max_size` bytes unless a single tensor does."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _error(folder: Path, problems: Iterable[str]) -> CheckpointError:
    listed = list(problems)
    count = "1 problem" if len(listed) == 1 else f"{len(listed)} problems"
    return CheckpointError.listing(f"{folder}: {count} in this checkpoint:", listed)


FEED_FORWARD = 9
"""Numbers per position and width in a block's feed-forward beside the residual: its norm, 4 before and 4 after silu."""

COPIES = 3
"""An adapter as generated, at its strength, and stacked for the base's call."""


def generator_bytes(folder: Path, dtype: torch.dtype | None) -> int:
    """Weights, activations and adapters of one request at a time; `dtype` None: that of the files."""
    config, numbers, stored = read_shape(folder)
    return needed(config, numbers, dtype or stored)


def needed(config: GeneratorConfig, numbers: int, dtype: torch.dtype) -> int:
    """The same for a generator of `numbers` parameters: groups go through the blocks one after another."""
    layout = GeneratorLayout.of(config)
    positions = max(group.num_positions for group in layout.groups)
    width = positions * config.d_model
    stream = width * torch.promote_types(dtype, torch.float32).itemsize
    return (numbers + FEED_FORWARD * width + COPIES * layout.adapter_size) * dtype.itemsize + stream
