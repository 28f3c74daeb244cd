"""What a base's encoders say of pairs, asked once: pairs enter, latent batches leave.

With a store the rows of all pairs are made before the first step, and the encoders are not needed afterwards; without
one they are asked in every step. The rows are the same, made one pair at a time.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from openwu.backbone.pipeline import PipelineBackbone
from openwu.data.pairs import SHOWN, Pair, Pairs, content
from openwu.errors import DatasetError, OpenwuError
from openwu.files.hashing import of_bytes
from openwu.protocols import ConditionEncoder
from openwu.training.processes import Processes
from openwu.training.rows import RowStore, joined
from openwu.types import BaseRequest, LatentBatch


@dataclass
class Encoded:
    """Rows of pairs."""

    backbone: PipelineBackbone
    store: RowStore | None
    device: torch.device
    """Where the encoders are asked."""
    encoder: ConditionEncoder | None = None
    """What makes the conditions; None: the base itself."""

    def __post_init__(self) -> None:
        self._paths: dict[tuple[str, str], Path] = {}

    def fill(self, parts: Iterable[Pairs], processes: Processes) -> int:
        """Make every row that the store does not have or whose file is broken; returns how many this process made.

        Processes share the work. Raises one DatasetError with every pair that the base cannot take.
        """
        assert self.store is not None
        every = [(pair, text) for part in parts for pair in part.pairs for text in pair.instructions]
        mine = every[processes.rank :: processes.count]
        missing = [
            (pair, text)
            for pair, text in tqdm(mine, desc="looking at the cache", unit="pair", disable=len(mine) < SHOWN)
            if self.store.read(self._path(pair, text)) is None
        ]
        problems: list[str] = []
        if missing:
            self.backbone.place(encoders=self.device)
            if getattr(self.encoder, "asks_denoiser", False):
                self.backbone.place(denoiser=self.device)
            self.place_encoder(self.device)
        for number, (pair, text) in enumerate(tqdm(missing, desc="encoding", unit="pair", disable=not missing)):
            path = self._path(pair, text)
            try:
                self.store.write(path, self._made(pair, text))
            except OpenwuError as error:
                problems.append(f"{pair.where}: {error}")
                continue
            if number == len(problems):
                _check_disk(path, len(missing) - 1)
        problems = processes.gathered(problems)
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            head = f"{len(problems)} problems with the training pairs; nothing was trained:"
            raise DatasetError.listing(head, [*problems[:SHOWN], *more])
        processes.wait()
        return len(missing)

    def place_encoder(self, device: str | torch.device) -> None:
        """Move an encoder that has weights of its own; "meta" drops them for good."""
        if (place := getattr(self.encoder, "place", None)) is not None:
            place(device)

    def batch(self, chosen: Sequence[tuple[Pair, str]]) -> LatentBatch:
        """One batch of some pairs with their wordings, where the rows are."""
        return joined([self._row(pair, text) for pair, text in chosen])

    def _row(self, pair: Pair, text: str) -> LatentBatch:
        if self.store is None:
            return self._made(pair, text)
        path = self._path(pair, text)
        row = self.store.read(path)
        if row is None:
            raise DatasetError(
                f"{path}: expected the encoded pair {pair.where}, found it broken or gone; start the same command "
                "again: it is made anew, and the training goes on from its last checkpoint"
            )
        return row

    def _made(self, pair: Pair, text: str) -> LatentBatch:
        pictures, target = pair.load()
        request = BaseRequest(tuple(_to_image(picture) for picture in pictures), text)
        row = self.backbone.latent_batch([request], [target])
        if self.encoder is None or self.encoder is self.backbone:
            return row
        # Some read noise of the request's seed: every pair has its own, since edits will come with any.
        seeded = dataclasses.replace(request, seed=_seed_of(pair, text))
        return dataclasses.replace(row, condition=self.encoder.condition([seeded]))

    def _path(self, pair: Pair, text: str) -> Path:
        """Pictures are read once for it."""
        assert self.store is not None
        key = (pair.where, text)
        if key not in self._paths:
            self._paths[key] = self.store.path(pair, text)
        return self._paths[key]


def _check_disk(first: Path, others: int) -> None:
    """Raise where as many more files like the first do not fit."""
    needed, free = others * first.stat().st_size, shutil.disk_usage(first.parent).free
    if needed > free:
        raise OpenwuError(
            f"cache: {others} more pairs need about {needed / 1e9:.1f} GB at {first.parent.parent}, which has "
            f"{free / 1e9:.1f} GB free; pass cache=FOLDER on a larger disk, fewer wordings or fewer pixels"
        )


def _seed_of(pair: Pair, text: str) -> int:
    """Of its pictures and words, so that a row is the same wherever it is made."""
    digest = of_bytes([text.encode(), *(content(image) for image in pair.images)])
    return int.from_bytes(digest.digest()[:4], "big")


def _to_image(picture: Tensor) -> Image.Image:
    """`[3, h, w]` in 0..1, made of 8 bits -> RGB, exactly."""
    return Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
