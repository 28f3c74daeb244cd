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

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
UNREACHED = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|Max retries|Could not connect|ServiceError|HTTPError"
)
"""How pip-audit says that it did not reach the advisories."""


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


def audited(code: int, output: str, errors: str) -> dict[str, list[str]] | None:
    """Return name -> ids of known vulnerabilities, from what pip-audit answered; None where it reached no advisories.

    Raises AssertionError where it failed otherwise.
    """
    if not output.strip():
        assert code != 0, errors
        assert UNREACHED.search(errors), f"pip-audit failed: {errors}"
        return None
    report = json.loads(output)["dependencies"]
    assert report, "pip-audit was asked about nothing"
    found = {each["name"]: [one["id"] for one in each["vulns"]] for each in report if "skip_reason" not in each}
    if not found:
        assert all("not found on PyPI" in each["skip_reason"] for each in report), report
        return None
    assert len(found) == len(report), [each for each in report if "skip_reason" in each]
    return found


@pytest.mark.slow
def test_the_packages_of_the_service_have_no_known_vulnerability(tmp_path: Path) -> None:
    pytest.importorskip("pip_audit")
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
    found = audited(run.returncode, run.stdout, run.stderr)
    if found is None:
        pytest.skip("pip-audit reaches no advisories here: PyPI does not answer, or a mirror without them does")
    assert len(found) > 20
    assert {name: ids for name, ids in found.items() if ids} == {}


def test_what_is_unreachable_is_told_from_what_is_wrong() -> None:
    skipped = {
        "name": "pillow",
        "skip_reason": "Dependency not found on PyPI and could not be audited: pillow (12.3.0)",
    }
    clean, broken = {"name": "numpy", "vulns": []}, {"name": "starlette", "vulns": [{"id": "PYSEC-1"}]}

    def answer(*packages: object) -> str:
        return json.dumps({"dependencies": packages, "fixes": []})

    assert audited(0, answer(skipped, skipped), "") is None
    assert audited(1, "", "requests.exceptions.ConnectionError: Max retries exceeded") is None
    assert audited(1, answer(clean, broken), "") == {"numpy": [], "starlette": ["PYSEC-1"]}
    for code, output, errors in (
        (1, "", "invalid choice"),
        (0, "", ""),
        (0, answer(clean, skipped), ""),
        (0, answer(), ""),
    ):
        with pytest.raises(AssertionError):
            audited(code, output, errors)
