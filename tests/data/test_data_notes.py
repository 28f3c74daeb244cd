"""Notes with questions from JSONL, saved data sets, tables and streams of `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from openwu.data.notes import Asked, NoteStream, open_notes
from openwu.errors import DatasetError

ROWS = [{"note": f"note {i}", "questions": [{"question": f"q {i}", "answer": f"a {i}"}]} for i in range(7)]


def number(asked: Asked) -> int:
    note, [(question, answer)] = asked
    assert (question[1:], answer[1:]) == (note[4:], note[4:])
    return int(note.split()[1])


def written(kind: str, folder: Path) -> Path:
    path = folder / {"lines": "notes.jsonl", "saved": "saved", "parquet": "notes.parquet", "arrow": "parts"}[kind]
    if kind == "lines":
        path.write_text("\n".join(map(json.dumps, ROWS)))
        return path
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    if kind == "saved":
        table.save_to_disk(path)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(folder / "whole", num_shards=2)
        path.mkdir()
        for each in (folder / "whole").glob("*.arrow"):
            each.rename(path / each.name)
    return path


@pytest.mark.parametrize("kind", ["lines", "saved", "parquet", "arrow"])
def test_every_source_keeps_back_notes_and_draws_the_rest(kind: str, tmp_path: Path) -> None:
    path = written(kind, tmp_path)
    notes = open_notes(path, 2)
    held = [number(notes.held_back(place)) for place in range(2)]
    drawn = [number(notes.drawn(Random(place), place)) for place in range(40)]
    assert set(drawn) == set(range(7)) - set(held)
    assert held == ([0, 1] if kind in ("parquet", "arrow") else [5, 6])
    again = open_notes(path, 2)
    assert [number(again.drawn(Random(place), place)) for place in (30, 3, 17)] == [drawn[30], drawn[3], drawn[17]]
    with pytest.raises(DatasetError, match="more than the 7 notes held back"):
        open_notes(path, 7)


def test_an_iterable_data_set_is_streamed_and_shuffled_by_itself() -> None:
    datasets = pytest.importorskip("datasets")
    read = []

    def rows() -> Iterator[dict[str, Any]]:
        for row in ROWS:
            read.append(row["note"])
            yield row

    stream = datasets.IterableDataset.from_generator(rows).shuffle(seed=1, buffer_size=3)
    notes = NoteStream(stream, 1, "stream", kept=2)
    first = number(notes.held_back(0))
    order = [number(notes.drawn(Random(0), place)) for place in range(12)]
    assert sorted(order[:6]) == sorted(set(range(7)) - {first})
    assert order[:6] == order[6:]
    assert order[:6] != sorted(order[:6])
    count = len(read)
    assert number(notes.drawn(Random(0), 10)) == order[10]
    assert len(read) == count
    assert number(notes.drawn(Random(0), 1)) == order[1]
    assert len(read) > count


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"note": "a", "questions": []}, "note 3: expected"),
        ({"note": " ", "questions": [{"question": "q", "answer": "a"}]}, "none of them empty"),
        ({"note": "a", "text": "b"}, "KeyError"),
        (["a"], "note 3: expected"),
    ],
)
def test_a_broken_note_of_a_stream_is_named(row: Any, problem: str) -> None:
    notes = NoteStream([*ROWS[:2], row], 0, "stream")
    with pytest.raises(DatasetError, match=problem):
        notes.drawn(Random(0), 2)


def test_folders_without_notes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected a JSONL file"):
        open_notes(tmp_path, 0)
    with pytest.raises(DatasetError, match="No such file"):
        open_notes(tmp_path / "missing.jsonl", 0)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DatasetError, match="several"):
        open_notes(tmp_path, 0)
    (tmp_path / "broken.parquet").write_text("no table")
    with pytest.raises(DatasetError, match="broken"):
        open_notes(tmp_path / "broken.parquet", 0)


def test_a_line_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(DatasetError, match="note 1: expected"):
        open_notes(tmp_path / "deep.jsonl", 0).drawn(Random(0), 0)
