"""Count what the embedded model makes of sentences with known wishes, such as those of strangers in docs/results.

    python examples/measure_sentences.py docs/results/strangers/fifth.jsonl [MORE ...] [--accepted 85]

A line is {"text": "too dark", "edits": ["brighten|lift_shadows"]}: an edit for each wish, alternatives after "|", and
[] for what is out of scope. Both orders of two wishes are right. Sentences that ask for a withdrawn edit are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import openwu
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.errors import OpenwuError

ASKED = ("out of scope", "one wish", "two wishes")


def read_edits(editor: openwu.Editor, text: str, references: int) -> list[str] | None:
    """Return the edits that a sentence is taken for, in order; None for a refusal."""
    try:
        found = editor.understand(text, references=references)
    except OpenwuError:
        return None
    return [] if found is None else [each.edit for each in (found, *found.then)]


def verdict(wanted: list[set[str]], edits: list[str] | None) -> str:
    """Compare edits with the alternatives of every wish."""
    if edits is None:
        return "refused"
    if not wanted:
        return "edited"
    orders = (edits, edits[::-1])
    if any(len(each) == len(wanted) and all(map(set.__contains__, wanted, each)) for each in orders):
        return "right"
    return "one lost" if len(edits) < len(wanted) else "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--accepted", type=int, help="per cent from which an edit counts (default: the model's own)")
    options = parser.parse_args()
    editor = openwu.Editor.from_pretrained()
    base = editor.backbone
    assert isinstance(base, EmbeddedBase)
    if options.accepted is not None:
        base.instruction.config = replace(base.instruction.config, accepted_percent=options.accepted)
    withdrawn, counts = set(base.instruction.config.withdrawn), Counter[tuple[int, str]]()
    for file in options.files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            wishes = [each.split("|") for each in row["edits"]]
            if any(each[0] in withdrawn for each in wishes):
                continue
            references = int(any(edit.startswith("take_") for each in wishes for edit in each))
            found = read_edits(editor, row["text"], references)
            counts[len(wishes), verdict([set(each) for each in wishes], found)] += 1
    for wishes_asked, name in enumerate(ASKED):
        own = {kind: number for (asked, kind), number in sorted(counts.items()) if asked == wishes_asked}
        total = sum(own.values())
        shares = ", ".join(f"{kind} {number / total:.1%}" for kind, number in own.items())
        sys.stdout.write(f"{name}: {total}; {shares}\n")


if __name__ == "__main__":
    main()
