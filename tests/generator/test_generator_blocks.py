"""The generator's parts against naive loops: rotary angles on one and two axes, norms, masked attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openwu.generator.blocks import Attention, Block, RMSNorm, block_rotary, rotary, rotate


def naive_rotary(head: list[float], positions: list[int]) -> list[float]:
    """One head's vector, pair by pair; each axis owns an equal, consecutive part of the head."""
    width = len(head) // len(positions)
    turned = []
    for axis, position in enumerate(positions):
        for k in range(width // 2):
            x0, x1 = head[axis * width + 2 * k], head[axis * width + 2 * k + 1]
            angle = position * 10000.0 ** (-2 * k / width)
            turned += [x0 * math.cos(angle) - x1 * math.sin(angle), x0 * math.sin(angle) + x1 * math.cos(angle)]
    return turned


def naive_rotate(x_sqme: Tensor, positions: list[list[int]]) -> Tensor:
    """`positions`: for every row, its position on each axis."""
    rows = [
        [[naive_rotary(head.tolist(), positions[row]) for head in heads] for row, heads in enumerate(sequence)]
        for sequence in x_sqme
    ]
    return torch.tensor(rows, dtype=x_sqme.dtype)


@pytest.mark.parametrize(("layers", "rows", "columns", "keys"), [(3, 5, 2, 4), (2, 2, 3, 5), (1, 1, 1, 1)])
def test_every_rotary_table_matches_explicit_loops(layers: int, rows: int, columns: int, keys: int) -> None:
    tables = block_rotary(8, layers, rows, columns, keys, torch.device("cpu"))
    hw = rows * columns
    cases = {
        "layers": [[layer] for layer in range(layers)],
        "positions": [[row, column] for row in range(rows) for column in range(columns)],
        "cross_queries": [[layer, position] for layer in range(layers) for position in range(hw)],
        "cross_keys": [[key + max(rows, columns)] * 2 for key in range(keys)],
    }
    for name, positions in cases.items():
        x_sqme = torch.randn(2, len(positions), 3, 8, dtype=torch.float64)
        came = rotate(x_sqme, getattr(tables, name))
        torch.testing.assert_close(came, naive_rotate(x_sqme, positions), rtol=1e-12, atol=1e-12)


def test_angles_at_far_positions_are_exact_to_float32() -> None:
    far = 5515
    table = rotary(64, torch.tensor([far]))
    x_sqme = torch.randn(1, 1, 1, 64)
    expected = naive_rotary(x_sqme[0, 0, 0].tolist(), [far])
    torch.testing.assert_close(rotate(x_sqme, table)[0, 0, 0], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_rotary_products_depend_on_distance_alone() -> None:
    x_sqme, y_sqme = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(a: int, b: int) -> Tensor:
        return (rotate(x_sqme, rotary(16, torch.tensor([a]))) * rotate(y_sqme, rotary(16, torch.tensor([b])))).sum()

    torch.testing.assert_close(product(3, 10), product(40, 47))
    assert not torch.isclose(product(3, 10), product(3, 11))


@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_norm_returns_the_weights_dtype(into: torch.dtype, weights: torch.dtype, autocast: bool) -> None:
    norm = RMSNorm(8).to(weights)
    x = torch.randn(3, 8).to(into)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        came = norm(x)
    assert came.dtype == weights
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(came.double(), expected, rtol=1e-2, atol=1e-2)


def test_attention_matches_explicit_softmax_and_ignores_masked_keys() -> None:
    attention = Attention(16, 8).double()
    x_sqd, context_skd = torch.randn(2, 3, 16).double(), torch.randn(2, 5, 16).double()
    no_turn = [rotary(8, torch.zeros(count)) for count in (3, 5)]
    mask_sk = torch.tensor([[True, True, True, False, False], [True, False, True, True, True]])
    came = attention(x_sqd, context_skd, *no_turn, mask_sk)
    with torch.no_grad():
        q, k, v = attention.W_q(x_sqd), attention.W_k(context_skd), attention.W_v(context_skd)
        mixed = torch.zeros_like(x_sqd)
        for sample in range(2):
            seen = mask_sk[sample]
            for head in (slice(0, 8), slice(8, 16)):
                scores = q[sample, :, head] @ k[sample, seen, head].T / math.sqrt(8)
                mixed[sample, :, head] = scores.softmax(-1) @ v[sample, seen, head]
        expected = attention.W_o(mixed)
    torch.testing.assert_close(came, expected)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_block_keeps_the_residual_dtype(stream: torch.dtype, autocast: bool) -> None:
    block = Block(16, 8)
    angles = block_rotary(8, 2, 3, 1, 4, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        came = block(torch.randn(1, 2, 3, 16).to(stream), torch.randn(1, 4, 16), angles, None)
    assert came.dtype == stream
