"""Files appear whole or not at all, with the permissions that they should have, whoever else writes them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

import pytest
import torch
from safetensors.torch import load_file, save_file

from openwu.files.writing import PARTIAL, atomic_file, atomic_set, write_json, write_text


def held(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def mode(file: Path) -> int:
    return S_IMODE(file.stat().st_mode)


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def test_a_file_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.txt") as part:
        part.write_bytes(b"half")
        assert PARTIAL.fullmatch(part.name)
        assert held(tmp_path) == {part.name: b"half"}
        part.write_bytes(b"whole")
    assert held(tmp_path) == {"a.txt": b"whole"}


@pytest.mark.parametrize("error", [OSError("full"), ValueError("x"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_stands_alone(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")

    def stopped() -> None:
        with atomic_file(tmp_path / "a.txt") as part:
            part.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        stopped()
    assert held(tmp_path) == {"a.txt": b"old"}


@pytest.mark.parametrize("place", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.chmod"])
def test_a_disk_that_fails_at_the_end(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    (tmp_path / "a.txt").chmod(0o640)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(place, fail)
    if place.endswith("chmod"):  # A file system without permissions, such as that of a memory stick, is no error.
        write_text(tmp_path / "a.txt", "new")
        assert held(tmp_path) == {"a.txt": b"new"}
        return
    with pytest.raises(PermissionError):
        write_text(tmp_path / "a.txt", "new")
    assert held(tmp_path) == {"a.txt": b"old"}


def test_what_can_be_told_by_a_checksum_is_not_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    with atomic_file(tmp_path / "a", durable=False) as part:
        part.write_bytes(b"x")
    assert not forced
    with atomic_file(tmp_path / "a") as part:
        part.write_bytes(b"x")
    assert len(forced) == 1


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "none" / "a"):
        pytest.fail("nothing can be written there")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), atomic_file(tmp_path / "file" / "a"):
        pytest.fail("nothing can be written there")


def test_new_files_have_the_usual_permissions_and_old_ones_keep_theirs(tmp_path: Path) -> None:
    file, tensors = tmp_path / "a.safetensors", {"x": torch.ones(2)}
    with umask(0o027):
        with atomic_file(file) as part:
            save_file(tensors, part)
        assert mode(file) == 0o640  # safetensors alone would have made it 0600
        file.chmod(0o604)
        with atomic_file(file) as part:
            save_file(tensors, part)
    assert mode(file) == 0o604
    assert torch.equal(load_file(file)["x"], tensors["x"])


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real.txt").write_bytes(b"old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "there" / "real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert held(tmp_path / "there") == {"real.txt": b"new"}


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    name = "a" * 255
    write_text(tmp_path / name, "x")
    assert held(tmp_path) == {name: b"x"}


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    file, texts = tmp_path / "a.txt", [str(number) * 5000 for number in range(8)]
    writers = [threading.Thread(target=write_text, args=(file, text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert file.read_text() in texts
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


# Sets of files


def fill(draft: Path, number: int, shards: int = 1) -> None:
    (draft / "config.json").write_text(str(number))
    for shard in range(shards):
        save_file({"x": torch.full((2,), float(number))}, draft / f"model-{shard}.safetensors")


@pytest.mark.parametrize("exists", [False, True])
def test_a_set_appears_at_the_end_of_the_block(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "deep" / "model"
    if exists:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    with umask(0o022):
        with atomic_set(folder, last="config.json") as draft:
            fill(draft, 1)
            assert not (folder / "config.json").exists()
        assert {mode(file) for file in folder.iterdir()} == {0o644}
    assert set(held(folder)) == {"config.json", "model-0.safetensors", *(["notes.txt"] if exists else [])}
    assert [each.name for each in folder.parent.iterdir()] == ["model"]


def test_a_set_replaces_the_older_one_alone(tmp_path: Path) -> None:
    fill(tmp_path, 1, shards=3)
    (tmp_path / "config.json").chmod(0o600)
    (tmp_path / "provenance.json").write_text("{}")
    with atomic_set(tmp_path, last="config.json", stale=("model-*.safetensors",)) as draft:
        fill(draft, 2, shards=1)
    assert set(held(tmp_path)) == {"config.json", "model-0.safetensors", "provenance.json"}
    assert (tmp_path / "config.json").read_text() == "2"
    assert mode(tmp_path / "config.json") == 0o600


@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_the_older_set(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "model"
    if exists:
        folder.mkdir()
        fill(folder, 1)
    before = held(folder) if exists else None

    def stopped() -> None:
        with atomic_set(folder, last="config.json", stale=("model-*",)) as draft:
            fill(draft, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (held(folder) if folder.exists() else None) == before
    assert [each.name for each in tmp_path.iterdir()] == (["model"] if exists else [])


def test_a_crash_between_two_renames_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 1, shards=2)
    replace_path, renamed = Path.replace, []

    def crash(self: Path, goal: Path) -> Path:
        if renamed:
            raise OSError("gone")
        renamed.append(goal.name)
        return replace_path(self, goal)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="gone"), atomic_set(tmp_path, last="config.json") as draft:
        fill(draft, 2, shards=2)
    assert renamed != ["config.json"]
    assert set(held(tmp_path)) == {"model-0.safetensors", "model-1.safetensors"}


def test_json_has_a_line_for_each_value_and_entry(tmp_path: Path) -> None:
    values = {"a": 1.5, "é": "é", "many": [{"x": 1}, {"x": 2}], "pairs": [[1, 2]], "few": [1, 2], "none": []}
    write_json(tmp_path / "a.json", values)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == values
    assert len(text.splitlines()) == 2 + len(values) + (2 + 1) + (1 + 1)
    assert '"é",' in text
