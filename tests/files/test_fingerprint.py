"""Fingerprints: they see settings, weights, and all code and data that a module imports, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from openwu.errors import OpenwuError
from openwu.files import fingerprint as module
from openwu.files.fingerprint import code_digest, code_files, fingerprint

CODE = "openwu.files.headers"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package "house" of five modules, of which `start` needs four and a data file."""
    folder = tmp_path / "house"
    (folder / "inner").mkdir(parents=True)
    sources = {
        "__init__.py": "from house.unused import x\n",
        "start.py": "import json\nfrom typing import TYPE_CHECKING\nfrom house.inner import direct\n"
        "if TYPE_CHECKING:\n    from house.typed import T\n",
        "inner/__init__.py": "",
        "inner/direct.py": "def f():\n    from .lazy import g\n    return g()\n",
        "inner/lazy.py": 'DATA_FILES = ("words.json",)\ndef g():\n    return 1\n',
        "inner/words.json": "[]",
        "typed.py": "T = int\n",
        "unused.py": "x = 1\n",
    }
    for name, text in sources.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "PACKAGE", "house")
    monkeypatch.setattr(module, "__file__", str(folder / "files" / "fingerprint.py"))
    _forget()
    yield folder
    _forget()


def _forget() -> None:
    module._source.cache_clear()
    module._read.cache_clear()


def test_imports_are_followed_into_functions_and_packages(package: Path) -> None:
    assert set(code_files("house.start")) == {
        *("house.start", "house.inner", "house.inner.direct", "house.inner.lazy"),
        "house.inner.lazy/words.json",
    }


@pytest.mark.parametrize(
    "name", ["start.py", "inner/__init__.py", "inner/direct.py", "inner/lazy.py", "inner/words.json"]
)
def test_the_digest_changes_with_every_file_that_counts(package: Path, name: str) -> None:
    before = code_digest("house.start")
    file = package / name
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    _forget()
    assert code_digest("house.start") != before


@pytest.mark.parametrize("name", ["unused.py", "typed.py", "__init__.py"])
def test_the_digest_does_not_change_with_other_files(package: Path, name: str) -> None:
    before = code_digest("house.start")
    (package / name).write_text("y = 2\n", encoding="utf-8")
    _forget()
    assert code_digest("house.start") == before


def test_a_module_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OpenwuError, match=r"expected a module of openwu, found none named 'openwu\.nothing'"):
        code_files("openwu.nothing")


def test_fingerprints_differ_with_settings_weights_and_code() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    plain = fingerprint({"steps": 1}, layer, code=CODE)
    assert plain == fingerprint({"steps": 1}, layer, code=CODE)
    assert plain != fingerprint({"steps": 2}, layer, code=CODE)
    assert plain != fingerprint({"steps": 1}, layer, code="openwu.files.markdown")
    with torch.no_grad():
        layer.bias[0] += 1
    assert plain != fingerprint({"steps": 1}, layer, code=CODE)


def test_an_experiment_depends_on_the_sentences_the_model_and_the_loop_but_on_no_other_experiment() -> None:
    files = code_files("openwu.evaluation.experiments.comparisons.conflict")
    assert json.loads(files["openwu.data.suite.phrases/phrases.json"].read_text(encoding="utf-8"))
    assert {"openwu.training.loop", "openwu.backbones.embedded.network", "openwu.generator.model"} <= files.keys()
    assert (
        not {"openwu.evaluation.experiments.comparisons.continual", "openwu.cli.lab", "openwu.editor.editor"}
        & files.keys()
    )


def test_the_module_that_reads_declarations_declares_none() -> None:
    assert "openwu.files.fingerprint" in code_files("openwu.files.fingerprint")
    assert all(file.is_file() for file in code_files("openwu.editor.editor").values())
