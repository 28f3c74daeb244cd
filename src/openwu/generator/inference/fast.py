"""Run a `ParameterGenerator` without gradients, faster and in bounded memory; the same function to rounding.

Against the clear path of `model.py` and `blocks.py`, equal to rounding:

- all intermediate results lie in a workspace of bounded size, cut by base layers or positions (`stages`); on a CPU the
  pieces run on threads of their own, which wait for one another only between the parts of a block;
- queries, keys and values of one input are one product (`products`); rotary tables are kept (`tables`);
- the first block up to its queries to the condition does not depend on the condition: computed once per checkpoint;
- the products may run in 8 bits (`fp8`, not equal to rounding);
- on a GPU, rotary embedding and norms may be kernels of ours (`openwu.kernels`).

What is kept follows the generator's weights: every call compares their storages and version counters. Weights changed
without a count, through `.data` or by torch's fused optimisers (`AdamW(fused=True)`; the trainer counts for its own),
need `forget()`, or `torch.autograd.graph.increment_version(weights)`.

Shapes: b samples, L condition tokens, n base layers of a group, p positions of one, d width, m heads, e head width.
"""

from __future__ import annotations

import importlib
import json
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from openwu.generator.blocks import Block
from openwu.generator.inference.products import JOINED_BYTES, Dense, MakeProduct, Norm, PackedBlock
from openwu.generator.inference.stages import Pieces, Stages, rms_norm, row_bytes
from openwu.generator.inference.tables import Tables, Workspace
from openwu.generator.layout import GroupLayout
from openwu.generator.model import GroupTokens, ParameterGenerator
from openwu.kernels.autotune import available, plain_torch
from openwu.types import Adapter, Condition

CHUNK_BYTES_CPU = 8 * 2**20
CHUNK_BYTES_GPU = 2**30
LEAST_PIECES = 4
"""On a CPU: for threads, see `stages.Pieces`."""


@dataclass(frozen=True)
class FastOptions:
    """What the fast path may do."""

    chunk_bytes: int | None = None
    """Workspace of one piece of the stream; None: 8 MB on a CPU, where it should fit the caches, 1 GB elsewhere."""
    chunk_layers: int | None = None
    """At most so many base layers in one piece; None: as many as the bytes allow."""
    keep_first_block: bool = True
    """Keep the part of the first block that no condition changes: twice the stream's size in memory."""
    make: MakeProduct = Dense
    """What computes the blocks' products; `fp8.fp8` in 8 bits."""
    joined_bytes: int = JOINED_BYTES
    """Weights of queries, keys and values are copied into one up to this size; larger ones write side by side."""
    kernels: bool = True
    """On a GPU, use kernels of ours where a first use finds them equal and faster (`autotune`)."""

    def __post_init__(self) -> None:
        for name in ("chunk_bytes", "chunk_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number above 0 or None, got {value}")

    @cached_property
    def described(self) -> str:
        """JSON that is another one where adapters may differ, be it by rounding: for the keys of kept adapters.

        Raises ValueError where `make` has no name that an import finds, which others could have as well.
        """
        name, module = getattr(self.make, "__qualname__", None), getattr(self.make, "__module__", None)
        if not name or not module or getattr(importlib.import_module(module), name, None) is not self.make:
            raise ValueError(
                f"make: expected a class or function of a module, whose name says what it computes, got {self.make!r}; "
                "define it there, or use no adapter cache"
            )
        return json.dumps({**asdict(self), "make": f"{module}:{name}"}, sort_keys=True)


class _First(NamedTuple):
    """What the first block does before it reads the condition."""

    x_npd: Tensor
    asked_qme: Tensor


class FastGenerator:
    """Computes what a generator computes. No gradients: inside of training call the generator itself.

    Calls from several threads wait for one another, since they share the workspace.
    """

    def __init__(self, generator: ParameterGenerator, options: FastOptions | None = None) -> None:
        self.generator = generator
        self.options = options or FastOptions()
        self.workspace = Workspace()
        self.tables = Tables()
        self.branches = {name: FastGenerator(generator.branch(name), options) for name in generator.config.branches}
        self._lock = threading.Lock()
        self._sources: tuple[object, ...] | None = None
        self._held: list[Tensor] = []
        self._packed: list[PackedBlock] = []
        self._first: dict[str, _First] = {}

    def __call__(self, condition: Condition | Tensor) -> Adapter:
        """One adapter per sample, without gradients."""
        if isinstance(condition, Condition) and condition.branch in self.branches:
            own = self.branches[condition.branch](replace(condition, branch=""))
            return self.generator.complete(own)
        with self._lock, torch.no_grad(), self.scope():
            return self._adapter(condition)

    def scope(self) -> AbstractContextManager[None]:
        """A scope of the kernels that the options allow."""
        return nullcontext() if self.options.kernels else plain_torch()

    @property
    def described(self) -> str:
        """`FastOptions.described`, and the kernels that may round elsewhere on the generator's device."""
        with self.scope():
            found = available(self.generator.hidden_in.weight.device)
        return self.options.described if found is None else f"{self.options.described} kernels {found}"

    def __getstate__(self) -> tuple[ParameterGenerator, FastOptions]:
        """A copy, or what goes to another process, starts with nothing kept."""
        return self.generator, self.options

    def __setstate__(self, state: tuple[ParameterGenerator, FastOptions]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def forget(self) -> None:
        """Drop everything that is kept."""
        for branch in self.branches.values():
            branch.forget()
        with self._lock:
            self._drop()
            self.workspace.forget()

    def pack(self, dtype: torch.dtype) -> None:
        """Bring what is kept up to the generator's weights, for products in `dtype`."""
        sources = self._versions(dtype)
        if sources is not None and sources == self._sources:
            return
        self._drop()
        generator = self.generator
        with torch.inference_mode(False), torch.no_grad():
            for block in generator.blocks:
                assert isinstance(block, Block)
                self._packed.append(PackedBlock.of(block, dtype, self.options.make, self.options.joined_bytes))
        self._sources = sources
        # Held, so that no new weight can take an old one's address.
        self._held = [parameter.detach() for parameter in generator.parameters()]

    def stages(
        self, number: int, layout: GroupLayout, keys: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Stages, Tensor]:
        """A packed block's parts for one group, and the factors that turn so many keys."""
        head_dim, real = self.generator.config.head_dim, torch.promote_types(dtype, torch.float32)
        rotary = self.tables.rotary(head_dim, layout, real, device)
        pieces = self._pieces(dtype, device)
        stages = Stages(self._packed[number], rotary, head_dim, dtype, pieces, self.workspace)
        return stages, self.tables.cross_keys(head_dim, layout, keys, real, device)

    def _drop(self) -> None:
        self._sources = None
        self._held = []
        self._packed = []
        self._first = {}

    def _versions(self, dtype: torch.dtype) -> tuple[object, ...] | None:
        """What the weights are now; None where torch does not count their changes."""
        parameters = list(self.generator.parameters())
        if any(parameter.is_inference() for parameter in parameters):
            return None
        return dtype, self._residual, *((each.data_ptr(), each._version, each.dtype, each.shape) for each in parameters)

    @property
    def _residual(self) -> torch.dtype:
        return self.generator.stream_dtype

    def _adapter(self, condition: Condition | Tensor) -> Adapter:
        generator = self.generator
        c_bld, mask_bl = generator.read(condition)
        device = c_bld.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else generator.hidden_in.weight.dtype
        factors: dict[str, dict[str, Tensor]] = {}
        with torch.autocast(device.type, enabled=False):
            self.pack(dtype)
            for layout in generator.layout.groups:
                tokens = generator.groups[layout.name]
                assert isinstance(tokens, GroupTokens)
                x_bnpd = self._refined(layout, tokens, c_bld, mask_bl, dtype)
                factors |= layout.unpack(*self.written(x_bnpd, tokens, dtype), tokens.shared_factors())
        return Adapter(generator.targets, factors, generator.scale)

    def _refined(
        self, layout: GroupLayout, tokens: GroupTokens, c_bld: Tensor, mask_bl: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The stream of one group after all blocks; it lies in the workspace."""
        config, device = self.generator.config, c_bld.device
        shape = (len(c_bld), layout.num_layers, layout.positions_per_layer, config.d_model)
        x_bnpd = self.workspace.take("stream", shape, self._residual, device)
        asked: Tensor | None = None
        for number in range(len(self._packed)):
            stages, keys = self.stages(number, layout, c_bld.shape[1], dtype, device)
            if mask_bl is not None:
                keys = keys[(mask_bl.cumsum(dim=1) - 1).clamp(min=0)]
            if number == 0:
                first = self._first.get(layout.name) or self._begun(stages, layout, tokens)
                x_bnpd.copy_(first.x_npd)
                asked = first.asked_qme.expand(len(c_bld), -1, -1, -1)
            else:
                stages.mix_layers_(x_bnpd)
                stages.mix_positions_(x_bnpd)
                asked = None
            stages.answer_(x_bnpd, stages.read(c_bld, keys, mask_bl), asked)
        return x_bnpd

    def _begun(self, stages: Stages, layout: GroupLayout, tokens: GroupTokens) -> _First:
        """The stream and the queries of a group before it reads any condition."""
        with torch.inference_mode(False), torch.no_grad():
            x_1npd = self.generator.norm_tokens(tokens.queries_npd()).to(self._residual)[None].clone()
            stages.mix_layers_(x_1npd)
            stages.mix_positions_(x_1npd)
            n, p = layout.num_layers, layout.positions_per_layer
            asked = [
                stages.queries(x_1npd[samples, layers], layers)[0].clone()
                for samples, layers in stages.pieces.of_layers(1, n, p)
            ]
            first = _First(x_1npd[0], torch.cat(asked) if len(asked) > 1 else asked[0])
        if self.options.keep_first_block and self._sources is not None:
            self._first[layout.name] = first
        return first

    def written(self, x_bnpd: Tensor, tokens: GroupTokens, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A tokens `[b, n, nA, r, t]` and B tokens `[b, n, nB, r, t]`: fresh memory, which the adapter's views keep."""
        b, n, p, _ = x_bnpd.shape
        layout, width = tokens.layout, self.generator.config.token_dim
        norm = Norm.of(self.generator.norm_final)
        maps = (tokens.proj_out_A, tokens.proj_out_B)
        sizes = (layout.num_tokens_a, layout.num_tokens_b)
        products = [Dense(each.weight.to(dtype), each.bias.to(dtype)) for each in maps]
        written = [x_bnpd.new_empty((b, n, size * layout.rank, width), dtype=dtype) for size in sizes]
        splits = [size * layout.columns for size in sizes]
        pieces = self._pieces(dtype, x_bnpd.device)

        def work(samples: slice, layers: slice) -> None:
            rows = rms_norm(x_bnpd[samples, layers], norm, dtype, self.workspace)
            parts = torch.split_with_sizes(rows, splits, dim=2)
            for part, product, out in zip(parts, products, written, strict=True):
                into = out[samples, layers]
                product.into(part.reshape(-1, tokens.row_width), into.view(-1, width))

        pieces.each(pieces.of_layers(b, n, p), work, x_bnpd.device)
        a, b_tokens = (each.view(b, n, -1, layout.rank, width) for each in written)
        return a, b_tokens

    def _pieces(self, dtype: torch.dtype, device: torch.device) -> Pieces:
        limit = self.options.chunk_bytes or (CHUNK_BYTES_CPU if device.type == "cpu" else CHUNK_BYTES_GPU)
        rows = max(1, limit // row_bytes(self.generator.config.d_model, dtype))
        return Pieces(rows, self.options.chunk_layers, LEAST_PIECES if device.type == "cpu" else 1)
