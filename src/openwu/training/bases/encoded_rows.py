"""Encode pairs with a base's encoders into latent batches, once into files or anew in every step.

With a store all pairs are encoded before the first step, and the encoders are not needed afterwards; without one they
run in every step. The rows are the same: each pair is encoded alone.
"""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.conditions import Encoder
from openwu.data.pairs import SHOWN, Pair, Pairs, content
from openwu.errors import DatasetError, OpenwuError
from openwu.files.hashing import of_bytes, of_json
from openwu.files.writing import atomic_file
from openwu.kernels.memory import gigabytes
from openwu.training.distributed import Processes
from openwu.types import BaseRequest, Condition, LatentBatch, Segment

FORMAT = 1
"""Version of the files; part of their names."""
_TOKENS, _MASK = "tokens", "mask"


@dataclass(frozen=True)
class RowStore:
    """A folder of encoded rows, one safetensors file each."""

    folder: Path
    made_by: str
    """Identifies the base and the sizes that its encoders work at; rows of others have other names."""

    def path(self, pair: Pair, sentence: str) -> Path:
        """Return the file of a pair with one of its wordings, whether it exists or not."""
        digest = of_json([FORMAT, self.made_by, sentence, len(pair.images)])
        for file in (*pair.images, pair.target):
            digest.update(of_bytes([content(file)]).digest())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, path: Path) -> LatentBatch | None:
        """Read a row; None if there is none, or its file is broken."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                stored = (file.metadata() or {}).get("checksum")
            return from_tensors(tensors) if stored == _checksum(tensors) else None
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def write(self, path: Path, row: LatentBatch) -> None:
        """Write a row atomically; two processes may write the same one."""
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in to_tensors(row).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as part:
            save_file(tensors, part, {"checksum": _checksum(tensors)})


def to_tensors(batch: LatentBatch) -> dict[str, Tensor]:
    """Flatten a batch to named tensors; the first axis of each is the samples."""
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
    """Rebuild the batch that `to_tensors` flattened. Raises KeyError for missing tensors."""
    names = [name.split("/")[1] for name in tensors if name.startswith("more/") and name.endswith(_TOKENS)]
    more = {name: Segment(tensors[f"more/{name}/{_TOKENS}"], tensors.get(f"more/{name}/{_MASK}")) for name in names}
    condition = Condition(tensors[f"condition/{_TOKENS}"], tensors.get(f"condition/{_MASK}"), more)
    inputs = {name.removeprefix("inputs/"): value for name, value in tensors.items() if name.startswith("inputs/")}
    return LatentBatch(tensors["target"], inputs, condition)


def joined(rows: Sequence[LatentBatch]) -> LatentBatch:
    """Concatenate rows to one batch. Tensors with a mask may differ in length, and are padded with zeros at the end.

    Raises DatasetError for other differences: such rows do not fit into one call of the denoiser.
    """
    parts = [_masked(to_tensors(row)) for row in rows]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise DatasetError("pairs: expected rows made by one base in a batch, got different tensors; empty the cache")
    return from_tensors({name: _cat(name, parts) for name in parts[0]})


def to_device(batch: LatentBatch, device: torch.device) -> LatentBatch:
    """Move a batch to a device. Targets become float32, so that noise and loss are exact."""
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
    """Return the name of a tensor's mask; of a mask, its own."""
    if name.startswith("inputs/"):
        return name if name.endswith("_mask") else f"{name}_mask"
    return f"{name.rpartition('/')[0]}/{_MASK}"


def _masked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the masks of condition segments that have none because all tokens are real."""
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


@dataclass
class Encoded:
    """Encoded rows of pairs, from a store or encoded on the spot."""

    backbone: PipelineBackbone
    store: RowStore | None
    device: torch.device
    """Where the encoders run."""
    encoder: Encoder | None = None
    """Encodes the conditions; None: the base itself."""

    def __post_init__(self) -> None:
        self._paths: dict[tuple[str, str], Path] = {}

    def fill(self, parts: Iterable[Pairs], processes: Processes) -> int:
        """Encode every row that the store does not have or whose file is broken; return how many this process did.

        Processes share the work. Raises one DatasetError that lists every pair the base cannot take.
        """
        assert self.store is not None
        every = [(pair, text) for part in parts for pair in part.pairs for text in pair.instructions]
        mine = every[processes.rank :: processes.count]
        missing = [
            (pair, text)
            for pair, text in tqdm(mine, desc="checking the cache", unit="pair", disable=len(mine) < SHOWN)
            if self.store.read(self._path(pair, text)) is None
        ]
        problems: list[str] = []
        if missing:
            self.backbone.place(encoders=self.device)
            if self.encoder is not None and self.encoder.asks_denoiser:
                self.backbone.place(denoiser=self.device)
            self.place_encoder(self.device)
        for number, (pair, text) in enumerate(tqdm(missing, desc="encoding", unit="pair", disable=not missing)):
            path = self._path(pair, text)
            try:
                self.store.write(path, self._encode(pair, text))
            except OpenwuError as error:
                problems.append(f"{pair.where}: {error}")
                continue
            if number == len(problems):
                _check_disk(path, len(missing) - 1)
        problems = processes.all_gather(problems)
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            head = f"{len(problems)} problems with the training pairs; nothing was trained:"
            raise DatasetError.listing(head, [*problems[:SHOWN], *more])
        processes.barrier()
        return len(missing)

    def place_encoder(self, device: str | torch.device) -> None:
        """Move an encoder's own weights, if it has some; "meta" drops them for good."""
        if self.encoder is not None:
            self.encoder.place(device)

    def batch(self, chosen: Sequence[tuple[Pair, str]]) -> LatentBatch:
        """Return one batch of some pairs with their wordings, on the device of the rows."""
        return joined([self._row(pair, text) for pair, text in chosen])

    def _row(self, pair: Pair, text: str) -> LatentBatch:
        if self.store is None:
            return self._encode(pair, text)
        path = self._path(pair, text)
        row = self.store.read(path)
        if row is None:
            raise DatasetError(
                f"{path}: expected the encoded pair {pair.where}, found it broken or gone; start the same command "
                "again: it is encoded anew, and the training resumes from its last checkpoint"
            )
        return row

    def _encode(self, pair: Pair, text: str) -> LatentBatch:
        pictures, target = pair.load()
        request = BaseRequest(tuple(_to_image(picture) for picture in pictures), text)
        row = self.backbone.latent_batch([request], [target])
        if self.encoder is None:
            return row
        # Some encoders draw noise from the request's seed: every pair has its own, since edits may have any.
        seeded = dataclasses.replace(request, seed=_seed_of(pair, text))
        return dataclasses.replace(row, condition=self.encoder.condition([seeded]))

    def _path(self, pair: Pair, text: str) -> Path:
        """Return `RowStore.path`, which reads the pictures, once per pair and wording."""
        assert self.store is not None
        key = (pair.where, text)
        if key not in self._paths:
            self._paths[key] = self.store.path(pair, text)
        return self._paths[key]


def _check_disk(first: Path, others: int) -> None:
    """Raise OpenwuError if `others` more files of the first one's size do not fit on the disk."""
    needed, free = others * first.stat().st_size, shutil.disk_usage(first.parent).free
    if needed > free:
        raise OpenwuError(
            f"cache: {others} more pairs need about {gigabytes(needed)} at {first.parent.parent}, which has "
            f"{gigabytes(free)} free; pass cache=FOLDER on a larger disk, fewer wordings or fewer pixels"
        )


def _seed_of(pair: Pair, text: str) -> int:
    """Hash pictures and words to a seed, so that a row is the same wherever it is encoded."""
    digest = of_bytes([text.encode(), *(content(image) for image in pair.images)])
    return int.from_bytes(digest.digest()[:4], "big")


def _to_image(picture: Tensor) -> Image.Image:
    """Convert `[3, h, w]` in 0..1, from 8 bits, back to RGB exactly."""
    return Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
