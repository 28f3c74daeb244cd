"""Completion scripts, run in their shells where these are installed."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from openwu import cli


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ed"], {"edit", "edits"}),
        (["edit", "--rec"], {"--recursive"}),
        (["edit", "--edit", "black"], {"black_and_white"}),
        (["edit", "--quantise", ""], {"8bit", "4bit"}),
        (["edit", "--output", "a"], set()),  # names of files are bash's own
        (["edit", "phot"], set()),
        (["export", "--format", "d"], {"diffusers"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    quoted = " ".join(f"'{word}'" for word in ["openwu", *words])
    code = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _openwu; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    run = subprocess.run(
        ["bash", "-euc", f"{script('bash', capsys)}\n{code}"], capture_output=True, text=True, check=False, timeout=20
    )
    assert run.stderr == ""
    assert set(run.stdout.split()) == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("openwu ed", {"edit", "edits"}),
        ("openwu edit --recu", {"--recursive"}),
        ("openwu edit --edit black", {"black_and_white"}),
        ("openwu completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_fish_completes(line: str, expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "openwu.fish").write_text(script("fish", capsys), encoding="utf-8")
    code = f"source {tmp_path / 'openwu.fish'}; complete -C'{line}'"
    run = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
    )
    assert run.stderr == ""
    assert {answer.split("\t")[0] for answer in run.stdout.splitlines()} == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("openwu edit --recu", "openwu edit --recursive "),
        ("openwu edit --edit black", "openwu edit --edit black_and_white "),
        ("openwu export --format dif", "openwu export --format diffusers "),
    ],
)
def test_zsh_completes(line: str, completed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "_openwu"
    file.write_text(script("zsh", capsys), encoding="utf-8")
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="dumb", PS1="%% ", COLUMNS="200")
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        os.write(terminal, f"autoload -U compinit; compinit -u -D; source {file}; echo rea''dy\n".encode())
        assert "ready" in shown(terminal, "ready")
        os.write(terminal, f"{line}\t".encode())
        assert completed in shown(terminal, completed)
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


def shown(terminal: int, awaited: str, seconds: float = 60) -> str:
    """Read what a terminal shows until some text is among it."""
    text, end = "", time.monotonic() + seconds
    while awaited not in text and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
    return text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_verb_and_option_is_completed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    for word in ("edit", "edits", "models", "train", "eval", "lab", "completion", "recursive", "black_and_white"):
        assert word in text
    if executable := shutil.which(shell):
        run = subprocess.run([executable, "-n"], input=text, capture_output=True, text=True, check=False, timeout=20)
        assert run.stderr == ""


def test_an_unknown_shell_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["completion", "tcsh"])
    assert stop.value.code == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
