"""The only place that chooses an implementation of the low-rank update; callers import the three functions from here.

There is one implementation so far, `lora.reference`.
"""

from __future__ import annotations

from openwu.ops.lora.reference import add_conv, add_linear, add_routed

__all__ = ["add_conv", "add_linear", "add_routed"]
