"""Run `openwu models`: print the model inside the package and every base that can be edited with, and their licences.

Facts about the embedded model are read from the installed package, those about other bases from their classes.
"""

from __future__ import annotations

import argparse
import math
from importlib import metadata
from pathlib import Path

from openwu.backbones import backbone_class
from openwu.backbones.embedded.catalogue import package_edits
from openwu.cli.console import say
from openwu.files.headers import read_header
from openwu.registry import BASES, DEFAULT_BASE

LANGUAGE_NAMES = {"en": "English", "zh": "Chinese"}
CARD = "docs/model-card.md"
"""Where the source tree describes the embedded model's training, tests and limits."""


def run(_: argparse.Namespace) -> int:
    weights = backbone_class(DEFAULT_BASE).bundled_folder()
    assert weights is not None
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
    say("")
    say("Large bases, each with a generator trained for it; licences as published in November 2026, yours to check:")
    say("  openwu edit PHOTO --instruction TEXT --model NAME --base FOLDER --generator FOLDER")
    for name in BASES:
        if name == DEFAULT_BASE:
            continue
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
    edits = package_edits().values()
    languages = [language for language in LANGUAGE_NAMES if all(language in edit.examples for edit in edits)]
    return {
        "parameters": f"{sum(counts.values()):,} ({parts})",
        "size": f"{size:.1f} MB",
        "licence": metadata.metadata("openwu")["License-Expression"],
        "languages": ", ".join(LANGUAGE_NAMES[language] for language in languages),
        "edits": f"{len(edits)} kinds",
        "card": CARD,
        "folder": str(weights),
    }
