"""Condition encoders that replace a base's own: one file per encoder, chosen by name in a generator's config.

A base makes conditions itself. An encoder of `openwu.registry.CONDITION_ENCODERS` takes its place; what it needs of the
base is declared in `ConditionSource`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openwu.errors import CheckpointError
from openwu.registry import CONDITION_ENCODERS, resolve
from openwu.types import BaseRequest, Condition, ConditionEncoder, LatentBatch


class ConditionSource(Protocol):
    """What an encoder needs of a base model."""

    @property
    def denoiser(self) -> nn.Module: ...
    @property
    def alphas_cumprod(self) -> Tensor | None: ...
    @property
    def condition_widths(self) -> Mapping[str, int]: ...

    def parts(self) -> Mapping[str, Any]: ...
    def condition(self, requests: Sequence[BaseRequest]) -> Condition: ...
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch: ...
    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor: ...


class Encoder(ConditionEncoder):
    """A condition encoder beside the base, made from the base and plain values, its `settings`."""

    settings: Mapping[str, Any]
    """Keyword arguments that make the same encoder again, for a generator's config."""

    @property
    def own_bytes(self) -> int:
        """Bytes of the encoder's own weights; 0 where it reads the base's modules."""
        return 0

    def place(self, device: str | torch.device) -> None:
        """Move weights of the encoder's own; "meta" drops them for good."""


def make_encoder(described: Any, base: ConditionSource) -> Encoder:
    """Make the encoder that `describe_encoder` described. Raises CheckpointError for an unknown name or settings."""
    name = described.get("name") if isinstance(described, Mapping) else described
    if not isinstance(described, Mapping) or name not in CONDITION_ENCODERS:
        raise CheckpointError(
            f"condition: expected an encoder of {', '.join(CONDITION_ENCODERS)}, got {name!r}; install a newer openwu"
        )
    settings = {key: value for key, value in described.items() if key != "name"}
    try:
        made: Encoder = resolve(CONDITION_ENCODERS[name])(base, **settings)
    except TypeError as error:
        raise CheckpointError(
            f"condition: {name}: the generator's config has settings it does not take: {error}"
        ) from error
    return made


def chosen_encoder(described: Sequence[Mapping[str, Any]], base: ConditionSource) -> Encoder | None:
    """Make one encoder of all that were chosen; None where nothing but the base's own condition was."""
    if not described or (len(described) == 1 and described[0].get("name") == "base"):
        return None
    if len(described) == 1:
        return make_encoder(described[0], base)
    return make_encoder({"name": "segments", "parts": list(described)}, base)


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """Return an encoder's name and settings, for a generator's config."""
    for name, where in CONDITION_ENCODERS.items():
        if where == f"{type(encoder).__module__}:{type(encoder).__qualname__}":
            return {"name": name, **encoder.settings}
    raise CheckpointError(
        f"condition: expected an encoder of {', '.join(CONDITION_ENCODERS)}, got {type(encoder).__name__}; "
        "register it in openwu.registry"
    )
