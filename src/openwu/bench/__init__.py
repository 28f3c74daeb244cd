"""Benchmarks: two ways to do the same enter, their times side by side leave. `ROWS` lists them.

A row is a function `measure(quick: bool) -> Row` that first checks that both sides agree, then times them in turn.
"""

from __future__ import annotations

ROWS: dict[str, str] = {}
"""Name of a row -> "module:function" that measures it. One line adds a row."""
