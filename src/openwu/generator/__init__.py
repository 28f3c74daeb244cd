"""The parameter generator: a condition goes in, an adapter comes out.

`layout` says where every generated number stands, `blocks` holds the transformer's parts, `model` joins them, and
`checkpoint` reads and writes folders.
"""

from __future__ import annotations

from openwu.generator.model import ParameterGenerator

__all__ = ["ParameterGenerator"]
