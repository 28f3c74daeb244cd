"""No known vulnerability in what the service runs on, as pip-audit finds them. Needs a network: PyPI is asked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("pip_audit")
pytestmark = pytest.mark.slow
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def installed(names: list[str]) -> dict[str, str]:
    """Return name -> version of some distributions and of all that they need."""
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = re.split(r"[^\w.-]", waiting.pop(), maxsplit=1)[0].lower()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform, or another Python
        if name not in found:
            found[name] = distribution.version
            waiting += [each for each in distribution.requires or () if "extra ==" not in each]
    return found


def test_the_packages_of_the_service_have_no_known_vulnerability(tmp_path: Path) -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = installed([*extras["serve"], *extras["mcp"], "pillow", "safetensors", "numpy"])
    assert {"fastapi", "starlette", "mcp", "pillow"} <= set(pinned)
    (tmp_path / "pinned.txt").write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--timeout", "30"]
    run = subprocess.run(
        [sys.executable, "-m", "pip_audit", "-r", "pinned.txt", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(run.stdout)["dependencies"] if run.stdout.strip() else []
    audited = [each for each in report if "skip_reason" not in each]
    if not audited:
        pytest.skip(f"pip-audit reaches no advisories here: {run.stderr.strip()[-200:]}")
    assert len(audited) > 20
    assert {each["name"]: [one["id"] for one in each["vulns"]] for each in audited if each["vulns"]} == {}
