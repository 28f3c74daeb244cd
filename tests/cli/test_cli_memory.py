"""`openwu remember | ask | memory` with a model of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from language_cases import language_model
from memory_cases import written_for
from openwu import cli
from openwu.memory.language import LanguageMemory


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "store"

    def tiny(generator: object, *, base: object, store: Path) -> LanguageMemory:
        model = language_model()
        return LanguageMemory(model, written_for(model), store=store)

    monkeypatch.setattr(LanguageMemory, "from_pretrained", tiny)
    monkeypatch.setenv("OPENWU_MEMORY", str(folder))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_notes_are_remembered_asked_shown_exported_and_forgotten(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("anna visits paris .")
    plain = run(capsys, "ask", "visits anna")[1]
    code, out, err = run(capsys, "remember", str(tmp_path / "notes.txt"), "--name", "trip")
    assert code == 0
    assert "4 tokens" in out
    assert "Apache-2.0" in err
    assert run(capsys, "memory", "list")[1] == "trip\n"
    assert run(capsys, "ask", "visits anna", "--memory", "trip")[1] != plain
    assert run(capsys, "ask", "visits anna", "--memory", "trip", "--strength", "0")[1] == plain
    assert "rank" in run(capsys, "memory", "show", "trip")[1]
    assert run(capsys, "memory", "export", "trip", "--output", str(tmp_path / "peft"))[0] == 0
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    assert run(capsys, "memory", "forget", "trip")[0] == 0
    assert not list((store / "notes").iterdir())
    assert run(capsys, "ask", "visits anna")[1] == plain


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["memory", "show", "trip"], 1, "nothing is remembered here yet"),
        (["memory", "forget"], 2, "name of a note"),
        (["ask", "visits anna", "--memory", "trip"], 1, "nothing is remembered here yet"),
        (["ask", " "], 1, "empty"),
        (["ask", "visits anna", "--tokens", "0"], 1, "above 0"),
        (["remember", "missing.txt", "--name", "trip"], 1, "missing.txt"),
        (["remember", "{binary}", "--name", "trip"], 1, "UTF-8"),
        (["remember", "{empty}", "--name", "trip"], 1, "empty"),
        (["remember", "{note}", "--name", "../x"], 1, "name"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str], code: int, problem: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"binary": b"\xff\xfe\x00\x01", "empty": b"", "note": b"anna visits paris ."}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found, _, err = run(capsys, *(word.format(**{name: tmp_path / name for name in files}) for word in words))
    assert found == code
    assert problem in err
    assert "Traceback" not in err
