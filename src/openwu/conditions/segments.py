"""Several conditions side by side, a segment for each.

The generator has an input projection for each segment, so that encoders of any widths stand beside one another.

Shapes: b requests; every segment `[b, l, width]` with lengths and widths of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from openwu.conditions import ConditionSource, Encoder, describe_encoder, make_encoder
from openwu.errors import CheckpointError
from openwu.types import BaseRequest, Condition, Segment


def grey_request() -> BaseRequest:
    """A small request, for encoders whose width is found by encoding one."""
    return BaseRequest((Image.new("RGB", (64, 64), "grey"),), "a")


class BaseCondition(Encoder):
    """The base's own condition, as one of several."""

    def __init__(self, base: ConditionSource) -> None:
        self.base = base
        self.settings = {}

    @property
    def condition_widths(self) -> Mapping[str, int]:
        return self.base.condition_widths

    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        return self.base.condition(requests)


class Segments(Encoder):
    """The conditions of several encoders; the first segment of the first one is `Condition.tokens`."""

    def __init__(self, base: ConditionSource, parts: Sequence[Mapping[str, Any]]) -> None:
        """`parts`: encoders as a generator's config describes them, in the order in which they are read."""
        if not isinstance(parts, list | tuple) or not parts:
            raise CheckpointError(f"condition: segments: parts: expected a list of encoders, got {parts!r}")
        self.parts = tuple(make_encoder(part, base) for part in parts)
        self.settings = {"parts": [describe_encoder(part) for part in self.parts]}
        self.reads_seed = any(part.reads_seed for part in self.parts)
        self.asks_denoiser = any(part.asks_denoiser for part in self.parts)

    @property
    def identity(self) -> str:
        return " ".join(part.identity for part in self.parts).strip()

    @property
    def own_bytes(self) -> int:
        """Bytes of the encoders' own weights."""
        return sum(part.own_bytes for part in self.parts)

    @property
    def condition_widths(self) -> Mapping[str, int]:
        """Segment names hold the encoder's place, since two may have segments of one name."""
        return {
            _name(place, segment): width
            for place, part in enumerate(self.parts)
            for segment, width in part.condition_widths.items()
        }

    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """Every encoder encodes all requests."""
        found: dict[str, Segment] = {}
        for place, part in enumerate(self.parts):
            own = part.condition(requests)
            first, *_ = part.condition_widths
            segments = {first: Segment(own.tokens, own.mask), **own.more}
            found |= {_name(place, segment): value for segment, value in segments.items()}
        (_, first_of_all), *more = found.items()
        home = first_of_all.tokens.device
        return Condition(first_of_all.tokens, first_of_all.mask, {name: each.to(home) for name, each in more})

    def place(self, device: str | torch.device) -> None:
        """Move the encoders that have weights of their own."""
        for part in self.parts:
            part.place(device)


def _name(place: int, segment: str) -> str:
    return f"part{place}_{segment}"
