"""The installed package: its names, version, licence, command and type marker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import openwu
from openwu.registry import BASES, resolve

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


# ---- What messages and pages tell people to install


def texts() -> dict[Path, str]:
    """Everything that may tell somebody what to install."""
    pages = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    pages += [*(ROOT / "examples").glob("*.py"), *(ROOT / "recipes").glob("*.py")]
    return {page: page.read_text(encoding="utf-8") for page in pages}


def named_extras(text: str) -> set[str]:
    """Extras in `openwu[a,b]`, those that code fills in left out."""
    return {name for names in re.findall(r"openwu\[([\w,-]+)\]", text) for name in names.split(",")} - {"EXTRA"}


def requirements(extra: str) -> set[str]:
    """Names of the distributions that an extra asks for, further extras of ours included; "" for the core."""
    found: set[str] = set()
    for requirement in project()["optional-dependencies"][extra] if extra else project()["dependencies"]:
        name = re.split(r"[\[<>=;~! ]", requirement)[0].lower()
        if name == "openwu":
            found |= {each for own in named_extras(requirement) for each in requirements(own)}
        else:
            found.add(name)
    return found


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def test_every_extra_that_is_named_exists() -> None:
    extras = set(project()["optional-dependencies"])
    named = {(page.relative_to(ROOT).as_posix(), name) for page, text in texts().items() for name in named_extras(text)}
    assert len({name for _, name in named}) >= 8
    assert [(page, name) for page, name in sorted(named) if name not in extras] == []


def test_every_extra_brings_the_library_that_asks_for_it() -> None:
    """`library("module", "extra")` of `openwu.extras` promises that installing the extra mends the error."""
    # These come with that library, or by another name.
    dependencies = {
        "huggingface_hub": "diffusers",
        "python_multipart": "python-multipart",
        "prometheus_client": "prometheus-client",
        "pywt": "pywavelets",
    }
    calls = []
    for page, text in texts().items():
        for module, extra in re.findall(r'\blibrary\("([\w.]+)"(?:, "(\w+)")?\)', text):
            calls.append((page.name, module, extra or "diffusers"))
    assert len(calls) >= 5
    for page, module, extra in calls:
        root = module.partition(".")[0]
        assert dependencies.get(root, root) in requirements(extra), (page, module, extra)


def test_the_bases_name_extras_that_exist() -> None:
    for name, path in BASES.items():
        extra = resolve(path).facts.extra
        assert not extra or extra in project()["optional-dependencies"], name


def test_an_edit_needs_the_core_and_nothing_else(tmp_path: Path) -> None:
    """As after `make demo`: every distribution outside of the core's requirements cannot be imported."""
    with Image.open(ROOT / "photos" / "life_by_aitzol_berasategi.jpg") as image:
        image.resize((48, 32)).save(tmp_path / "photo.jpg")
    core = [name.replace("-", "_") for name in closure(requirements(""))] + ["openwu"]
    code = f"""
import importlib.util
import sys
from importlib import metadata
from importlib.machinery import PathFinder
core = {core!r}
barred = {{module for module, owners in metadata.packages_distributions().items()
          if all(owner.lower().replace("-", "_") not in core for owner in owners)}}
class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in barred else super().find_spec(name, path, target)
sys.meta_path = [Core if finder is PathFinder else finder for finder in sys.meta_path]
assert importlib.util.find_spec("pytest") is None
from openwu.cli import main
sys.exit(main(["edit", "photo.jpg", "--instruction", "make it warmer", "--output", "warm.png", "--compare"]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "warm.png").is_file()


def closure(names: set[str]) -> set[str]:
    """Distributions, and all that they require without extras."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        plain = {re.split(r"[\[<>=;~! (]", each)[0].lower() for each in required if "extra ==" not in each}
        waiting |= plain - found
    return found


# ---- Metadata and the release


def test_the_package_says_what_it_is() -> None:
    facts = project()
    assert facts["authors"]
    assert facts["urls"]
    assert facts["keywords"]
    assert "Typing :: Typed" in facts["classifiers"]
    assert not [each for each in facts["classifiers"] if each.startswith("License ::")], "PEP 639 refuses both"


@pytest.mark.slow
def test_what_is_released_installs_and_edits(tmp_path: Path) -> None:
    """Both archives as `make release-check` makes them; the wheel is unpacked beside this environment's PyTorch."""
    pytest.importorskip("build")
    pytest.importorskip("twine")
    called(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)
    archives = sorted((tmp_path / "dist").iterdir())
    assert [path.name.partition("-")[0] for path in archives] == ["openwu", "openwu"]
    assert all(path.stat().st_size < 50e6 for path in archives)
    called(sys.executable, "-m", "twine", "check", "--strict", *archives)
    (wheel,) = (path for path in archives if path.suffix == ".whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "installed")
        names = content.namelist()
    assert "openwu/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("openwu/", f"openwu-{openwu.__version__}"))]
    photo = ROOT / "photos" / "life_by_aitzol_berasategi.jpg"
    with Image.open(photo) as image:
        image.resize((48, 32)).save(tmp_path / "photo.jpg")
    words = ["edit", "photo.jpg", "--instruction", "make it warmer", "--output", "warm.png"]
    code = f"import sys, openwu.cli; sys.stdout.write(openwu.__file__); sys.exit(openwu.cli.main({words!r}))"
    out = called(sys.executable, "-c", code, cwd=tmp_path, path=tmp_path / "installed")
    assert (tmp_path / "installed").as_posix() in out
    assert (tmp_path / "warm.png").is_file()


def called(*words: object, cwd: Path = ROOT, path: Path | None = None) -> str:
    """What a command writes; its failure is the test's."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    run = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_make_installs_no_more_than_each_command_needs() -> None:
    """`make demo` stands on the core alone; PyTorch's own index is asked only where it helps, and may be left out."""
    dry = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    demo = dry(["make", "-n", "demo", "VENV=absent", "TORCH_INDEX=https://example.org/cpu"]).stdout
    assert "--extra-index-url https://example.org/cpu torch" in demo
    assert "pip install --no-compile --disable-pip-version-check -c constraints.txt -e .\n" in demo
    assert "[dev]" not in demo
    venv = dry(["make", "-n", "venv", "VENV=absent", "TORCH_INDEX="]).stdout
    assert "-e '.[dev]'" in venv
    assert "extra-index-url" not in venv
