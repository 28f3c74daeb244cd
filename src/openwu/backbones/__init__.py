"""Base models, a folder per family. A base model never knows that adapters exist."""

from __future__ import annotations

from openwu.backbones.protocol import Backbone
from openwu.errors import OpenwuError
from openwu.registry import BASES, resolve


def backbone_class(name: str) -> type[Backbone]:
    """Import the class of a base. Its module must not import the base's libraries until it loads one."""
    if name not in BASES:
        raise OpenwuError(f"model: expected one of {', '.join(BASES)}, got {name!r}; `openwu models` describes them")
    found: type[Backbone] = resolve(BASES[name])
    return found
