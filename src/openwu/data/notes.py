"""Read notes with questions, for language memories: JSONL files, saved data sets and tables of Hugging Face `datasets`.

A note is `{"note": "...", "questions": [{"question": "...", "answer": "..."}]}`: a line of a JSONL file or a row of a
table. No source is loaded whole: lines are read when they are needed, saved data sets are memory-mapped, tables and
iterable data sets are streamed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Protocol

from openwu.errors import DatasetError
from openwu.extras import library

Asked = tuple[str, list[tuple[str, str]]]
"""A note, and questions with their answers."""

TABLES = {".parquet": "parquet", ".arrow": "arrow"}
"""Suffix -> name of the reader in `datasets`."""
_EXPECTED = 'expected {"note": TEXT, "questions": [{"question": TEXT, "answer": TEXT}]}'


class NoteSource(Protocol):
    """Notes of a training, and those held back from it."""

    def drawn(self, random: Random, position: int, /) -> Asked:
        """Return the note at a position of the training, which counts up from 0; it depends on both alone."""
        ...

    def held_back(self, number: int, /) -> Asked:
        """Return a note that `drawn` never returns."""
        ...


def open_notes(path: str | Path, held_back: int) -> NoteSource:
    """Open a JSONL file, a folder of `Dataset.save_to_disk`, or a file or folder of parquet or arrow tables.

    `held_back`: how many notes are kept from the training. Raises DatasetError for anything else and for too few notes,
    OpenwuError where `datasets` is needed and not installed.
    """
    path = Path(path)
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        raise DatasetError(f"{path}: expected one data set, got several; name the folder of one: {path}/train")
    if path.is_dir() and (path / "state.json").is_file():
        try:
            saved = library("datasets", "datasets").load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: expected a folder of Dataset.save_to_disk: {error}") from error
        return NoteList(saved, held_back, str(path))
    files = [each for each in files_of(path) if each.suffix in TABLES]
    if not files and not path.is_dir():
        return NoteList(NoteLines(path), held_back, str(path))
    if not files or len({each.suffix for each in files}) > 1:
        raise DatasetError(
            f"{path}: expected a JSONL file, a folder of Dataset.save_to_disk, or tables of one kind "
            f"({' or '.join(TABLES)}), got {sorted({each.suffix for each in files}) or 'none of them'}"
        )
    kind = TABLES[files[0].suffix]
    try:
        table = library("datasets", "datasets").load_dataset(
            kind, data_files=[str(each) for each in files], split="train", streaming=True
        )
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: expected {kind} tables: {error}") from error
    return NoteStream(table, held_back, str(path))


def files_of(path: str | Path) -> list[Path]:
    """Return a source's files, sorted: itself, or those directly in its folder."""
    path = Path(path)
    return sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]


class NoteLines:
    """The lines of a JSONL file, of which only the offsets are in memory."""

    def __init__(self, path: str | Path) -> None:
        """Find the lines. Raises DatasetError for a file without notes."""
        self.path, self.offsets = Path(path), list[int]()
        try:
            with self.path.open("rb") as file:
                position = 0
                for line in file:
                    if line.strip():
                        self.offsets.append(position)
                    position += len(line)
        except OSError as error:
            raise DatasetError(f"{path}: expected a JSONL file of notes: {error.strerror}") from error
        if not self.offsets:
            raise DatasetError(f"{path}: expected a note a line, got an empty file")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, number: int) -> Any:
        """Return the JSON value of one line. Raises DatasetError for anything else."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[number])
            line = file.readline()
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{self.path}: note {number + 1}: {_EXPECTED}: {error}") from error


class NoteList:
    """Notes that can be read in any order, drawn at random; the last ones are held back."""

    def __init__(self, rows: Sequence[Any] | NoteLines, held_back: int, name: str) -> None:
        """`rows`: JSON values, such as a `datasets.Dataset`. Raises DatasetError for too few of them."""
        self.rows, self.name = rows, name
        self.trained = len(rows) - held_back
        if self.trained < 1:
            raise DatasetError(
                f"{name}: expected more than the {held_back} notes held back, got {len(rows)}; hold back fewer: "
                "held_back=2"
            )

    def drawn(self, random: Random, _position: int) -> Asked:
        return self._note(random.randrange(self.trained))

    def held_back(self, number: int) -> Asked:
        return self._note(self.trained + number)

    def _note(self, number: int) -> Asked:
        return checked(self.rows[number], f"{self.name}: note {number + 1}")


class NoteStream:
    """Notes that are read in their order, again from the beginning after the last; the first ones are held back.

    Shuffle the source itself, for example `datasets.IterableDataset.shuffle(seed=0)`. Going back further than `kept`
    notes starts the source anew.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], held_back: int, name: str, kept: int = 256) -> None:
        """`rows`: such as a `datasets.IterableDataset`; iterated anew for every round. Raises DatasetError for too few
        of them."""
        self.rows, self.name = rows, name
        self.first = list(islice(self._read(), held_back))
        if len(self.first) < held_back or next(islice(self._read(), held_back, None), None) is None:
            raise DatasetError(
                f"{name}: expected more than the {held_back} notes held back, got {len(self.first)}; hold back fewer: "
                "held_back=2"
            )
        self._recent: deque[Asked] = deque(maxlen=kept)
        self._end = 0
        """Position after the last of `_recent`."""
        self._notes = self._rounds()

    def drawn(self, _random: Random, position: int) -> Asked:
        if position < self._end - len(self._recent):
            self._recent.clear()
            self._end, self._notes = 0, self._rounds()
        while self._end <= position:
            self._recent.append(next(self._notes))
            self._end += 1
        return self._recent[position - self._end]

    def held_back(self, number: int) -> Asked:
        return self.first[number]

    def _rounds(self) -> Iterator[Asked]:
        while True:
            yield from islice(self._read(), len(self.first), None)

    def _read(self) -> Iterator[Asked]:
        for number, row in enumerate(self.rows, start=1):
            yield checked(row, f"{self.name}: note {number}")


def checked(entry: Any, where: str) -> Asked:
    """Return the note and the questions of a JSON value; DatasetError, which begins with `where`, for anything else."""
    try:
        asked = [(each["question"], each["answer"]) for each in entry["questions"]]
        texts = [entry["note"], *(text for pair in asked for text in pair)]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{where}: {_EXPECTED}: {error!r}") from error
    if not asked or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DatasetError(f"{where}: {_EXPECTED}, none of them empty")
    return entry["note"], asked
