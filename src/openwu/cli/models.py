"""`openwu models`: which models can edit. Every fact is read from the installed package, none is written here."""

from __future__ import annotations

import argparse
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import openwu
from openwu.cli.console import say

PACKAGE = Path(openwu.__file__).parent
LANGUAGE_NAMES = {"en": "English", "zh": "Chinese"}
CARD = "docs/model-card.md"
"""Where the source tree describes the embedded model's training, tests and limits."""


def run(_: argparse.Namespace) -> int:
    weights = PACKAGE / "weights"
    files = sorted(weights.glob("*.safetensors"))
    if not (weights / "config.json").is_file() or not files:
        say(f"embedded: not in this installation (no weights in {weights}); install openwu from a release, or train it")
        return 0
    say("embedded (the default)")
    for name, value in _facts(weights, files).items():
        say(f"  {name:<12}{value}")
    return 0


def _facts(weights: Path, files: list[Path]) -> dict[str, str]:
    counts = {file.stem: _parameters(file) for file in files}
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    size = sum(file.stat().st_size for file in files) / 1e6
    phrases: dict[str, dict[str, Any]] = json.loads((PACKAGE / "data" / "phrases.json").read_text("utf-8"))["edits"]
    languages = sorted({language for phrasings in phrases.values() for language in phrasings})
    return {
        "parameters": f"{sum(counts.values()):,} ({parts})",
        "size": f"{size:.1f} MB",
        "licence": metadata.metadata("openwu")["License-Expression"],
        "languages": ", ".join(LANGUAGE_NAMES.get(language, language) for language in languages),
        "edits": f"{len(phrases)} kinds",
        "card": CARD,
        "folder": str(weights),
    }


def _parameters(file: Path) -> int:
    """Numbers in a safetensors file, from its header alone: eight bytes of length, then JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
