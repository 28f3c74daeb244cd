"""Run one generator over several processes, each with a part of the sequence (sequence parallelism).

Every process holds all weights and works on a part of the sequence. Attention along base layers needs all layers of a
position, everything else all positions of a layer; so the sequence changes hands twice per block (all-to-all): cut by
positions for the first, by layers for the rest. The condition is read by every process.

Shapes: b samples, n base layers and p positions of a group, of which a process has l layers or q positions, d width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn

from openwu.errors import OpenwuError
from openwu.generator.blocks import Block, Rotary
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.layout import GroupLayout
from openwu.generator.model import GroupTokens, ParameterGenerator
from openwu.types import Adapter, Condition, Target

Span = tuple[int, int]
"""First and one behind the last."""


def spans(length: int, parts: int) -> list[Span]:
    """A length cut into parts that differ by at most one; parts beyond the length are empty."""
    ends = [length * part // parts for part in range(parts + 1)]
    return list(pairwise(ends))


class ShardedGenerator:
    """Computes what a generator computes, on the processes of a group.

    All processes call it together with the same condition and the same weights. Without gradients it takes the fast
    path, with gradients the clear one; a process's parameters then have the part of the gradient that comes from its
    own part of the work, and `sum_gradients` adds the parts up. Backward must run on all of them, too.
    """

    def __init__(
        self,
        generator: ParameterGenerator,
        group: distributed.ProcessGroup | None = None,
        options: FastOptions | None = None,
    ) -> None:
        """`group` None: all processes."""
        if not distributed.is_initialized():
            raise OpenwuError(
                "sharded generator: expected torch.distributed to be initialised, got a single process; "
                "start with torchrun and call torch.distributed.init_process_group first"
            )
        self.generator = generator
        self.group = group
        self.ranks = distributed.get_world_size(group)
        self.rank = distributed.get_rank(group)
        most = max(layout.num_layers for layout in generator.layout.groups)
        if self.ranks > most:
            raise OpenwuError(
                f"sharded generator: expected at most {most} processes, one per base layer, got {self.ranks}; use fewer"
            )
        self._fast = FastGenerator(generator, options)

    def __call__(self, condition: Condition | Tensor, *, gather: bool = True) -> Adapter:
        """The whole adapter on every process; with `gather=False` only the targets of this process's base layers.

        Gradients flow through parts only: raises OpenwuError where they are asked of a gathered adapter.
        """
        trains = torch.is_grad_enabled() and any(each.requires_grad for each in self.generator.parameters())
        if trains and gather:
            raise OpenwuError(
                "sharded generator: expected gather=False where gradients are needed, got gather=True; "
                "take the loss of each process's own part, or use torch.no_grad()"
            )
        c_bld, mask_bl = self.generator.read(condition)
        targets: list[Target] = []
        factors: dict[str, dict[str, Tensor]] = {}
        idle: list[Tensor] = []
        for layout in self.generator.layout.groups:
            start, stop = spans(layout.num_layers, self.ranks)[self.rank]
            refined = self._refined if trains else self._refined_fast
            with self._fast.scope():
                tokens = refined(layout, c_bld, mask_bl)
            if gather:
                tokens = self._gathered(tokens, layout)
            elif start == stop:
                idle += tokens
                continue
            else:
                layout = replace(layout, layers=layout.layers[start:stop])
            targets += layout.targets
            factors |= layout.unpack(*tokens, self._tokens(layout).shared_factors())
        if trains and idle:
            # Of a group without own layers nothing comes out, yet the others wait for its part in the backward pass.
            name, part = next(iter(factors[targets[0].name].items()))
            nothing = torch.stack([each.sum() for each in idle]).sum().to(part.dtype)
            factors[targets[0].name][name] = part + nothing
        return Adapter(tuple(targets), factors, self.generator.scale)

    def _refined(self, layout: GroupLayout, c_bld: Tensor, mask_bl: Tensor | None) -> tuple[Tensor, Tensor]:
        """This process's A and B tokens `[b, l, ...]` on the clear path."""
        generator, tokens = self.generator, self._tokens(layout)
        p = layout.positions_per_layer
        (start, stop), (first, last) = self._own(layout)
        angles = generator.angles(layout, c_bld, mask_bl)
        asked = Rotary(*(table[start * p : stop * p] for table in angles.cross_queries))
        own = angles._replace(cross_queries=asked)
        x_npd = generator.norm_tokens(tokens.queries_npd())
        x = x_npd[:, first:last].expand(len(c_bld), -1, -1, -1)
        x = x.to(generator.stream_dtype)
        for number, block in enumerate(generator.blocks):
            assert isinstance(block, Block)
            if number:
                x = self._exchanged(x, layout, to_layers=False)
            x = block.mix_layers(x, angles) if last > first else x
            x = self._exchanged(x, layout, to_layers=True)
            x = block.mix_positions(x, c_bld, own, mask_bl) if stop > start else x
        return tokens.written(generator.norm_final(x))

    @torch.no_grad()
    def _refined_fast(self, layout: GroupLayout, c_bld: Tensor, mask_bl: Tensor | None) -> tuple[Tensor, Tensor]:
        """This process's A and B tokens `[b, l, ...]` on the fast path."""
        generator, fast, tokens = self.generator, self._fast, self._tokens(layout)
        (start, stop), (first, last) = self._own(layout)
        dtype = generator.hidden_in.weight.dtype
        fast.pack(dtype)
        x_npd = generator.norm_tokens(tokens.queries_npd()).to(generator.stream_dtype)
        x = x_npd[:, first:last].expand(len(c_bld), -1, -1, -1).contiguous()
        for number in range(len(generator.blocks)):
            stages, keys = fast.stages(number, layout, c_bld.shape[1], dtype, c_bld.device)
            if mask_bl is not None:
                keys = keys[(mask_bl.cumsum(dim=1) - 1).clamp(min=0)]
            own = replace(stages, rotary=stages.rotary.of_layers(start, stop))
            if number:
                x = self._exchanged(x, layout, to_layers=False)
            if last > first:
                stages.mix_layers_(x)
            x = self._exchanged(x, layout, to_layers=True)
            if stop > start:
                own.mix_positions_(x)
                own.answer_(x, own.read(c_bld, keys, mask_bl))
        return fast.written(x, tokens, dtype) if stop > start else tokens.written(x.to(dtype))

    def _own(self, layout: GroupLayout) -> tuple[Span, Span]:
        """This process's layers and positions."""
        layers, positions = spans(layout.num_layers, self.ranks), spans(layout.positions_per_layer, self.ranks)
        return layers[self.rank], positions[self.rank]

    def _tokens(self, layout: GroupLayout) -> GroupTokens:
        tokens = self.generator.groups[layout.name]
        assert isinstance(tokens, GroupTokens)
        return tokens

    def _exchanged(self, x: Tensor, layout: GroupLayout, *, to_layers: bool) -> Tensor:
        """All layers of own positions `[b, n, q, d]` -> own layers, all positions `[b, l, p, d]`, or the reverse."""
        layers, positions = spans(layout.num_layers, self.ranks), spans(layout.positions_per_layer, self.ranks)
        cut, own = (layers, positions[self.rank]) if to_layers else (positions, layers[self.rank])
        axis, other = (1, 2) if to_layers else (2, 1)
        sent = torch.split_with_sizes(x, [stop - start for start, stop in cut], dim=axis)
        mine = cut[self.rank][1] - cut[self.rank][0]
        came_cut = positions if to_layers else layers
        shapes = []
        for start, stop in came_cut:
            shape = [x.shape[0], mine, mine, x.shape[3]]
            shape[other] = stop - start
            shapes.append(shape)
        assert own[1] - own[0] == x.shape[other]
        flat = torch.cat([part.reshape(-1) for part in sent])
        sizes = [shape[0] * shape[1] * shape[2] * shape[3] for shape in shapes]
        came: Tensor = _AllToAll.apply(  # type: ignore[no-untyped-call]
            flat, [part.numel() for part in sent], sizes, self.group
        )
        parts = torch.split_with_sizes(came, sizes)
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim=other)

    def _gathered(self, own: tuple[Tensor, Tensor], layout: GroupLayout) -> tuple[Tensor, Tensor]:
        """Own layers' tokens `[b, l, ...]` -> all layers' `[b, n, ...]`."""
        a, b = (self._all_layers(each, layout) for each in own)
        return a, b

    def _all_layers(self, own: Tensor, layout: GroupLayout) -> Tensor:
        counts = [stop - start for start, stop in spans(layout.num_layers, self.ranks)]
        padded = own.new_zeros((own.shape[0], max(counts), *own.shape[2:]))
        padded[:, : own.shape[1]] = own
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], dim=1)


def sum_gradients(parameters: Iterable[nn.Parameter], group: distributed.ProcessGroup | None = None) -> None:
    """Add up the processes' parts of every parameter's gradient; a process without a part adds zeros."""
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad, group=group)


class _AllToAll(torch.autograd.Function):
    """Flat pieces change hands; their gradients go back the same way."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, sent: list[int], came: list[int], group: distributed.ProcessGroup | None
    ) -> Tensor:
        ctx.sizes, ctx.group = (sent, came), group
        out = flat.new_empty(sum(came))
        distributed.all_to_all_single(out, flat.contiguous(), came, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        sent, came = ctx.sizes
        out = gradient.new_empty(sum(sent))
        distributed.all_to_all_single(out, gradient.contiguous(), sent, came, group=ctx.group)
        return out, None, None, None
