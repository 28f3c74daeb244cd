"""C4 and C6: linear layers with a batch of different adapters, and 20 adapters in turn when compiled, against PEFT."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from openwu.adapters.inject import AdapterHandle, attach
from openwu.errors import OpenwuError
from openwu.types import Adapter, Target
from openwu_bench.adapters import RANK, adapted, gate, load_peft, overhead, random_adapter, times_lower
from openwu_bench.measurement import Row, Timing, interleaved

TOLERANCE = 1e-5
BATCHES = {f"{count} requests, {count} adapters": (count, count) for count in (1, 8, 32, 64)} | {
    "32 requests, 8 adapters": (32, 8)
}
"""Name -> requests in the batch, different adapters among them."""
JUDGED = ("8 requests, 8 adapters", "32 requests, 32 adapters")
ADAPTERS = 20
BACKEND = "aot_eager"


@torch.no_grad()
def measure_mixed_batch(quick: bool) -> Row:
    """Measure row C4: overhead on a dense layer of a batch with different adapters, against PEFT's `adapter_names`.

    The value is the lower of two ratios: 8 and 32 requests, each with its own adapter.
    """
    dim, length, repeats = (64, 4, 5) if quick else (512, 16, 9)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(dim, dim))
    target = Target("0", dim, dim)
    ratios: dict[str, float] = {}
    sides: dict[str, Timing] = {}
    error = 0.0
    for batch, (requests, count) in BATCHES.items():
        if quick and count > 32:
            continue
        x = torch.randn(requests, length, dim)
        adapter = random_adapter([target], count, dtype=x.dtype, seed=count)
        rows = [row % count for row in range(requests)]
        mixed = peft_model(nn.Sequential(layer[0]), adapter)
        theirs = partial(mixed, x, adapter_names=[f"request{row}" for row in rows])
        with attach(layer, [target]) as handle:

            def ours(
                handle: AdapterHandle = handle, adapter: Adapter = adapter, rows: list[int] = rows, x: Tensor = x
            ) -> Tensor:
                with handle.applied(adapter, rows):
                    return layer(x)  # type: ignore[no-any-return]

            error = max(error, gate("C4", ours(), theirs(), TOLERANCE, layer(x)))
            plain = nn.Sequential(nn.Linear(dim, dim))
            plain.load_state_dict({"0.weight": layer[0].weight, "0.bias": layer[0].bias})
            timed = interleaved({"base": partial(plain, x), "ours": ours, "peft": theirs}, repeats)
        costs = overhead(timed["ours"], timed["base"]), overhead(timed["peft"], timed["base"])
        ratios[batch] = times_lower(*costs, resolution=0.01 * timed["base"].median)
        sides |= {f"{name}, {batch}": timing for name, timing in timed.items()}
    title = "dense layer, 8 and 32 requests with an adapter each: overhead against PEFT adapter_names"
    details = {"dim": dim, "tokens per request": length, "rank": RANK, "dtype": "float32", "ratios": ratios}
    return Row("C4", title, min(ratios[batch] for batch in JUDGED), "x", 5.0, sides=sides, error=error, details=details)


def peft_model(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Wrap `model` in PEFT with one named adapter per sample: request0, request1, ..."""
    peft = load_peft()
    names = [target.name for target in adapter.targets]
    config = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.scale * adapter.rank, target_modules=names)
    wrapped = peft.get_peft_model(model, config, adapter_name="request0")
    for sample in range(1, adapter.batch):
        wrapped.add_adapter(f"request{sample}", config)
    for name, (a, b) in adapter.pairs.items():
        module = wrapped.base_model.model.get_submodule(name)
        for sample in range(adapter.batch):
            module.lora_A[f"request{sample}"].weight.data.copy_(a[sample])
            module.lora_B[f"request{sample}"].weight.data.copy_(b[sample])
    return wrapped.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def measure_compiled(quick: bool) -> Row:
    """Measure row C6: cost of changing the adapter of a compiled model against PEFT's hot-swapping, 20 times.

    Recompilations are counted; one of ours raises OpenwuError. PEFT gets its new weights from memory
    (`hotswap_adapter_from_state_dict`), not from a folder.
    """
    dim, layers, repeats = (32, 4, 3) if quick else (256, 24, 7)
    torch.manual_seed(0)
    model, other = linear_stack(dim, layers), linear_stack(dim, layers)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 8, dim)
    targets = [Target(name, dim, dim) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    adapters = [random_adapter(targets, 1, dtype=x.dtype, seed=seed) for seed in range(ADAPTERS)]
    torch._dynamo.reset()
    counts = {name: CompileCounterWithBackend(BACKEND) for name in ("ours", "peft")}
    swapped = HotSwapped(other, adapters[0], counts["peft"])
    with attach(model, targets) as handle:
        compiled = torch.compile(model, backend=counts["ours"], fullgraph=True)
        ours = [adapted(handle, compiled, each, x) for each in adapters]
        error = max(gate("C6", run(), swapped(each, x), TOLERANCE) for run, each in zip(ours, adapters, strict=True))
        after_first = {name: count.frame_count for name, count in counts.items()}

        def in_one_scope() -> None:
            with handle.applied(adapters[0]):
                for _ in adapters:
                    compiled(x)

        runs = {
            "ours, one adapter": in_one_scope,
            "ours, 20 adapters": lambda: [run() for run in ours],
            "peft, one adapter": lambda: [swapped.model(x) for _ in adapters],
            "peft, 20 adapters": lambda: [swapped(each, x) for each in adapters],
        }
        timed = interleaved(runs, repeats)
    recompiled = {name: count.frame_count - 1 for name, count in counts.items()}
    if recompiled["ours"] or after_first != {name: count.frame_count for name, count in counts.items()}:
        raise OpenwuError(f"C6: expected one compilation for {ADAPTERS} adapters, got recompilations: {recompiled}")
    costs = [overhead(timed[f"{side}, 20 adapters"], timed[f"{side}, one adapter"]) for side in ("ours", "peft")]
    value = times_lower(costs[0], costs[1], resolution=0.01 * timed["ours, one adapter"].median)
    details = {
        "dim": dim,
        "adapted layers": len(targets),
        "rank": RANK,
        "backend": BACKEND,
        "recompilations": recompiled,
    }
    details |= {
        f"seconds per change, {name}": cost / ADAPTERS for name, cost in zip(("ours", "PEFT"), costs, strict=True)
    }
    title = "20 adapters in turn under torch.compile: cost of a change against PEFT hot-swapping"
    return Row("C6", title, value, "x", 5.0, sides=timed, error=error, details=details)


def linear_stack(dim: int, layers: int) -> nn.Sequential:
    """Return frozen linear layers with SiLU between them."""
    parts = [part for _ in range(layers) for part in (nn.Linear(dim, dim), nn.SiLU())]
    return nn.Sequential(*parts).requires_grad_(False)


class HotSwapped:
    """A compiled model in PEFT, and the call that replaces its adapter's weights."""

    def __init__(self, model: nn.Module, first: Adapter, backend: CompileCounterWithBackend) -> None:
        peft = load_peft()
        from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

        self._swap = hotswap_adapter_from_state_dict
        names = [target.name for target in first.targets]
        self._config = peft.LoraConfig(r=first.rank, lora_alpha=first.scale * first.rank, target_modules=names)
        wrapped = peft.get_peft_model(model, self._config).eval().requires_grad_(False)
        prepare_model_for_compiled_hotswap(wrapped)
        self.model: Any = torch.compile(wrapped, backend=backend)

    def __call__(self, adapter: Adapter, x: Tensor) -> Tensor:
        state = {
            f"base_model.model.{name}.lora_{part}.default.weight": pair[i][0]
            for name, pair in adapter.pairs.items()
            for i, part in enumerate("AB")
        }
        self._swap(self.model, state, "default", self._config)
        return self.model(x)  # type: ignore[no-any-return]
