"""Fingerprints of results: what they depend on, as settings, frozen weights, and the code that computed them.

Which code that is follows from imports: `code_files` walks the import graph of a module inside the package. Names in
registries ("module:name" strings) are no imports: whoever resolves one passes its module as well.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from openwu.errors import OpenwuError
from openwu.files.hashing import add_tensor, of_bytes, of_json

PACKAGE = __name__.partition(".")[0]
DECLARATION = "DATA_FILES"
"""Name of a module's constant: a literal tuple of the files beside it whose contents its functions read."""


def fingerprint(settings: Mapping[str, Any], *frozen: nn.Module, code: str) -> str:
    """Return 16 hexadecimal digits that change with settings, the frozen modules' weights, or the code.

    code: the module that computes the results; see `code_digest`.
    """
    digest = of_json(settings, sort_keys=True, default=str)
    for module in frozen:
        for name, value in module.state_dict().items():
            add_tensor(digest, name, value)
    digest.update(code_digest(code).encode())
    return digest.hexdigest()[:16]


def code_digest(*modules: str) -> str:
    """Return the SHA-256 of the source and data files of modules and of everything of the package that they import."""
    return of_bytes(
        json.dumps(name).encode() + file.read_bytes() for name, file in sorted(code_files(*modules).items())
    ).hexdigest()


def code_files(*modules: str) -> dict[str, Path]:
    """Return the files that modules depend on inside the package, themselves included: name -> file.

    Imports are followed transitively, those inside functions included and those for type checkers alone not. A package
    that is imported from counts with its `__init__`, except for the root, which imports nothing by itself. Raises
    OpenwuError for a module that does not exist.
    """
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        file = _source(name)
        if file is None:
            raise OpenwuError(f"fingerprint: expected a module of {PACKAGE}, found none named {name!r}")
        found[name] = file
        imported, data = _read(file, name)
        waiting += imported
        found |= {f"{name}/{each.name}": each for each in data}
    return found


@functools.cache
def _source(name: str) -> Path | None:
    """The file of a module of the package; None where there is none of this name."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    stem = Path(__file__).parents[1].joinpath(*parts[1:])
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


@functools.cache
def _read(file: Path, name: str) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """The package's modules that a file imports, and the data files that it declares."""
    tree = ast.parse(file.read_bytes())
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    imported: set[str] = set()
    for node in _runtime_nodes(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            imported.add(base)
            imported |= {f"{base}.{alias.name}" for alias in node.names}
    known = {each for found in imported for each in _with_parents(found) if _source(each) is not None}
    data = tuple(file.parent / each for node in tree.body for each in _declared_data(node))
    return tuple(sorted(known)), data


def _with_parents(name: str) -> Iterator[str]:
    """A module and the packages around it, without the root."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(2, len(parts) + 1))


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from _runtime_nodes(other)
            continue
        yield child
        yield from _runtime_nodes(child)


def _declared_data(node: ast.stmt) -> tuple[str, ...]:
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == DECLARATION for t in node.targets):
        files: tuple[str, ...] = ast.literal_eval(node.value)
        return files
    return ()
