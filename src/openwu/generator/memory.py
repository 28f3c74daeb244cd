"""What a generator needs in memory before it is loaded: its folder enters, bytes leave.

Shapes: n base layers of a group, hw positions of one, d width.
"""

from __future__ import annotations

from pathlib import Path

import torch

from openwu.config import GeneratorConfig
from openwu.generator.checkpoint import read_shape
from openwu.generator.layout import GeneratorLayout

FEED_FORWARD = 10
"""Numbers per position and width in a block's feed-forward: the residual, its norm, 4 before and 4 after silu."""

COPIES = 3
"""An adapter as generated, at its strength, and stacked for the base's call."""


def bytes_beside(folder: Path, dtype: torch.dtype | None) -> int:
    """Weights, activations and adapters of one request at a time; `dtype` None: that of the files."""
    config, numbers, stored = read_shape(folder)
    return needed(config, numbers, dtype or stored)


def needed(config: GeneratorConfig, numbers: int, dtype: torch.dtype) -> int:
    """The same for a generator of `numbers` parameters: groups go through the blocks one after another."""
    layout = GeneratorLayout.of(config)
    positions = max(group.num_positions for group in layout.groups)
    activations = FEED_FORWARD * positions * config.d_model
    return (numbers + activations + COPIES * layout.adapter_size) * dtype.itemsize
