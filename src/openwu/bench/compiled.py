"""C6: 20 adapters in turn in front of a compiled model, against PEFT's hot-swapping. Compilations are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from openwu.adapters.inject import attach
from openwu.bench.apply_parts import RANK, gate, load_peft, overhead, random_adapter, times_lower
from openwu.bench.row import Row, interleaved
from openwu.errors import OpenwuError
from openwu.types import Adapter, Target

TOLERANCE = 1e-5
ADAPTERS = 20
BACKEND = "aot_eager"


@torch.no_grad()
def measure(quick: bool) -> Row:
    """Row C6: what changing the adapter costs beside the compiled forward pass, and recompilations (none allowed).

    PEFT gets its new weights from memory (`hotswap_adapter_from_state_dict`), not from a folder.
    """
    dim, layers, repeats = (32, 4, 3) if quick else (256, 24, 7)
    torch.manual_seed(0)
    model, other = blocks(dim, layers), blocks(dim, layers)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 8, dim)
    targets = [Target(name, dim, dim) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    adapters = [random_adapter(targets, 1, dtype=x.dtype, seed=seed) for seed in range(ADAPTERS)]
    torch._dynamo.reset()
    counts = {name: CompileCounterWithBackend(BACKEND) for name in ("ours", "peft")}
    swapped = HotSwapped(other, adapters[0], counts["peft"])
    with attach(model, targets) as handle:
        compiled = torch.compile(model, backend=counts["ours"], fullgraph=True)

        def ours(adapter: Adapter) -> Tensor:
            with handle.applied(adapter):
                return compiled(x)  # type: ignore[no-any-return]

        error = max(gate("C6", ours(each), swapped(each, x), TOLERANCE) for each in adapters)
        after_first = {name: count.frame_count for name, count in counts.items()}

        def in_one_scope() -> None:
            with handle.applied(adapters[0]):
                for _ in adapters:
                    compiled(x)

        timed = interleaved(
            {
                "ours, one adapter": in_one_scope,
                "ours, 20 adapters": lambda: [ours(each) for each in adapters],
                "peft, one adapter": lambda: [swapped.model(x) for _ in adapters],
                "peft, 20 adapters": lambda: [swapped(each, x) for each in adapters],
            },
            repeats,
        )
    recompiled = {name: count.frame_count - 1 for name, count in counts.items()}
    if recompiled["ours"] or after_first != {name: count.frame_count for name, count in counts.items()}:
        raise OpenwuError(f"C6: expected one compilation for {ADAPTERS} adapters, got recompilations: {recompiled}")
    costs = [overhead(timed[f"{side}, 20 adapters"], timed[f"{side}, one adapter"]) for side in ("ours", "peft")]
    return Row(
        "C6",
        "20 adapters in turn under torch.compile: cost of a change against PEFT hot-swapping",
        times_lower(costs[0], costs[1], resolution=0.01 * timed["ours, one adapter"].median),
        "x",
        5.0,
        sides=timed,
        error=error,
        details={
            "dim": dim,
            "adapted layers": len(targets),
            "rank": RANK,
            "backend": BACKEND,
            "recompilations": recompiled,
            "seconds per change, ours": costs[0] / ADAPTERS,
            "seconds per change, PEFT": costs[1] / ADAPTERS,
        },
    )


def blocks(dim: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(dim, dim), nn.SiLU()))).requires_grad_(
        False
    )


class HotSwapped:
    """PEFT's side: a compiled model and the call that replaces its adapter's weights."""

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
