"""The base's own condition under a name, so that a list of encoders can hold it: requests enter, its tokens leave.

A generator that reads nothing else needs no encoder; the base makes the condition then.

Shapes: as the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openwu.protocols import Backbone
from openwu.types import BaseRequest, Condition


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
