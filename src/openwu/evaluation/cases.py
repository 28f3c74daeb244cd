"""Cases: requests of the edit suite on test photographs or of a benchmark, and how the embedded model edits them.

The suite, the lab, every benchmark and every measurement of a model share `Case`; the embedded model's share one way to
batch them (`batches`).

Shapes: b cases, h and w sides of a photograph, p and q sides of a reference picture, K instruction tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openwu.backbones.embedded.network import noise_plane, place_planes
from openwu.data.suite import EDITS, Pair, Scene
from openwu.data.suite.photographs import TEST_PHOTOGRAPHS
from openwu.data.suite.phrases import LANGUAGES, load_phrases
from openwu.errors import OpenwuError, PictureError
from openwu.evaluation.metrics import psnr
from openwu.evaluation.pictures import to_image
from openwu.files.hashing import of_bytes, of_files
from openwu.images import read_picture
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

BATCH = 6
"""Most cases in one forward pass."""


Picture = Tensor | Path
"""A picture in memory `[3, h, w]` in 0..1, or a file that is read when it is needed."""


@dataclass(frozen=True)
class Case:
    """One request, of the edit suite or of a benchmark, with its known answer where there is one."""

    task: str
    """The sub-task: an edit of the suite, or a category of a benchmark."""
    instruction: str
    pictures: tuple[Picture, ...]
    """The picture to edit, then reference pictures."""
    answer: Picture | None = None
    """The picture that should come out, where that is known."""
    drawn_noise: Tensor | None = None
    """Standard normal noise `[1, h, w]`; None: `noise` is drawn with `key` as its seed."""
    photograph: str = ""
    """Name of the photograph: cases of one photograph are one cluster of the statistics."""
    language: str = ""
    split: str = ""
    """Whether the instruction is a training phrasing ("train") or was held out ("held_out")."""
    key: str = ""
    """Unique name within a benchmark."""
    tags: frozenset[str] = frozenset()
    """Subsets that the case belongs to, such as GEdit-Bench's "intersection"."""

    @property
    def picture(self) -> Tensor:
        """The picture to edit `[3, h, w]`."""
        return as_tensor(self.pictures[0])

    @property
    def reference(self) -> Tensor | None:
        """The first reference picture `[3, p, q]`."""
        return as_tensor(self.pictures[1]) if len(self.pictures) > 1 else None

    @property
    def target(self) -> Tensor:
        """The picture that should come out `[3, h, w]`. Raises OpenwuError where that is not known."""
        if self.answer is None:
            raise OpenwuError(f"case {self.key or self.task!r}: expected a known target, got none; use a judge instead")
        return as_tensor(self.answer)

    @property
    def noise(self) -> Tensor:
        """Standard normal noise `[1, h, w]` that the base sees: added grain, rain and scratches depend on it."""
        if self.drawn_noise is not None:
            return self.drawn_noise
        height, width = self.picture.shape[1:]
        return noise_plane(width, height, zlib.crc32(self.key.encode())).float()

    @property
    def planes(self) -> Tensor:
        """The base's noise, y and x `[3, h, w]`."""
        return torch.cat([self.noise, place_planes(*self.picture.shape[-2:])])

    @property
    def cluster(self) -> str:
        """Name of the cluster for statistics: the photograph, else the case itself."""
        return self.photograph or self.key

    def image(self, index: int = 0) -> Image.Image:
        """Read a picture as 8-bit RGB. Raises PictureError for a file that cannot be read."""
        return as_image(self.pictures[index])

    def identity(self) -> dict[str, object]:
        """Return what an editor's output may depend on, for cache keys: instruction and digests of all pictures."""
        return {"instruction": self.instruction, "pictures": [picture_digest(each) for each in self.pictures]}


def as_image(picture: Picture) -> Image.Image:
    """Convert a picture, or read its file, upright, as 8-bit RGB. Raises PictureError."""
    return to_image(picture) if isinstance(picture, Tensor) else read_picture(picture).to_image().convert("RGB")


def as_tensor(picture: Picture) -> Tensor:
    """Return a picture, or read its file, as `[3, h, w]` in 0..1. Raises PictureError."""
    return picture if isinstance(picture, Tensor) else image_tensor(as_image(picture))


def image_tensor(image: Image.Image) -> Tensor:
    """Convert a Pillow image to `[3, h, w]` in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def picture_digest(picture: Picture) -> str:
    """Return the SHA-256 of a file's bytes, or of the 8-bit pixels of a picture in memory. Raises PictureError."""
    if isinstance(picture, Tensor):
        image = to_image(picture)
        return of_bytes([repr(image.size).encode(), image.tobytes()]).hexdigest()
    try:
        return of_files([picture]).hexdigest()
    except OSError as error:
        raise PictureError(f"{picture}: cannot be read ({error.strerror or error})") from error


def make_case(
    task: str,
    instruction: str,
    scene: Scene,
    *,
    photograph: str = "",
    language: str = "",
    split: str = "",
    pair: Pair | None = None,
) -> Case:
    """Make the case of a scene; `pair` is made by the edit suite unless it is given."""
    made = EDITS[task].make_pair(scene) if pair is None else pair
    pictures = (made.picture,) if made.reference is None else (made.picture, made.reference)
    return Case(task, instruction, pictures, made.target, scene.noise, photograph, language, split)


def seeded_scene(source: Tensor, key: str, strength: float = 1.0, second: Tensor | None = None) -> Scene:
    """Make a scene of a photograph whose noise and random draws depend on a key alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    noise = torch.randn(1, *source.shape[1:], generator=generator)
    return Scene(source, noise, generator, strength, second)


def first_phrase(task: str, language: str = "en") -> str:
    """Return the first training phrasing of a sub-task."""
    return load_phrases()[task][language]["train"][0]


def draw_cases(
    photographs: Mapping[str, Tensor], tasks: Sequence[str], seed: int, only: str | None = None
) -> list[Case]:
    """Draw a case of every task on every photograph, or on `only` one of them.

    Each photograph's requests are in one language and with phrasings of one split; they alternate over photographs.
    """
    cases = []
    for name in photographs if only is None else [only]:
        turn = seed + (sorted(TEST_PHOTOGRAPHS).index(name) if name in TEST_PHOTOGRAPHS else 0)
        language, split = LANGUAGES[turn % 2], ("train", "held_out")[turn // 2 % 2]
        second = following(name, photographs)
        for task in tasks:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{task}/{seed}".encode()))
            phrases = load_phrases()[task][language][split]
            instruction = phrases[int(torch.randint(len(phrases), (), generator=generator))]
            noise = torch.randn(1, *photographs[name].shape[1:], generator=generator)
            scene = Scene(photographs[name], noise, generator, second=second)
            cases.append(make_case(task, instruction, scene, photograph=name, language=language, split=split))
    return cases


def following(name: str, photographs: Mapping[str, Tensor]) -> Tensor:
    """Return the second photograph of reference edits: the next one by name."""
    names = sorted(photographs)
    return photographs[names[(names.index(name) + 1) % len(names)]]


def batches(cases: Sequence[Case]) -> Iterator[slice]:
    """Cut cases into runs of neighbours for one forward pass each: pictures and references are equally large."""
    start = 0
    while start < len(cases):
        stop = start + 1
        while stop < len(cases) and stop - start < BATCH and _fit(cases[start : stop + 1]):
            stop += 1
        yield slice(start, stop)
        start = stop


def _fit(cases: Sequence[Case]) -> bool:
    references = {case.reference.shape for case in cases if case.reference is not None}
    return len({case.picture.shape for case in cases}) == 1 and len(references) <= 1


def encode(model: EmbeddedModel, cases: Sequence[Case]) -> Tensor:
    """Encode the instructions: `[b, K, text_dim]`."""
    text: Tensor = model.instruction([case.instruction for case in cases])
    return text


def generate(model: EmbeddedModel, cases: Sequence[Case]) -> Adapter:
    """Generate one adapter for each case."""
    parts = []
    for rows in batches(cases):
        some = cases[rows]
        first = next((case.reference for case in some if case.reference is not None), None)
        references = present = None
        if first is not None:
            empty = torch.zeros_like(first)
            references = torch.stack([empty if case.reference is None else case.reference for case in some])
            present = torch.tensor([case.reference is not None for case in some])
        pictures = torch.stack([case.picture for case in some])
        parts.append(model.adapt(pictures, encode(model, some), references, present))
    return Adapter.stack(parts)


def edit(
    model: EmbeddedModel, cases: Sequence[Case], adapter: Adapter | None, text: Tensor | None = None
) -> list[Tensor]:
    """Edit every case: `[3, h, w]` each, with an adapter per case, one for all, or none.

    text: the base's instruction tokens `[b, K, text_dim]`; None: those of the cases' instructions.
    """
    edited: list[Tensor] = []
    for rows in batches(cases):
        some = cases[rows]
        own = adapter if adapter is None or adapter.batch == 1 else adapter.select(range(rows.start, rows.stop))
        pictures, planes = (torch.stack(parts) for parts in zip(*((c.picture, c.planes) for c in some), strict=True))
        edited += model.edit(pictures, planes, encode(model, some) if text is None else text[rows], own)
    return edited


def score(model: EmbeddedModel, cases: Sequence[Case], adapter: Adapter | None) -> list[float]:
    """Return every case's PSNR in dB under an adapter per case, one for all, or none."""
    return [float(psnr(output, case.target)) for output, case in zip(edit(model, cases, adapter), cases, strict=True)]
