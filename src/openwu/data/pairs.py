"""Training pairs of one's own: pictures, an instruction and the target, from JSONL, folders or a Hugging Face data set.

All pairs are checked before the first step: a broken line, a missing picture or a target of another size is reported
with its line number; nothing is skipped in silence. The pairs of a step are balanced over tasks.

A line of JSONL is `{"images": ["a.jpg"], "instruction": "...", "target": "b.jpg", "task": "..."}`: paths relative to
the file, reference pictures behind the picture to edit; `instruction` may be a list of wordings; `task` may be missing,
then all pairs are of one task. A folder holds `pairs.jsonl`, or a folder for each task with `instructions.txt` (one a
line), `input/` and `target/`, in which equal names belong together.

Shapes: h, w sides of a picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from openwu.errors import DatasetError
from openwu.files.hashing import of_json

SHOWN = 20
"""Problems that an error lists; of more it gives the number."""
LISTING = "pairs.jsonl"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
ORIENTATION = 0x0112
"""EXIF's orientation tag."""

File = Path | Image.Image
"""Where a picture is, or the picture itself."""


def content(file: File) -> bytes:
    """Return the bytes to hash a picture by: the file's, not decoded, or the pixels."""
    return file.read_bytes() if isinstance(file, Path) else file.tobytes()


@dataclass(frozen=True)
class Pair:
    """One pair, not yet loaded."""

    images: tuple[File, ...]
    """The picture to edit, then reference pictures."""
    instructions: tuple[str, ...]
    """Wordings of the request; a training draws one."""
    target: File
    """The edited picture; as large as the first one."""
    task: str
    where: str
    """For errors: file and line, or row."""

    def load(self) -> tuple[list[Tensor], Tensor]:
        """Load pictures and target, `[3, h, w]` each, in 0..1; upright as EXIF says, transparency on white."""
        return [load_picture(image) for image in self.images], load_picture(self.target)


@dataclass(frozen=True)
class Pairs:
    """Checked pairs."""

    pairs: tuple[Pair, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, in the order in which they first come."""
        return tuple(dict.fromkeys(pair.task for pair in self.pairs))

    def step(self, step: int, count: int, seed: int = 0) -> list[tuple[Pair, str]]:
        """Return the pairs of a step with one of their wordings each; they depend on step and seed alone.

        Tasks take turns in shuffled rounds, however many pairs they have; within a task, pairs do.
        """
        chosen = []
        for position in range(step * count, (step + 1) * count):
            turn, place = divmod(position, len(self.tasks))
            task = self.tasks[_shuffled(len(self.tasks), seed * 7_000_003 + turn)[place]]
            own = self._by_task[task]
            again, which = divmod(turn, len(own))
            pair = self.pairs[own[_shuffled(len(own), seed * 9_000_011 + again)[which]]]
            draw = torch.Generator().manual_seed(seed * 1_000_003 + position)
            chosen.append((pair, pair.instructions[int(torch.randint(len(pair.instructions), (), generator=draw))]))
        return chosen

    @cached_property
    def _by_task(self) -> dict[str, list[int]]:
        members: dict[str, list[int]] = {task: [] for task in self.tasks}
        for i, pair in enumerate(self.pairs):
            members[pair.task].append(i)
        return members


def split_pairs(pairs: Pairs, share: float) -> tuple[Pairs, Pairs]:
    """Split into (training, held back): of every task the last `share`, at least one where a task has two pairs."""
    training, held_back = [], []
    for task in pairs.tasks:
        own = [pair for pair in pairs.pairs if pair.task == task]
        count = min(len(own) - 1, max(1, round(share * len(own)))) if share else 0
        training += own[: len(own) - count]
        held_back += own[len(own) - count :]
    return Pairs(tuple(training)), Pairs(tuple(held_back))


def pairs_hashes(*parts: Pairs) -> dict[str, str]:
    """Hash every pair: its place in the data -> SHA-256 of its task, instructions and pictures' bytes."""
    return {pair.where: _hash(pair) for pairs in parts for pair in pairs.pairs}


def _hash(pair: Pair) -> str:
    digest = of_json([pair.task, *pair.instructions])
    for file in (*pair.images, pair.target):
        digest.update(content(file))
    return digest.hexdigest()


def read_pairs(source: str | Path) -> Pairs:
    """Read and check all pairs of a JSONL file or a folder. Raises one DatasetError with every problem."""
    source = Path(source)
    if source.is_dir() and not (source / LISTING).is_file():
        return _checked(*_from_folders(source))
    return _checked(*_from_lines(source / LISTING if source.is_dir() else source))


def pairs_of_dataset(
    rows: Sequence[Mapping[str, Any]],
    *,
    images: str | Sequence[str],
    instruction: str,
    target: str,
    task: str | None = None,
) -> Pairs:
    """Read pairs from a `datasets.Dataset` or any rows of PIL pictures; the arguments name the columns."""
    columns = [images] if isinstance(images, str) else list(images)
    wanted = [*columns, instruction, target, *([task] if task else [])]
    pairs, problems = [], []
    for number, row in enumerate(rows):
        where = f"row {number}"
        missing = [name for name in wanted if row.get(name) is None]
        if missing:
            problems.append(f"{where}: expected columns {wanted}, got nothing in {missing} (it has {sorted(row)})")
            continue
        found = tuple(row[name] for name in columns)
        if not all(isinstance(picture, Image.Image) for picture in (*found, row[target])):
            kinds = [type(picture).__name__ for picture in (*found, row[target])]
            problems.append(f"{where}: expected pictures in {[*columns, target]}, got {kinds}")
            continue
        pairs.append(Pair(found, (str(row[instruction]),), row[target], str(row[task]) if task else "", where))
    return _checked(pairs, problems)


def load_picture(file: File) -> Tensor:
    """Load a picture `[3, h, w]` in 0..1, upright, transparency on white."""
    if isinstance(file, Image.Image):
        return _to_tensor(file)
    with Image.open(file) as opened:
        return _to_tensor(opened)


def _to_tensor(picture: Image.Image) -> Tensor:
    turned = ImageOps.exif_transpose(picture)
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
    return torch.from_numpy(np.array(turned.convert("RGB"))).permute(2, 0, 1).float() / 255


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _from_lines(file: Path) -> tuple[list[Pair], list[str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"pairs: expected a JSONL file or a folder, got {file} ({error})") from error
    pairs, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            problems.append(f"{where}: expected a JSON object on one line ({error})")
            continue
        wrong = _wrong_fields(entry)
        if wrong:
            problems.append(f"{where}: {wrong}")
            continue
        images = tuple(file.parent / name for name in entry["images"])
        target, task = file.parent / entry["target"], entry.get("task", "")
        pairs.append(Pair(images, _wordings(entry["instruction"]), target, task, where))
    return pairs, problems


def _wrong_fields(entry: object) -> str | None:
    """Return what is wrong with a line's object; None if nothing is."""
    if not isinstance(entry, dict):
        return f"expected an object with fields, got {type(entry).__name__}"
    known = ("images", "instruction", "target", "task")
    unknown = [name for name in entry if name not in known]
    if unknown:
        return f"expected fields {list(known)}, got {unknown}"
    images = entry.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(name, str) and name for name in images):
        return f"images: expected a list of at least one path, got {images!r}"
    if not all(isinstance(text, str) and text.strip() for text in _wordings(entry.get("instruction"))):
        return f"instruction: expected text, or a list of wordings, got {entry.get('instruction')!r}"
    if not isinstance(entry.get("target"), str) or not entry["target"].strip():
        return f"target: expected text, got {entry.get('target')!r}"
    if not isinstance(entry.get("task", ""), str):
        return f"task: expected text, got {entry['task']!r}"
    return None


def _wordings(given: Any) -> tuple[Any, ...]:
    """Return a line's wordings: one, or those of a list that is not empty."""
    return tuple(given) if isinstance(given, list) and given else (given,)


def _from_folders(folder: Path) -> tuple[list[Pair], list[str]]:
    """Read a task from each folder in this one."""
    pairs, problems = [], []
    tasks = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not tasks:
        problems.append(f"{folder}: expected {LISTING}, or a folder for each task; found neither")
    for task in tasks:
        try:
            text = (task / "instructions.txt").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
        wordings = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not wordings:
            problems.append(f"{task.name}/instructions.txt: expected at least one instruction, one a line")
            continue
        inputs, targets = _pictures(task / "input"), _pictures(task / "target")
        if not inputs and not targets:
            problems.append(f"{task.name}: expected pictures in {task.name}/input and {task.name}/target")
        problems += [f"{task.name}/input/{inputs[n].name}: no target of this name" for n in inputs if n not in targets]
        problems += [f"{task.name}/target/{targets[n].name}: no input of this name" for n in targets if n not in inputs]
        pairs += [
            Pair((inputs[name],), wordings, targets[name], task.name, f"{task.name}/input/{inputs[name].name}")
            for name in inputs
            if name in targets
        ]
    return pairs, problems


def _pictures(folder: Path) -> dict[str, Path]:
    """Return name without suffix -> file."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.stem: file for file in files if file.suffix.lower() in SUFFIXES}


def _checked(pairs: list[Pair], problems: list[str]) -> Pairs:
    """Check every picture's header; all problems in one error."""
    for pair in tqdm(pairs, desc="checking pairs", unit="pair", disable=len(pairs) < 500):
        sizes = []
        for name, file in (*(("images", image) for image in pair.images), ("target", pair.target)):
            try:
                sizes.append(picture_size(file))
            except FileNotFoundError:
                problems.append(f"{pair.where}: {name}: expected a picture at {file}, found none")
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                problems.append(f"{pair.where}: {name}: expected a picture that Pillow reads, got {file} ({error})")
        if len(sizes) == len(pair.images) + 1 and sizes[0] != sizes[-1]:
            first, last = ("x".join(map(str, size)) for size in (sizes[0], sizes[-1]))
            problems.append(f"{pair.where}: target: expected the first picture's size {first}, got {last}")
    if problems:
        more = len(problems) - SHOWN
        shown = [*problems[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise DatasetError.listing(f"{len(problems)} problems with the training pairs; nothing was trained:", shown)
    if not pairs:
        raise DatasetError("pairs: expected at least one, got none")
    return Pairs(tuple(pairs))


def picture_size(file: File) -> tuple[int, int]:
    """Read width and height of the upright picture from its header."""
    if isinstance(file, Image.Image):
        return _turned_size(file)
    with Image.open(file) as opened:
        return _turned_size(opened)


def _turned_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    return (height, width) if picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else (width, height)
