"""The tables and patterns of the rules for instructions, as JSON for another language that runs the same rules.

Every constant in capitals of the rules' modules is written under its name, so that there is one place where a word is
added. Patterns are rewritten to mean in JavaScript what they mean in Python: words are letters of every script there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from openwu.backbones.embedded import catalogue, guarantees, instruction, scale
from openwu.backbones.embedded.words import amounts, complaints, cuts, joined, language, restrictions, whole, wishes

MODULES: tuple[ModuleType, ...] = (
    instruction,
    language,
    amounts,
    joined,
    cuts,
    restrictions,
    wishes,
    whole,
    complaints,
    catalogue,
    guarantees,
    scale,
)

_LETTERS = r"\p{L}\p{N}_"
_BOUNDARY = rf"(?:(?<=[{_LETTERS}])(?![{_LETTERS}])|(?<![{_LETTERS}])(?=[{_LETTERS}]))"
_TOKEN = re.compile(r"\[\^\\W\\d_\]|\\[\s\S]|\(\?P<|\[|\]", re.DOTALL)


def rules() -> dict[str, dict[str, Any]]:
    """Return module name -> constant's name -> its value: patterns as {"pattern", "flags"}, sets as lists."""
    found = {
        module.__name__.rpartition(".")[2]: {
            name: encoded
            for name, value in vars(module).items()
            if name.isupper() and (encoded := _encoded(value)) is not None
        }
        for module in MODULES
    }
    found["cuts"]["MODEL"] = _encoded(cuts.model())
    return found


def _encoded(value: object) -> Any:
    """JSON of a constant; None for what no rule reads (paths, functions)."""
    if isinstance(value, re.Pattern):
        return {"pattern": javascript(value.pattern), "flags": "iu" if value.flags & re.IGNORECASE else "u"}
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _encoded(each) for key, each in value.items()}
    if isinstance(value, frozenset):
        return sorted(_encoded(each) for each in value)
    if isinstance(value, tuple | list):
        return [_encoded(each) for each in value]
    return None


def javascript(pattern: str) -> str:
    """Return a Python pattern as JavaScript reads it with the flag "u"."""
    inside = False
    parts, start = [], 0
    for found in _TOKEN.finditer(pattern):
        parts.append(pattern[start : found.start()])
        start = found.end()
        token = found[0]
        if token in "[]":
            inside = token == "["
            parts.append(token)
        else:
            parts.append(_token(token, inside=inside))
    return "".join([*parts, pattern[start:]])


def _token(token: str, *, inside: bool) -> str:
    if token == r"[^\W\d_]":
        return r"\p{L}"
    if token == "(?P<":
        return "(?<"
    if token == r"\w":
        return _LETTERS if inside else f"[{_LETTERS}]"
    if token == r"\b" and not inside:
        return _BOUNDARY
    known = token[1] in "dDsSnrtuxpP" or token[1] in r"^$\.*+?()[]{}|/-"
    return token if known and (token != r"\-" or inside) else token[1]
