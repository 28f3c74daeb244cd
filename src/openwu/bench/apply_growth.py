"""How the cost of applying adapters grows: with the rank, with the number of adapters in a batch, with the experts.

Plain data leaves: each point's measured overhead beside the work that a model of floating-point operations and bytes
predicts for it. The predicted seconds are that work in the measure of the first point of the series: the first is exact
by construction, the others are the prediction.

Shapes: T tokens, S routed rows, r rank, b adapters, E experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapter.inject import attach
from openwu.bench.apply_parts import ExpertsLayer, overhead, random_adapter
from openwu.bench.row import interleaved
from openwu.types import Target

ITEMSIZE = 4
"""Bytes of a float32 number."""


@dataclass(frozen=True)
class Work:
    """What the update of some rows costs, by counting."""

    flops: int
    """Two per multiplication: rows go through A and through B."""
    moved: int
    """Bytes: A and B once for every group of rows; x read, A x written and read, y read and written."""


def work(targets: list[Target], rows: int, rank: int, groups: int) -> Work:
    """`rows` rows in `groups` groups of equal adapters through the A and B of all `targets`."""
    flops = sum(2 * rows * rank * (t.in_dim + t.out_dim) for t in targets)
    of_rows = sum(rows * (t.in_dim + 2 * rank + 2 * t.out_dim) for t in targets)
    of_weights = sum(groups * rank * (t.in_dim + t.out_dim) for t in targets)
    return Work(flops, ITEMSIZE * (of_rows + of_weights))


def measure(quick: bool, device: str = "cpu") -> dict[str, list[dict[str, Any]]]:
    """Series name -> points with `x`, `base_seconds`, `overhead_seconds`, `flops`, `moved`, and both predictions."""
    dim, tokens, repeats = (32, 64, 3) if quick else (256, 1024, 11)
    counts = (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32)
    ranks = (4, 8) if quick else (4, 8, 16, 32, 64)
    experts = (4, 8) if quick else (8, 16, 32, 64)
    with torch.no_grad():
        return {
            "rank": _predicted([_dense(dim, tokens, rank, 4, repeats, device, x=rank) for rank in ranks]),
            "adapters in the batch": _predicted(
                [_dense(dim, tokens, 16, count, repeats, device, x=count) for count in counts]
            ),
            "experts": _predicted([_experts(dim, tokens, count, repeats, device) for count in experts]),
        }


def _dense(dim: int, tokens: int, rank: int, batch: int, repeats: int, device: str, x: int) -> dict[str, Any]:
    """A linear layer on `tokens` tokens that `batch` requests share equally."""
    torch.manual_seed(0)
    target = Target("0", dim, dim)
    layer = nn.Sequential(nn.Linear(dim, dim)).to(device)
    inputs = torch.randn(batch, tokens // batch, dim, device=device)
    return _point(layer, [target], inputs, rank, repeats, x, work([target], tokens, rank, batch))


def _experts(dim: int, tokens: int, experts: int, repeats: int, device: str) -> dict[str, Any]:
    """A layer of experts, 4 chosen per token, 4 requests."""
    torch.manual_seed(0)
    layer = ExpertsLayer(dim, dim // 2, experts, 4).requires_grad_(False).to(device)
    inputs = torch.randn(4, tokens // 4, dim, device=device)
    return _point(
        layer, layer.targets(), inputs, 16, repeats, experts, work(layer.targets(), 4 * tokens, 16, 4 * experts)
    )


def _point(
    layer: nn.Module, targets: list[Target], inputs: Tensor, rank: int, repeats: int, x: int, counted: Work
) -> dict[str, Any]:
    adapter = random_adapter(targets, len(inputs), rank=rank, dtype=inputs.dtype, seed=0).to(inputs.device)
    with attach(layer, targets) as handle:

        def run(adapted: bool) -> None:
            if adapted:
                with handle.applied(adapter):
                    layer(inputs)
            else:
                layer(inputs)
            if inputs.is_cuda:
                torch.cuda.synchronize()

        timed = interleaved({"base": lambda: run(False), "adapted": lambda: run(True)}, repeats)
    cost = overhead(timed["adapted"], timed["base"])
    return {"x": x, "base_seconds": timed["base"].median, "overhead_seconds": cost} | asdict(counted)


def _predicted(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each point with the seconds that its operations and its bytes predict from the first point's."""
    first = points[0]
    for measure_of in ("flops", "moved"):
        for point in points:
            ratio = point[measure_of] / first[measure_of]
            point[f"predicted_by_{measure_of}_seconds"] = first["overhead_seconds"] * ratio
    return points
