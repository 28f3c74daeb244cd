"""Write Markdown tables, and fill the marked sections of a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from openwu.errors import OpenwuError


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with an empty line after it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


def escaped(text: str) -> str:
    """Escape a name that a user gave for a cell of a table: marks of Markdown, line breaks, and tags."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def unescaped(cell: str) -> str:
    """Undo `escaped`, but for line breaks."""
    return cell.replace("&lt;", "<").replace("\\|", "|").replace("\\\\", "\\")


def filled(page: Path, sections: Mapping[str, str], option: str) -> str:
    """Return the page's text with each section between its marks, `<!-- name: begin -->` and `<!-- name: end -->`.

    `option`: the command-line option that named the page, for error messages. Raises OpenwuError for a missing page or
    mark.
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
