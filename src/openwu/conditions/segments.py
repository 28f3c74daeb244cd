"""Several conditions as one: requests enter, the tokens of every encoder leave side by side, a segment for each.

The generator has an input projection for each segment, so that encoders of any widths stand beside one another.

Shapes: b requests; every segment `[b, l, width]` with lengths and widths of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from openwu.backbones.protocol import Backbone
from openwu.conditions import describe_encoder, make_encoder
from openwu.errors import CheckpointError
from openwu.types import BaseRequest, Condition, Segment


def together(rows: Sequence[Tensor]) -> Condition:
    """b tensors `[l, d]` -> tokens `[b, L, d]`, filled up with zeros that the mask leaves out."""
    longest = max(len(row) for row in rows)
    tokens = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    return Condition(tokens, torch.arange(longest, device=tokens.device) < lengths[:, None])


def grey_request() -> BaseRequest:
    """For encoders whose width is found by asking."""
    return BaseRequest((Image.new("RGB", (64, 64), "grey"),), "a")


class BaseCondition:
    """What a base says of its requests by itself."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.settings: dict[str, Any] = {}

    @property
    def condition_widths(self) -> Mapping[str, int]:
        return self.backbone.condition_widths

    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        return self.backbone.condition(requests)


class Segments:
    """The conditions of several encoders; the first segment of the first one is `Condition.tokens`."""

    def __init__(self, backbone: Backbone, parts: Sequence[Mapping[str, Any]]) -> None:
        """`parts`: encoders as a generator's config describes them, in the order in which they are read."""
        if not isinstance(parts, list | tuple) or not parts:
            raise CheckpointError(f"condition: segments: parts: expected a list of encoders, got {parts!r}")
        self.parts = tuple(make_encoder(part, backbone) for part in parts)
        self.settings = {"parts": [describe_encoder(part) for part in self.parts]}
        self.asks_denoiser = any(getattr(part, "asks_denoiser", False) for part in self.parts)
        self.identity = " ".join(str(getattr(part, "identity", "")) for part in self.parts).strip()

    @property
    def own_bytes(self) -> int:
        """Bytes of the encoders' own weights; those that speak of the base have none."""
        return sum(getattr(part, "own_bytes", 0) for part in self.parts)

    @property
    def condition_widths(self) -> Mapping[str, int]:
        """Segment names hold the encoder's place, since two may have segments of one name."""
        return {
            _name(place, segment): width
            for place, part in enumerate(self.parts)
            for segment, width in part.condition_widths.items()
        }

    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """Every encoder is asked about all requests."""
        found: dict[str, Segment] = {}
        for place, part in enumerate(self.parts):
            said = part.condition(requests)
            first, *_ = part.condition_widths
            segments = {first: Segment(said.tokens, said.mask), **said.more}
            found |= {_name(place, segment): value for segment, value in segments.items()}
        (_, first_of_all), *more = found.items()
        home = first_of_all.tokens.device
        return Condition(first_of_all.tokens, first_of_all.mask, {name: each.to(home) for name, each in more})

    def place(self, device: str | torch.device) -> None:
        """Move the encoders that have weights of their own."""
        for part in self.parts:
            if (place := getattr(part, "place", None)) is not None:
                place(device)


def _name(place: int, segment: str) -> str:
    return f"part{place}_{segment}"
