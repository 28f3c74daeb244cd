"""The parameter generator: a transformer that computes adapters from conditions.

`layout` says where every generated number stands, `blocks` holds the transformer's parts, `model` joins them, and
`checkpoint` reads and writes folders. Beside them stands the fast path for inference: `fast` joins `stages` (a block in
pieces, over a `workspace`), `products` (packed weights; `fp8`), and `tables`. `sharding` spreads a generator over
several processes.
"""

from __future__ import annotations

from openwu.generator.model import ParameterGenerator

__all__ = ["ParameterGenerator"]
