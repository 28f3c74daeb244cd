"""What encoders that ask about one request at a time share: rows of several lengths enter, one condition leaves.

Shapes: b requests, l tokens of one of them, L of the longest, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from openwu.types import BaseRequest, Condition


def together(rows: Sequence[Tensor]) -> Condition:
    """b tensors `[l, d]` -> tokens `[b, L, d]`, filled up with zeros that the mask leaves out."""
    longest = max(len(row) for row in rows)
    tokens = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    return Condition(tokens, torch.arange(longest, device=tokens.device) < lengths[:, None])


def grey_request() -> BaseRequest:
    """For encoders whose width is found by asking."""
    return BaseRequest((Image.new("RGB", (64, 64), "grey"),), "a")
