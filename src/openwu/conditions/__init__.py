"""Condition encoders: a request enters, the tokens that a generator reads leave. One file per encoder.

The embedded model has its own. A large base makes conditions itself; those in `ENCODERS` take its place, by the name
that a generator's config holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from openwu.backbones.protocol import Backbone, ConditionEncoder
from openwu.errors import CheckpointError

ENCODERS: dict[str, str] = {
    "base": "openwu.conditions.segments:BaseCondition",
    "denoiser-states": "openwu.conditions.denoiser_states:DenoiserStates",
    "part-states": "openwu.conditions.part_states:PartStates",
    "segments": "openwu.conditions.segments:Segments",
    "siglip2": "openwu.conditions.siglip2:Siglip2",
}
"""Name -> "module:Class" of an encoder that is made from a backbone and plain values (its `settings`)."""


def make_encoder(described: Any, backbone: Backbone) -> ConditionEncoder:
    """The encoder that `describe_encoder` described."""
    name = described.get("name") if isinstance(described, Mapping) else described
    if not isinstance(described, Mapping) or name not in ENCODERS:
        raise CheckpointError(
            f"condition: expected an encoder of {', '.join(ENCODERS)}, got {name!r}; install a newer openwu"
        )
    try:
        made: ConditionEncoder = _class(ENCODERS[name])(backbone, **{k: v for k, v in described.items() if k != "name"})
    except TypeError as error:
        raise CheckpointError(
            f"condition: {name}: the generator's config has settings it does not take: {error}"
        ) from error
    return made


def chosen_encoder(described: Sequence[Mapping[str, Any]], backbone: Backbone) -> ConditionEncoder | None:
    """One encoder for all that were chosen; None where nothing but the base's own condition was."""
    if not described or (len(described) == 1 and described[0].get("name") == "base"):
        return None
    if len(described) == 1:
        return make_encoder(described[0], backbone)
    return make_encoder({"name": "segments", "parts": list(described)}, backbone)


def describe_encoder(encoder: ConditionEncoder) -> dict[str, Any]:
    """Its name and settings, for a generator's config."""
    for name, where in ENCODERS.items():
        if where == f"{type(encoder).__module__}:{type(encoder).__qualname__}":
            return {"name": name, **getattr(encoder, "settings", {})}
    raise CheckpointError(f"condition: expected an encoder of {', '.join(ENCODERS)}, got {type(encoder).__name__}")


def _class(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
