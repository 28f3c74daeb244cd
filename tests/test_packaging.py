"""The installed package: its names, version, licence, command and type marker."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import openwu

ROOT = Path(__file__).parent.parent


def test_version_and_licence_are_the_package_s() -> None:
    facts = metadata.metadata("openwu")
    assert facts["Version"] == openwu.__version__
    assert facts["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text().splitlines()[1]
    assert openwu.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_is_installed() -> None:
    command = next(entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "openwu")
    assert command.value == "openwu.cli:main"
    assert callable(command.load())


def test_import_is_instant() -> None:
    code = "import sys, openwu; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize("name", openwu.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(openwu, name) is not None
    assert name in dir(openwu)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Painter'"):
        _ = openwu.Painter


def test_types_are_published() -> None:
    assert (Path(openwu.__file__).parent / "py.typed").is_file()


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "make test"
    assert script.stat().st_mode & 0o111
