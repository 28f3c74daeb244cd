"""Pad rows of different lengths into one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack rows `[l, width]` of different lengths: `[b, L, width]` with zeros behind, and the mask `[b, L]`.

    The mask is True where a token is real.
    """
    longest = max(len(row) for row in rows)
    tokens = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    return tokens, torch.arange(longest, device=tokens.device) < lengths[:, None]
