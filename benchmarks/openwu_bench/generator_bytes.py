"""C2: bytes that one generator block materialises on the fast path, against the reference path; time plays no part.

Counted are the results of torch's operations. Views cost nothing; what a kernel needs inside is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openwu.errors import OpenwuError
from openwu.generator.blocks import Block, block_rotary
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.model import ParameterGenerator
from openwu_bench.generator import CONDITION_TOKENS, small_config
from openwu_bench.measurement import Row

GOAL = 0.45
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""Largest relative difference (norms) of what a block adds to the stream."""
EMPTY = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})
"""Operations that allocate and write nothing; the operation that fills the memory is counted."""


class MemoryTraffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the results of all operations in this scope."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated = 0
        """Bytes of results in new memory."""
        self.written = 0
        """Bytes of all results, those written to existing memory included."""
        self.by_operation: dict[str, int] = {}
        """Operation -> its part of `written`."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        inputs = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        for position, each in enumerate(tree_leaves(result)):
            if not isinstance(each, Tensor):
                continue
            fresh = _storage(each) not in inputs
            if fresh:
                self.allocated += each.nbytes
            if (fresh and name not in EMPTY) or _writes_input(func, position):
                self.written += each.nbytes
                self.by_operation[name] = self.by_operation.get(name, 0) + each.nbytes
        return result


def _writes_input(func: Any, position: int) -> bool:
    """Whether an operation writes this result over one of its inputs."""
    returns = func._schema.returns
    alias = returns[min(position, len(returns) - 1)].alias_info if returns else None
    return alias is not None and alias.is_write


def _storage(tensor: Tensor) -> int:
    storage: int = tensor.untyped_storage()._cdata
    return storage


@torch.no_grad()
def measure(quick: bool) -> Row:
    """Measure row C2: fresh memory of the fast path's results / the reference path's, in float32.

    bfloat16 and all bytes written are in the details: the fast path writes most of its results into a workspace.
    `quick` takes two base layers instead of eight: ratios hardly change.
    """
    torch.manual_seed(0)
    generator = ParameterGenerator(small_config(layers=2 if quick else 8, blocks=1))
    details: dict[str, float] = {}
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        reference, fast, errors[dtype] = block_traffic(generator.to(dtype), CONDITION_TOKENS)
        if not errors[dtype] <= TOLERANCE[dtype]:
            raise OpenwuError(f"C2: the block's two ways differ by {errors[dtype]:.2g} in {dtype}; not measured")
        name = str(dtype).removeprefix("torch.")
        for side, traffic in (("reference", reference), ("fast", fast)):
            details[f"{name} {side}: MB written"] = traffic.written / 2**20
            details[f"{name} {side}: MB allocated"] = traffic.allocated / 2**20
        details[f"{name}: ratio written"] = fast.written / reference.written
        details[f"{name}: ratio allocated"] = fast.allocated / reference.allocated
    title = "fresh memory of one generator block's results (d 256, n 8, hw 384), against the plain reference"
    value, error = details["float32: ratio allocated"], errors[torch.float32]
    return Row("C2", title, value, "x", GOAL, at_least=False, error=error, details=details)


def block_traffic(generator: ParameterGenerator, condition_tokens: int) -> tuple[MemoryTraffic, MemoryTraffic, float]:
    """Return the traffic of a block on the reference and on the fast path, and how much their updates differ."""
    layout, config = generator.layout.groups[0], generator.config
    weight = generator.hidden_in.weight
    block = generator.blocks[0]
    assert isinstance(block, Block)
    x_bnpd = torch.randn(1, layout.num_layers, layout.positions_per_layer, config.d_model).to(weight.dtype)
    c_bld = torch.randn(1, condition_tokens, config.d_model).to(weight.dtype)
    shape = (layout.num_layers, layout.num_tokens, layout.columns, condition_tokens)
    angles = block_rotary(config.head_dim, *shape, weight.device)
    with MemoryTraffic() as reference_traffic:
        expected = block(x_bnpd, c_bld, angles, None)
    fast = FastGenerator(generator)
    fast.pack(weight.dtype)
    stages, keys = fast.stages(0, layout, condition_tokens, weight.dtype, weight.device)

    def run(x: Tensor) -> None:
        stages.mix_layers_(x)
        stages.mix_positions_(x)
        stages.answer_(x, stages.read(c_bld, keys, None))

    run(x_bnpd.clone())  # the workspace is allocated by the first call
    actual = x_bnpd.clone()
    with MemoryTraffic() as fast_traffic:
        run(actual)
    update, other = (each.double() - x_bnpd.double() for each in (expected, actual))
    return reference_traffic, fast_traffic, float((other - update).norm() / update.norm())
