"""Keep notes in a folder: adapters under the hash of their contents, and an index of names.

    index.json              name -> digest
    notes/DIGEST/           note.json, adapter_config.json, adapter_model.safetensors

Writers hold a lock on the folder, so that processes may remember at once. Forgetting a name removes the files of its
note unless another name has the very same one. The texts are not kept.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from openwu.errors import CheckpointError, OpenwuError
from openwu.files.locking import take_lock
from openwu.files.writing import PARTIAL, write_json
from openwu.memory.note import MemoryNote
from openwu.types import Adapter

INDEX, NOTES, NOTE = "index.json", "notes", "note.json"
NAME = re.compile(r"[^\W_][\w.-]{0,63}")
WAIT = 30.0
"""Seconds that a writer waits for another one."""


class MemoryStore:
    """Notes by name."""

    def __init__(self, folder: str | Path) -> None:
        """Use a folder, which the first note makes. Raises CheckpointError for a folder of something else."""
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not (self.folder / INDEX).is_file():
            found = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else [self.folder.name]
            # Another process may be writing the first note just now.
            strange = [name for name in found if name not in (INDEX, NOTES, ".lock") and not PARTIAL.fullmatch(name)]
            if strange:
                raise CheckpointError(
                    f"{folder}: expected a memory store or an empty folder, found {', '.join(sorted(strange)[:3])}"
                )

    def names(self) -> tuple[str, ...]:
        """List the names, in alphabetical order."""
        return tuple(sorted(self._index()))

    def add(self, note: MemoryNote) -> None:
        """Keep a note under its name; what had the name before is forgotten.

        Raises OpenwuError for a name that is none, or where another process holds the store for too long.
        """
        if not NAME.fullmatch(note.name):
            raise OpenwuError(
                f"name: expected up to 64 letters, digits, dots and hyphens, a letter or digit first, got {note.name!r}"
            )
        with self._locked():
            index = self._index()
            place = self.folder / NOTES / note.digest
            if not (place / NOTE).is_file():
                note.adapter.save_pretrained(place)
                write_json(place / NOTE, note.provenance())
            before = index.get(note.name)
            write_json(self.folder / INDEX, {**index, note.name: note.digest})
            if before not in (None, note.digest):
                self._sweep()

    def load(self, name: str) -> MemoryNote:
        """Read a note. Raises OpenwuError for an unknown name, CheckpointError for damaged files."""
        digest = self._index().get(name)
        if digest is None:
            raise _unknown(name, self.names())
        place = self.folder / NOTES / digest
        try:
            kept = json.loads((place / NOTE).read_text(encoding="utf-8"))
            note = MemoryNote(Adapter.from_pretrained(place), name=name, **kept)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{place}: damaged ({error}); forget {name!r} and remember it again") from error
        if note.digest != digest:
            raise CheckpointError(f"{place}: its contents have changed; forget {name!r} and remember it again")
        return note

    def rename(self, name: str, new: str) -> None:
        """Give a note another name."""
        note = self.load(name)
        self.add(replace(note, name=new))
        self.forget(name)

    def forget(self, name: str) -> None:
        """Remove a note and its files. Raises OpenwuError for an unknown name."""
        with self._locked():
            index = self._index()
            if name not in index:
                raise _unknown(name, sorted(index))
            del index[name]
            write_json(self.folder / INDEX, index)
            self._sweep()

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); restore it, or remove the folder") from error
        if not isinstance(index, dict) or not all(re.fullmatch("[0-9a-f]{64}", str(each)) for each in index.values()):
            raise CheckpointError(f"{path}: expected names and digests; restore it, or remove the folder")
        return {str(name): str(digest) for name, digest in index.items()}

    def _sweep(self) -> None:
        """Remove the files of notes without a name; partial ones of a killed process too."""
        kept = set(self._index().values())
        for place in (self.folder / NOTES).iterdir():
            if place.name not in kept:
                shutil.rmtree(place)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a+") as file:
            deadline = time.monotonic() + WAIT
            while not take_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise OpenwuError(f"{self.folder}: another process has been writing for {WAIT:g} s; try again")
                time.sleep(0.05)
            yield


def _unknown(name: str, known: Sequence[str]) -> OpenwuError:
    listed = f"expected one of {', '.join(known)}" if known else "nothing is remembered here yet"
    return OpenwuError(f"memory {name!r}: {listed}; `openwu remember FILE --name {name}` writes one")
