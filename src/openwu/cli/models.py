"""`openwu models`: which models can edit, and which large bases can be edited with, under which licence.

Every fact about the embedded model is read from the installed package, those about a base from its own file.
"""

from __future__ import annotations

import argparse
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import openwu
from openwu.cli.console import say
from openwu.files.headers import read_header

PACKAGE = Path(openwu.__file__).parent
LANGUAGE_NAMES = {"en": "English", "zh": "Chinese"}
CARD = "docs/model-card.md"
"""Where the source tree describes the embedded model's training, tests and limits."""


def run(_: argparse.Namespace) -> int:
    weights = PACKAGE / "weights"
    files = sorted(weights.glob("*.safetensors"))
    _embedded(weights, files)
    _bases()
    return 0


def _embedded(weights: Path, files: list[Path]) -> None:
    if not (weights / "config.json").is_file() or not files:
        say(f"embedded: not in this installation (no weights in {weights}); install openwu from a release, or train it")
        return
    say("embedded (the default)")
    for name, value in _facts(weights, files).items():
        say(f"  {name:<12}{value}")


def _bases() -> None:
    from openwu.backbones import BACKBONES, backbone_class

    say("")
    say("Large bases, each with a generator trained for it; licences as published in November 2026, yours to check:")
    say("  openwu edit PHOTO --instruction TEXT --model NAME --base FOLDER --generator FOLDER")
    for name in BACKBONES:
        facts = backbone_class(name).facts
        say(name)
        for label, value in (
            ("weights", facts.weights),
            ("parameters", facts.parameters),
            ("licence", facts.licence),
            ("needs", f"pip install 'openwu[{facts.extra}]'"),
        ):
            say(f"  {label:<12}{value}")


def _facts(weights: Path, files: list[Path]) -> dict[str, str]:
    counts = {file.stem: sum(math.prod(shape) for _, shape in read_header(file).values()) for file in files}
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
