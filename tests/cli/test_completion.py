"""Completion scripts: bash runs its own; those for zsh and fish are read."""

from __future__ import annotations

import shutil
import subprocess

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
