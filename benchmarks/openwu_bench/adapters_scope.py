"""C13 and C14: what changing the adapter costs, against PEFT's switch; applying against merging, at the crossover."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.adapters.merge import merged_copy, merging_pays
from openwu.types import Target
from openwu_bench.adapters import RANK, adapted, gate, overhead, random_adapter, times_lower
from openwu_bench.adapters_dense import linear_stack, peft_model
from openwu_bench.measurement import Row, Timing, interleaved

TOLERANCE = 1e-5
ADAPTERS = 20
AROUND = (0.25, 1.0, 4.0)
"""Rows of the input, in crossovers."""


@torch.no_grad()
def measure_scope(quick: bool) -> Row:
    """Measure row C13: cost of another adapter for every call of a model of many small layers, not compiled.

    Ours enters a scope for every call; PEFT has all adapters loaded and switches with `set_adapter`.
    """
    dim, layers, repeats = (32, 4, 3) if quick else (64, 100, 15)
    torch.manual_seed(0)
    model, other = linear_stack(dim, layers), linear_stack(dim, layers)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 8, dim)
    targets = [Target(name, dim, dim) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    batch = random_adapter(targets, ADAPTERS, dtype=x.dtype, seed=0)
    switched = peft_model(other, batch)

    def theirs(sample: int) -> Tensor:
        switched.set_adapter(f"request{sample}")  # type: ignore[operator]
        return switched(x)  # type: ignore[no-any-return]

    with attach(model, targets) as handle:
        adapters = [batch.select([sample]) for sample in range(ADAPTERS)]
        ours = [adapted(handle, model, each, x) for each in adapters]
        base = nn.Sequential(*linear_stack(dim, layers))
        base.load_state_dict(model.state_dict())
        error = max(gate("C13", run(), theirs(i), TOLERANCE, base(x)) for i, run in enumerate(ours))

        def in_one_scope() -> None:
            with handle.applied(adapters[0]):
                for _ in adapters:
                    model(x)

        timed = interleaved(
            {
                "ours, one adapter": in_one_scope,
                "ours, 20 adapters": lambda: [run() for run in ours],
                "peft, one adapter": lambda: [switched(x) for _ in adapters],
                "peft, 20 adapters": lambda: [theirs(i) for i in range(ADAPTERS)],
            },
            repeats,
        )
    costs = [overhead(timed[f"{side}, 20 adapters"], timed[f"{side}, one adapter"]) for side in ("ours", "peft")]
    value = times_lower(costs[0], costs[1], resolution=0.01 * timed["ours, one adapter"].median)
    details = {"dim": dim, "adapted layers": len(targets), "rank": RANK} | {
        f"seconds per change, {name}": cost / ADAPTERS for name, cost in zip(("ours", "PEFT"), costs, strict=True)
    }
    title = (
        "another adapter for every call of a model of many layers: cost of entering a scope against PEFT set_adapter"
    )
    return Row("C13", title, value, "x", 1.0, sides=timed, error=error, details=details)


@torch.no_grad()
def measure_crossover(quick: bool) -> Row:
    """Measure row C14: what `merging_pays` chooses against the better of applying and merging, around its crossover.

    Merging is done anew for every call, as for an adapter that serves one request. The value is the worst ratio.
    """
    dim, repeats = (64, 3) if quick else (512, 31)
    torch.manual_seed(0)
    layer, target = nn.Sequential(nn.Linear(dim, dim)), Target("0", dim, dim)
    adapter = random_adapter([target], 1, dtype=torch.float32, seed=0)
    crossover = dim * dim // (dim + dim)
    sides: dict[str, Timing] = {}
    ratios: dict[str, float] = {}
    error = 0.0
    for factor in AROUND:
        rows = int(factor * crossover)
        x = torch.randn(1, rows, dim)
        with attach(layer, [target]) as handle:
            runs: dict[str, Callable[[], Tensor]] = {
                "applied": adapted(handle, layer, adapter, x),
                "merged": lambda x=x: merged_copy(layer, adapter)(x),  # type: ignore[misc]
                "base": partial(layer, x),
            }
            error = max(error, gate("C14", runs["applied"](), runs["merged"](), TOLERANCE, runs["base"]()))
            timed = interleaved(runs, repeats)
        chosen = "merged" if merging_pays(layer, [target], RANK, rows) else "applied"
        ratios[f"{rows} rows: {chosen}"] = timed[chosen].median / min(
            timed[way].median for way in ("applied", "merged")
        )
        sides |= {f"{name}, {rows} rows": timing for name, timing in timed.items()}
    title = "a linear layer around the crossover: the way that is chosen against the better of applying and merging"
    details = {"dim": dim, "rank": RANK, "chosen against the better": ratios}
    value = max(ratios.values())
    return Row("C14", title, value, "x", 1.25, at_least=False, sides=sides, error=error, details=details)
