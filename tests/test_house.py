"""The house that the package is: sizes of modules and folders, docstrings, and names that strings refer to.

Read from the source, nothing is imported. Who may import whom is checked by import-linter (`.importlinter`).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
PACKAGE = SOURCE / "openwu"
MAX_LINES = 450
MAX_FILES = 15
"""Modules of one folder."""
REFERENCE = re.compile(r"openwu(\.\w+)*:\w+")
"""A registry's "module:name"."""
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def relative(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def total() -> str:
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in FILES)
    return f"{len(FILES)} modules, {lines} lines in all"


def test_no_module_is_too_long() -> None:
    lengths = {relative(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not long, f"expected at most {MAX_LINES} lines a module, got {long}; {total()}"


def test_no_folder_is_too_full() -> None:
    counts = Counter(relative(file.parent) for file in FILES)
    full = {folder: count for folder, count in counts.items() if count > MAX_FILES}
    assert not full, f"expected at most {MAX_FILES} modules a folder, got {full}; {total()}"


def test_no_two_files_of_tests_have_one_name() -> None:
    counts = Counter(file.name for file in Path(__file__).parent.rglob("*.py") if file.name != "conftest.py")
    twice = [name for name, count in counts.items() if count > 1]
    assert not twice, f"expected one file of tests a name (pytest imports them by it), got several of {twice}"


def test_every_module_has_a_docstring() -> None:
    without = [relative(file) for file, tree in TREES.items() if not (ast.get_docstring(tree) or "").strip()]
    assert not without, f"expected a docstring in every module, got none in {without}"


def test_nothing_prints_but_the_command_line() -> None:
    prints = [
        f"{relative(file)}:{node.lineno}"
        for file, tree in TREES.items()
        if PACKAGE / "cli" not in file.parents
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints, f"expected print in openwu.cli only, got it in {prints}"


def test_nothing_imports_the_command_line() -> None:
    imports = [
        f"{relative(file)}:{node.lineno}"
        for file, tree in TREES.items()
        if PACKAGE / "cli" not in file.parents and file.name != "__main__.py"
        for node in ast.walk(tree)
        for name in imported(node)
        if name == "openwu.cli" or name.startswith("openwu.cli.")
    ]
    assert not imports, f"expected nothing to import openwu.cli, got {imports}"


def test_every_reference_by_name_exists() -> None:
    references = {
        (f"{relative(file)}:{node.lineno}", node.value)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and REFERENCE.fullmatch(node.value)
    }
    assert references, "expected registries with strings such as openwu.module:name"
    broken = [f"{place}: {reference}" for place, reference in sorted(references) if not exists(reference)]
    assert not broken, f"expected names that exist, got {broken}"


@pytest.mark.parametrize(
    ("reference", "there"),
    [("openwu.errors:OpenwuError", True), ("openwu.errors:NoError", False), ("openwu.nothing:OpenwuError", False)],
)
def test_a_reference_is_looked_up_in_the_source(reference: str, there: bool) -> None:
    assert exists(reference) is there


def imported(node: ast.AST) -> list[str]:
    """Modules, and names that may be modules, that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def exists(reference: str) -> bool:
    """Whether "module:name" is defined or imported at the top of that module."""
    module, _, name = reference.partition(":")
    path = SOURCE.joinpath(*module.split("."))
    tree = TREES.get(path.with_suffix(".py")) or TREES.get(path / "__init__.py")
    return tree is not None and name in {defined for node in tree.body for defined in names(node)}


def names(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
