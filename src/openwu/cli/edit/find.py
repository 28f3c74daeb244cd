"""Find the photographs and clips that a command line names: files, folders, patterns, and standard input."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openwu.cli.console import UsageError
from openwu.errors import OpenwuError, PictureError
from openwu.images.source import RAW_SUFFIXES
from openwu.images.write import SUFFIXES
from openwu.video.probe import CLIP_SUFFIXES, is_clip

PIPE = "-"
"""Stands for standard input or output."""

PHOTO_SUFFIXES = frozenset(SUFFIXES) | {
    *(".jpe", ".jfif", ".gif", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".hif", ".avifs")
}
"""What is taken from a folder; a file that is named itself may have any suffix."""

_RESULT = re.compile(r"(\.edited|\.compare)+$", re.IGNORECASE)
"""End of the stem of what `openwu edit` writes beside a photo."""


@dataclass(frozen=True)
class Input:
    """One photograph or clip to edit."""

    path: Path
    """As it is named, or as it was found; PIPE for standard input."""
    inside: Path = Path()
    """Its folder, relative to the named folder in which it was found."""
    data: bytes | None = field(default=None, repr=False)
    """The bytes of a file that came through standard input."""

    @property
    def is_clip(self) -> bool:
        """Whether it is a video, by its name."""
        return self.data is None and is_clip(self.path)

    @property
    def stem(self) -> str:
        """The file's name without suffix, for the names of outputs."""
        return "stdin" if self.data is not None else self.path.stem


@dataclass
class Found:
    """The photographs of a command line, and what was left out."""

    photos: list[Input] = field(default_factory=list)
    problems: list[tuple[str, OpenwuError]] = field(default_factory=list)
    """(what was named, why nothing was found there)."""
    notes: list[str] = field(default_factory=list)
    batch: bool = False
    """Whether the command line names more than one photo, or a place with any number of them."""


def find_photos(named: Sequence[str], *, recursive: bool, output: str | None) -> Found:
    """Find every photograph once, in the order of `named`, and inside folders by name.

    A pattern that the shell did not expand is expanded here. Left out of folders: hidden files, what is no picture by
    its name, and the folder `output`. Left out of several photos: results of earlier edits (`x.edited.jpg`) beside
    their originals. Raises UsageError for a standard input that holds no picture.
    """
    found = Found(batch=len(named) > 1)
    for text in named:
        name = os.path.expanduser(text)  # noqa: PTH111  # with the slash at its end
        if name == PIPE:
            found.photos.append(_from_stdin(any(photo.data is not None for photo in found.photos)))
        elif os.path.lexists(name) or not glob.has_magic(name):
            _add(found, name, recursive, output)
        else:
            matches = sorted(glob.glob(name, recursive=True), key=_natural)  # noqa: PTH207  # also from the root
            found.batch = True
            for match in matches:
                _add(found, match, recursive, output)
            if not matches:
                found.problems.append(
                    (name, PictureError(f"{name}: nothing matches; check the pattern and the folder"))
                )
    unique: dict[str, Input] = {}
    for photo in found.photos:
        unique.setdefault(os.path.abspath(photo.path), photo)  # noqa: PTH100  # a link is a photo of its own
    found.photos = list(unique.values())
    if found.batch:
        found.photos, results = _without_results(found.photos)
        if results:
            found.notes.append(f"{_counted(results)} left out: made by earlier edits; name one alone to edit it again")
    return found


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; False where nobody may look, and for names that are too long."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: str | Path) -> bool:
    """Whether a file is there; False where nobody may look, and for names that are too long."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _from_stdin(again: bool) -> Input:
    if again:
        raise UsageError(f"{PIPE}: expected once, standard input holds one picture; name the others as files")
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(f"{PIPE}: expected a picture on standard input, got a terminal; for example < photo.jpg")
    data = sys.stdin.buffer.read()
    if not data:
        raise UsageError(f"{PIPE}: expected a picture on standard input, got nothing; for example < photo.jpg")
    return Input(Path(PIPE), data=data)


def _add(found: Found, name: str, recursive: bool, output: str | None) -> None:
    """Add a file that is named, or the pictures in a folder."""
    if not is_folder(name):
        found.photos.append(Input(Path(name)))
        return
    found.batch = True
    left_out = None if output in (None, PIPE) else os.path.realpath(output or "")
    errors: list[OSError] = []
    raw: list[Path] = []
    before = len(found.photos)
    for path in _files(name, recursive, left_out, errors):
        suffix = path.suffix.lower()
        if suffix in PHOTO_SUFFIXES or suffix in CLIP_SUFFIXES:
            found.photos.append(Input(path, path.parent.relative_to(name)))
        elif suffix in RAW_SUFFIXES:
            raw.append(path)
    for error in errors:
        place = os.fsdecode(error.filename)
        why = PictureError(f"{place}: the folder cannot be searched: {error.strerror}; check its permissions")
        found.problems.append((place, why))
    if raw:
        found.notes.append(f"{_counted(raw)} left out: camera raw files; export them as TIFF or JPEG")
    if len(found.photos) == before and not errors:
        hint = "check the name" if recursive else "--recursive looks into the folders inside it"
        found.problems.append((name, PictureError(f"{name}: expected pictures in the folder, found none; {hint}")))


def _files(folder: str, recursive: bool, left_out: str | None, errors: list[OSError]) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, onerror=errors.append):
        inner = [name for name in folders if not name.startswith(".")] if recursive else []
        folders[:] = sorted((name for name in inner if os.path.realpath(Path(root, name)) != left_out), key=_natural)
        yield from (Path(root, name) for name in sorted(files, key=_natural) if not name.startswith("."))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which photo10 comes after photo9."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)]


def _without_results(photos: Iterable[Input]) -> tuple[list[Input], list[Path]]:
    """Tell photographs from results of earlier edits whose originals are among them."""
    photos = list(photos)
    originals = {(photo.path.parent, photo.path.stem.casefold()) for photo in photos}
    kept, results = [], []
    for photo in photos:
        original = _RESULT.sub("", photo.path.stem)
        result = original != photo.path.stem and (photo.path.parent, original.casefold()) in originals
        if result:
            results.append(photo.path)
        else:
            kept.append(photo)
    return kept, results


def _counted(paths: Sequence[Path]) -> str:
    return f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
