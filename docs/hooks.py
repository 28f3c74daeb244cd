"""Mount files from outside docs/ into the site, so that links between pages work there as they do in the repository.

README.md becomes the home page. Every other file or folder outside docs/ that a page links to becomes a page under
`repository/`: Markdown as it is, source files as one block of code, folders as a list.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MOUNTED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `MOUNTED`, and what any page links to outside docs/ or as a folder."""
    pages = [Path(page.abs_src_path or "") for page in files.documentation_pages()]
    waiting = [ROOT / name for name in MOUNTED]
    waiting += [target for page in pages for target in _targets(page, page.read_text(encoding="utf-8"))]
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(_uri(path)) is None:
            content = _content(path)
            files.append(File.generated(config, _uri(path), content=content))
            waiting += _targets(path / "index.md" if path.is_dir() else path, content)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links as they are in the repository into links as they are in the site."""
    del config, files
    uri = page.file.src_uri
    if not page.file.generated_by:
        source = ROOT / "docs" / uri
    else:
        source = ROOT / ("README.md" if uri == "index.md" else uri.removeprefix("repository/"))

    def relinked(match: re.Match[str]) -> str:
        target = _resolve(source, match[1])
        return os.path.relpath(_uri(target), Path(uri).parent) if target else match[1]

    return LINK.sub(relinked, markdown)


def _targets(page: Path, content: str) -> list[Path]:
    """Return what a page links to and what mkdocs would not find by itself."""
    found = [_resolve(page, link) for link in LINK.findall(content)]
    return [path for path in found if path and (path.is_dir() or not path.is_relative_to(ROOT / "docs"))]


def _resolve(page: Path, link: str) -> Path | None:
    """Return the file or folder of the repository that a page's link means; None where there is none."""
    target = Path(os.path.normpath(page.parent / link))
    return target if target.is_relative_to(ROOT) and target.exists() else None


def _uri(path: Path) -> str:
    """Return where a file or folder of the repository stands in the site, as a path of its source."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if path.is_dir():
        return f"repository/{name}/index.md"
    if path.is_relative_to(ROOT / "docs"):
        return name.removeprefix("docs/")
    return f"repository/{name}" if path.suffix == ".md" else f"repository/{name}.md"


def _content(path: Path) -> str:
    """Return a mounted file or folder as Markdown."""
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return title + "".join(f"- [{each.name}]({each.name})\n" for each in sorted(path.iterdir()) if each.is_file())
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else f"{title}````{path.suffix[1:]}\n{text}````\n"
