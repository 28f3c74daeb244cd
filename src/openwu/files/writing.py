"""Write files and sets of files atomically: complete, or not at all.

Data is written to a temporary name beside the target, so that any number of processes may write the same file, and is
renamed over it; after an error, Ctrl-C included, nothing of it is left. The old file stays until then, and its
permissions are kept.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import Any

PARTIAL = re.compile(r"\.openwu-[0-9a-f]{16}\.part")
"""Temporary names; where such a file is old, its process was killed."""


@contextmanager
def atomic_file(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield an empty temporary file to write to or replace in the block; afterwards it replaces `path` atomically.

    A symbolic link stays, and its target is replaced. `durable`: sync to disk before renaming, so that even a power
    failure leaves the old or the new file; False where readers verify a checksum. Raises OSError.
    """
    target = Path(path).resolve()
    part = target.with_name(_temporary_name())
    try:
        part.touch(exist_ok=False)
        mode = part.stat().st_mode
        yield part
        _finish(part, target, mode, durable)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_set(folder: Path, last: str, *, stale: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty temporary folder to fill with files that belong together; afterwards they move to `folder`.

    `last` names the file that makes the set valid: its old version is removed first and the new one is moved last, so
    that a crash in between leaves a visibly incomplete folder, never a mixture of two sets. `stale`: glob patterns of
    the old set's files, which are removed; all others in the folder stay. Raises OSError.
    """
    existed = folder.is_dir()
    draft = folder / _temporary_name() if existed else folder.with_name(_temporary_name())
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
    """Write UTF-8 text atomically."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Mapping[str, object]) -> None:
    """Write a JSON object atomically, with a line per value and per entry of a long list, for readable diffs."""
    lines = [f" {json.dumps(key)}: {_entries(value)}" for key, value in values.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def finite_values(value: Any) -> Any:
    """Return plain values for JSON: every NaN and infinity becomes None, every key a string."""
    if isinstance(value, dict):
        return {str(key): finite_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_name(text: str) -> str:
    """Return a file's name for any text: letters and digits, and a dash for everything else."""
    return "".join(letter if letter.isalnum() else "-" for letter in text)


def _entries(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return "[\n  " + ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n ]"
    return json.dumps(value, ensure_ascii=False)


def _temporary_name() -> str:
    """Return a short name: the target's may be as long as the file system allows."""
    return f".openwu-{secrets.token_hex(8)}.part"


def _finish(part: Path, target: Path, mode: int, durable: bool) -> None:
    """Sync to disk; set the permissions of `target`, else `mode`: safetensors writes files for their owner alone."""
    if durable:
        with part.open("r+b") as file:  # Windows syncs only files open for writing
            os.fsync(file.fileno())
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
    if S_IMODE(part.stat().st_mode) != S_IMODE(mode):
        with suppress(OSError):  # file systems without permissions; keep the data
            part.chmod(S_IMODE(mode))
