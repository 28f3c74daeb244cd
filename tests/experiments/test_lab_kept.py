"""Finished parts of long experiments: found again, made again where they are missing, broken or of other settings."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import openwu
from openwu.cli import lab as command
from openwu.cli import main
from openwu.errors import OpenwuError
from openwu.evaluation.experiments.results import CODE, Part, ResultCache, fingerprint

PART = Part({"scores": [1.5, 2.0], "name": "雨"}, {"task/input": torch.rand(3, 2, 2)})


def never() -> Part:
    raise AssertionError("made again")


def test_a_part_is_made_once_and_found_as_it_was(tmp_path: Path) -> None:
    ResultCache(tmp_path / "new")("shared, wide, seed 0", lambda: PART)
    found = ResultCache(tmp_path / "new")("shared, wide, seed 0", never)
    assert found.values == PART.values
    torch.testing.assert_close(dict(found.tensors), dict(PART.tensors))


def test_a_part_that_fails_leaves_nothing_and_another_name_is_another_part(tmp_path: Path) -> None:
    keep = ResultCache(tmp_path)
    with pytest.raises(AssertionError, match="made again"):
        keep("one", never)
    assert list(tmp_path.iterdir()) == []
    keep("one", lambda: PART)
    with pytest.raises(AssertionError, match="made again"):
        keep("two", never)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_broken_part_is_made_again(tmp_path: Path, suffix: str) -> None:
    keep = ResultCache(tmp_path)
    keep("one", lambda: PART)
    file = tmp_path / f"one.{suffix}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert keep("one", lambda: Part({"new": 1})).values == {"new": 1}
    assert keep("one", never).values == {"new": 1}


def test_fingerprints_differ_with_settings_and_weights() -> None:
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    plain = fingerprint({"steps": 1}, module)
    assert plain == fingerprint({"steps": 1}, module)
    assert plain != fingerprint({"steps": 2}, module)
    with torch.no_grad():
        module.bias[0] += 1
    assert plain != fingerprint({"steps": 1}, module)


UNIMPORTANT = {"errors", "files", "cli", "pictures", "editor"}
"""Nothing that a part holds is computed there; the editor's module only chooses a dtype for the command."""


def test_fingerprints_see_all_that_experiments_are_made_of() -> None:
    package = Path(openwu.__file__).parent
    names = {part.removesuffix(".py") for part in CODE}
    alone = [package / name for name in ("evaluation/suite.py", "evaluation/pictures.py", "embedded.py", "planes.py")]
    for file in [*(package / "lab").glob("*.py"), *(package / "data").rglob("*.py"), *alone]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("openwu."):
                assert node.module.split(".")[1] in names | UNIMPORTANT, (file.name, node.module)


def test_fingerprints_differ_with_the_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes
    plain = fingerprint({})
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" " * (path.suffix == ".json"))
    assert fingerprint({}) != plain


def test_parts_of_other_photographs_stand_elsewhere(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quick run tests on fewer photographs, also where edits and steps are those of a full one."""
    folders: list[Path] = []

    def stop(*arguments: object) -> None:
        keep = arguments[-1]
        assert isinstance(keep, ResultCache)
        folders.append(keep.folder)
        raise OpenwuError("enough")

    monkeypatch.setattr(command, "continual", stop)
    monkeypatch.setattr(command, "load_folder", lambda _: [])
    monkeypatch.setattr(command, "load_test_photographs", lambda _: dict.fromkeys(command.QUICK_PHOTOGRAPHS))
    photos = tmp_path / "photos"
    photos.mkdir()
    words = ["--model", str(model_folder), "--output", str(tmp_path), "--photos", str(photos), "--steps", "9"]
    words += ["--edit", "warm", "--edit", "cool"]
    for more in ([], [], ["--quick"]):
        assert main(["lab", "continual", *words, *more]) == 1
    (photos / "new.jpg").write_bytes(b"another")
    assert main(["lab", "continual", *words]) == 1
    full, again, quick, photographed = folders
    assert full == again
    assert len({full, quick, photographed}) == 3
