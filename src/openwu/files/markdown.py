"""Markdown that code writes: cells enter and a table leaves, or sections enter and a page with them in their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from openwu.errors import OpenwuError


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with an empty line after it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


def filled(page: Path, sections: Mapping[str, str], option: str) -> str:
    """The page's text with each section between its marks, `<!-- name: begin -->` and `<!-- name: end -->`.

    `option` named the page; errors say so.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OpenwuError(f"{option}: expected a Markdown file, got {page} ({error})") from error
    for name, section in sections.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise OpenwuError(f"{page}: expected the marks {begin} and {end} around the table, in this order")
        text = f"{before}{begin}\n{section.strip()}\n{end}{after}"
    return text
