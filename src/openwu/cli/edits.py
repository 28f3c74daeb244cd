"""Run `openwu edits`: list or search the edits that the embedded model knows, with an example in each language."""

from __future__ import annotations

import argparse

from openwu.backbones.embedded.catalogue import known_edits, named, package_edits, search
from openwu.cli.console import complain, note, say


def run(arguments: argparse.Namespace) -> int:
    """Print one line per edit, the most alike first; fail where nothing resembles the words."""
    query = " ".join(arguments.query)
    found, asked = search(query), named(query, list(known_edits()))
    if asked is not None and asked not in package_edits():
        note(f"{asked} is withdrawn: the model does it too badly to offer it (docs/model-card.md)")
    if not found:
        complain(f"no edit resembles {query!r}; `openwu edits` lists all")
        return 1
    width = max(len(edit.name) for edit in found)
    for edit in found:
        needs = "  (with --reference FILE)" if edit.reference else ""
        say(f"{edit.name:<{width}}  {'  '.join(edit.examples.values())}{needs}")
    return 0
