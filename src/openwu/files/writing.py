"""Files that appear whole or not at all: a path enters, a place to write to leaves, which takes that path at the end.

What is written stands beside its goal under a name of its own, so that any number of processes may write the same file,
and is renamed over it; after an error, Ctrl-C included, nothing of it is left. What stood there stays until then, and
its permissions stay for good.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE

PARTIAL = re.compile(r"\.openwu-[0-9a-f]{16}\.part")
"""Names of what is being written; where such a file is old, its process was killed."""


@contextmanager
def whole_file(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """An empty file beside `path`, to be written to or replaced in the block; then it takes the place of `path`.

    A symbolic link stays, and what it points to is replaced. `durable`: on the disk before it is renamed, so that even
    a power failure leaves the old or the new; False where a reader can tell, by a checksum. Raises OSError.
    """
    goal = Path(path).resolve()
    part = goal.with_name(_hidden())
    try:
        part.touch(exist_ok=False)
        mode = part.stat().st_mode
        yield part
        _finish(part, goal, mode, durable)
        part.replace(goal)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_set(folder: Path, last: str, *, stale: Iterable[str] = ()) -> Iterator[Path]:
    """An empty folder, to be filled in the block with files that are one thing only together; then they go to `folder`.

    `last` names the file without which the others count for nothing: its old self is removed first, and it comes last,
    so that a crash between leaves a folder that is visibly incomplete, never a mixture of two. `stale`: patterns of the
    old thing's files, which are removed with it; all others in the folder stay. Raises OSError.
    """
    existed = folder.is_dir()
    draft = folder / _hidden() if existed else folder.with_name(_hidden())
    try:
        draft.mkdir(parents=True)
        yield draft
        mode = draft.stat().st_mode & 0o666
        for part in draft.iterdir():
            _finish(part, folder / part.name, mode, durable=True)
        if not existed:
            draft.rename(folder)
            return
        (folder / last).unlink(missing_ok=True)
        for old in [file for pattern in stale for file in folder.glob(pattern)]:
            old.unlink(missing_ok=True)
        for part in sorted(draft.iterdir(), key=lambda part: part.name == last):
            part.replace(folder / part.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """A file of UTF-8 text, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Mapping[str, object]) -> None:
    """A JSON object with a line for each value and each entry of a long list: a diff of two runs stays readable."""
    lines = [f" {json.dumps(key)}: {_entries(value)}" for key, value in values.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _entries(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return "[\n  " + ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n ]"
    return json.dumps(value, ensure_ascii=False)


def _hidden() -> str:
    """Short, since it may replace a name that is as long as the file system allows."""
    return f".openwu-{secrets.token_hex(8)}.part"


def _finish(part: Path, goal: Path, mode: int, durable: bool) -> None:
    """Bytes to the disk; permissions as `goal` has them, or `mode`: safetensors writes for a file's owner alone."""
    if durable:
        with part.open("r+b") as file:  # Windows forces only what is open for writing
            os.fsync(file.fileno())
    with suppress(FileNotFoundError):
        mode = goal.stat().st_mode
    if S_IMODE(part.stat().st_mode) != S_IMODE(mode):
        with suppress(OSError):  # file systems without permissions; what was written is worth more
            part.chmod(S_IMODE(mode))
