"""Plan the memory of HunyuanImage-3.0-Instruct from its safetensors headers, before any weights are read.

Counted are every tensor, in its own dtype or quantised, the KV cache of a request, and what must stay free beside the
base (`reserve_bytes`: generator and adapters).

Bytes are decimal in messages: 1 GB = 10^9.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from openwu.backbones.quantised import Quantise, quantised_bytes, wide_enough
from openwu.errors import CheckpointError, OpenwuError
from openwu.files.headers import Headers, read_header
from openwu.kernels.memory import free_memory

WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of a number; the float8 formats have one, too."""

LAYER = re.compile(r"^model\.layers\.(\d+)\.")
LINEAR = re.compile(r"^model\.layers\.\d+\.(self_attn|mlp\.shared_mlp|mlp\.experts)\..*proj\.weight$")
"""What is quantised: attention, shared MLP and experts of the decoder. Never routers, embeddings, encoders and VAE."""

TOKENS = 16_384
"""Tokens of one row of the KV cache that memory is kept for: text, source pictures and the new picture."""

ROWS = 2
"""Rows of a request: with and without the instruction."""

HEADROOM = 0.95
"""Share of free memory that may be used: the rest is for the allocator and the libraries' own."""


@dataclass(frozen=True)
class FreeMemory:
    """Free bytes of a machine, as far as they may be used."""

    gpus: tuple[int, ...]
    cpu: int | None
    """None where nobody says: then nothing is refused for lack of it."""
    first: int = 0
    """Number of the first GPU."""

    @classmethod
    def of(cls, device: torch.device) -> FreeMemory:
        """`cuda` means all GPUs, `cuda:1` that one, `cpu` none."""
        cpu = free_memory(torch.device("cpu"))
        if device.type != "cuda":
            return cls((), cpu)
        numbers = range(torch.cuda.device_count()) if device.index is None else [device.index]
        gpus = tuple(free_memory(torch.device("cuda", number)) or 0 for number in numbers)
        return cls(gpus, cpu, device.index or 0)


@dataclass(frozen=True)
class Needs:
    """Bytes that one way of loading takes."""

    weights: int
    """The whole base."""
    layer: int
    """Its largest decoder layer: what several GPUs may each leave unused, since layers are not cut."""
    cache: int
    """Keys and values of a request's rows."""
    reserve_bytes: int
    """Generator, its activations, and adapters, all on the first device."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.reserve_bytes


def read_headers(folder: Path) -> Headers:
    """Return dtypes and shapes of all tensors in a folder's safetensors; CheckpointError if files are missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index}: expected an object weight_map, got {error!r}; download it again"
            ) from error
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{folder}: expected safetensors, "
            + (
                f"{len(missing)} of {len(names)} files of its index are not there, {missing[0]} first"
                if names
                else "got none"
            )
            + "; download the whole folder (pickles are not read)"
        )
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        headers |= read_header(folder / name)
    return headers


def needs(
    headers: Headers, *, quantise: Quantise | None = None, dtype: torch.dtype | None = None, reserve_bytes: int = 0
) -> Needs:
    """What a base of these tensors takes. `dtype` None: floats stay in the dtype of the files."""
    layers: dict[str, int] = {}
    rest = 0
    for name, (code, shape) in headers.items():
        size = math.prod(shape) * _width(code, dtype)
        if quantise is not None and LINEAR.match(name) and wide_enough(shape, quantise):
            size = quantised_bytes(shape, quantise)
        if found := LAYER.match(name):
            layers[found[1]] = layers.get(found[1], 0) + size
        else:
            rest += size
    return Needs(rest + sum(layers.values()), max(layers.values(), default=0), _cache(headers, dtype), reserve_bytes)


def fits(need: Needs, free: FreeMemory, *, offload: bool = False) -> bool:
    """Whether weights, cache and what must stay free beside them fit."""
    if not free.gpus:
        return free.cpu is None or need.total <= HEADROOM * free.cpu
    together = int(HEADROOM * sum(free.gpus)) - need.layer * (len(free.gpus) - 1)
    if not offload:
        return need.total <= together and need.reserve_bytes + need.cache <= HEADROOM * free.gpus[0]
    # Layers wait in the machine's memory and visit the GPU one at a time, the next one while the last is still there.
    least = need.reserve_bytes + need.cache + 2 * need.layer <= HEADROOM * free.gpus[0]
    return least and (free.cpu is None or need.total <= together + HEADROOM * free.cpu)


def check_memory(
    headers: Headers,
    free: FreeMemory,
    *,
    quantise: Quantise | None,
    offload: bool,
    dtype: torch.dtype | None,
    reserve_bytes: int,
) -> Needs:
    """Return the needs; if they exceed `free`, raise OpenwuError with the numbers and the options that would fit."""
    asked = needs(headers, quantise=quantise, dtype=dtype, reserve_bytes=reserve_bytes)
    if fits(asked, free, offload=offload):
        return asked
    ways: dict[str, tuple[Needs, bool]] = {}
    if free.gpus:
        for label, how in (("--quantise 8bit", "8bit"), ("--quantise 4bit", "4bit"), ("--offload", None)):
            ways[label] = (needs(headers, quantise=how, dtype=dtype, reserve_bytes=reserve_bytes), how is None)  # type: ignore[arg-type]
    fitting = [f"{label} ({_gb(way.total)})" for label, (way, moved) in ways.items() if fits(way, free, offload=moved)]
    have = [f"cuda:{number} {_gb(size)}" for number, size in enumerate(free.gpus, start=free.first)]
    have += [] if free.cpu is None else [f"memory {_gb(free.cpu)}"]
    raise OpenwuError(
        f"memory: this base needs {_gb(asked.total)} (weights {_gb(asked.weights)}, cache of a request "
        f"{_gb(asked.cache)}, generator and adapters {_gb(asked.reserve_bytes)}), but free are "
        f"{', '.join(have) or 'nothing'}; "
        + (
            f"what would fit: {', '.join(fitting)}"
            if fitting
            else "no option makes it fit here; use more or larger GPUs"
        )
    )


def gpu_budgets(need: Needs, free: FreeMemory, *, offload: bool) -> dict[int | str, int]:
    """What transformers may fill with weights: bytes of every GPU, and of the machine where layers are offloaded."""
    reserved = [need.reserve_bytes + need.cache, *[need.cache // len(free.gpus)] * (len(free.gpus) - 1)]
    budgets: dict[int | str, int] = {
        free.first + number: max(0, int(HEADROOM * size) - kept)
        for number, (size, kept) in enumerate(zip(free.gpus, reserved, strict=True))
    }
    if offload:
        budgets["cpu"] = int(HEADROOM * free.cpu) if free.cpu is not None else need.weights
    return budgets


def _cache(headers: Headers, dtype: torch.dtype | None) -> int:
    """Keys and values: what qkv_proj writes beyond its queries, which are as wide as o_proj's input."""
    size = 0
    for name, (code, shape) in headers.items():
        other = headers.get(name.replace(".qkv_proj.", ".o_proj."))
        if name.endswith("self_attn.qkv_proj.weight") and other is not None:
            size += max(0, shape[0] - other[1][1]) * _width(code, dtype)
    return size * TOKENS * ROWS


def _width(code: str, dtype: torch.dtype | None) -> int:
    is_float = code.startswith(("F", "BF"))
    return dtype.itemsize if is_float and dtype is not None else WIDTHS.get(code, 1)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
