"""Latent batches of one row, kept: what a base's encoders say of a pair goes to disk once, and batches are made of it.

Enters: a pair with one of its wordings, and a function that asks the encoders. Leaves: rows, and batches joined of them
in which shorter texts are padded and masked. A row is one safetensors file with a checksum, written beside its place
and renamed; its name depends on the pair's content and on what made it, so nothing stale is ever read.

Shapes: a row is a `LatentBatch` of b = 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from openwu.data.pairs import Pair, content
from openwu.errors import DatasetError
from openwu.files.hashing import of_bytes, of_json
from openwu.files.writing import whole_file
from openwu.types import Condition, LatentBatch, Segment

FORMAT = 1
"""Rises when files of rows get another meaning."""
_TOKENS, _MASK = "tokens", "mask"


@dataclass(frozen=True)
class RowStore:
    """A folder of rows."""

    folder: Path
    made_by: str
    """Depends on the base and every size that its encoders work at; rows made by others are not found."""

    def path(self, pair: Pair, sentence: str) -> Path:
        """Where the row of a pair with one of its wordings stands, whether it is there or not."""
        said = of_json([FORMAT, self.made_by, sentence, len(pair.images)])
        for file in (*pair.images, pair.target):
            said.update(of_bytes([content(file)]).digest())
        name = said.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, path: Path) -> LatentBatch | None:
        """A row; None where there is none, or where its file is broken."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                stored = (file.metadata() or {}).get("checksum")
            return from_tensors(tensors) if stored == _checksum(tensors) else None
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def write(self, path: Path, row: LatentBatch) -> None:
        """Whole or not at all; two processes may write the same row."""
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in to_tensors(row).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, durable=False) as part:
            save_file(tensors, part, {"checksum": _checksum(tensors)})


def to_tensors(batch: LatentBatch) -> dict[str, Tensor]:
    """Every tensor of a batch under a name of its own; samples come first in each."""
    found = {"target": batch.target, **{f"inputs/{name}": value for name, value in batch.inputs.items()}}
    condition = batch.condition
    segments = {"condition": Segment(condition.tokens, condition.mask)}
    segments |= {f"more/{name}": segment for name, segment in condition.more.items()}
    for name, segment in segments.items():
        found[f"{name}/{_TOKENS}"] = segment.tokens
        if segment.mask is not None:
            found[f"{name}/{_MASK}"] = segment.mask
    return found


def from_tensors(tensors: Mapping[str, Tensor]) -> LatentBatch:
    """What `to_tensors` took apart. KeyError where something is missing."""
    names = [name.split("/")[1] for name in tensors if name.startswith("more/") and name.endswith(_TOKENS)]
    more = {name: Segment(tensors[f"more/{name}/{_TOKENS}"], tensors.get(f"more/{name}/{_MASK}")) for name in names}
    condition = Condition(tensors[f"condition/{_TOKENS}"], tensors.get(f"condition/{_MASK}"), more)
    inputs = {name.removeprefix("inputs/"): value for name, value in tensors.items() if name.startswith("inputs/")}
    return LatentBatch(tensors["target"], inputs, condition)


def joined(rows: Sequence[LatentBatch]) -> LatentBatch:
    """One batch of several rows. Tensors with a mask may differ in length, and are padded with zeros behind.

    Raises DatasetError for other differences: such rows do not fit into one call of the denoiser.
    """
    parts = [_masked(to_tensors(row)) for row in rows]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise DatasetError("pairs: expected rows made by one base in a batch, got different tensors; empty the cache")
    return from_tensors({name: _cat(name, parts) for name in parts[0]})


def to_device(batch: LatentBatch, device: torch.device) -> LatentBatch:
    """The batch where it is computed. Targets become float32, so that noise and loss are exact."""
    moved = from_tensors({name: value.to(device) for name, value in to_tensors(batch).items()})
    return LatentBatch(moved.target.float(), moved.inputs, moved.condition)


def _cat(name: str, parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
    values = [part[name] for part in parts]
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) == 1:
        return torch.cat(values)
    mask = _mask_of(name)
    if (name != mask and mask not in parts[0]) or len({shape[1:] for shape in shapes}) > 1:
        raise DatasetError(
            f"pairs: expected {name} of one shape in a batch, got {sorted(shapes)}; this base cannot take these pairs "
            "together: train with one request a batch, generator.shapes=((1,0),)"
        )
    longest = max(shape[0] for shape in shapes)
    # Lengths stand second, in front of all other axes.
    return torch.cat([F.pad(value, (0, 0) * (value.ndim - 2) + (0, longest - value.shape[1])) for value in values])


def _mask_of(name: str) -> str:
    """The name of a tensor's mask; a mask's is its own."""
    if name.startswith("inputs/"):
        return name if name.endswith("_mask") else f"{name}_mask"
    return f"{name.rpartition('/')[0]}/{_MASK}"


def _masked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With a mask for every segment of the condition: None says that all tokens are real, and rows may differ there."""
    full = dict(tensors)
    for name, value in tensors.items():
        if not name.startswith("inputs/") and name.endswith(f"/{_TOKENS}"):
            full.setdefault(_mask_of(name), torch.ones(value.shape[:2], dtype=torch.bool, device=value.device))
    return full


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), total)
        total = zlib.crc32(value.flatten().view(torch.uint8).numpy().tobytes(), total)
    return f"{total:08x}"
