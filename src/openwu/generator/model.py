"""The parameter generator: computes a batch of adapters from a condition, one adapter per sample.

Shapes: b samples, L condition tokens (l in suffixes), n base layers of a group, h parameter tokens of one base layer,
of which nA belong to A factors and nB to B factors and vectors, r LoRA rank, a = dim_accumulation rows folded into one
position, p = h * r / a positions of one base layer, d width, t token_dim. A suffix names axes: c_bld is `[b, L, d]`.

All groups of base layers go through the same blocks, each by itself: groups do not see one another.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from openwu.config import GeneratorConfig
from openwu.generator.blocks import Attention, Block, BlockRotary, FeedForward, RMSNorm, block_rotary
from openwu.generator.checkpoint import DEFAULT_SHARD_SIZE, load_generator, outline_generator, save_generator
from openwu.generator.layout import GeneratorLayout, GroupLayout
from openwu.types import Adapter, Condition, Segment, Target

DEFAULT_B_INIT_STD = 1e-3


class ParameterGenerator(nn.Module):
    """Reads a condition `[b, L, input_dim]`, with further segments of other widths if the config names them, and
    writes the adapter of every sample.

    Dtypes: the residual stream has `stream_dtype`, with or without autocast. The
    adapter has the dtype that the output projections return: the parameters' dtype, or autocast's inside of autocast.
    """

    def __init__(self, config: GeneratorConfig, *, b_init_std: float = DEFAULT_B_INIT_STD) -> None:
        """`b_init_std`: standard deviation of a generated B's elements before any training; see `init_weights`."""
        super().__init__()
        self.config = config
        self.layout = GeneratorLayout.of(config)
        self.targets: tuple[Target, ...] = self.layout.targets
        self.scale = config.scale
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None
        self.hidden_in = nn.Linear(config.input_dim, config.d_model)
        self.more_in = nn.ModuleDict(
            {name: nn.Linear(width, config.d_model) for name, width in config.more_inputs.items()}
        )
        self.norm_input = RMSNorm(config.d_model)
        self.norm_tokens = RMSNorm(config.d_model)
        self.blocks = nn.ModuleList(Block(config.d_model, config.head_dim) for _ in range(config.num_pg_layers))
        self.norm_final = RMSNorm(config.d_model)
        self.groups = nn.ModuleDict({layout.name: GroupTokens(layout, config) for layout in self.layout.groups})
        self.branches = nn.ModuleDict({name: ParameterGenerator(each) for name, each in config.branches.items()})
        self.init_weights(b_init_std)

    @property
    def stream_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: `residual_dtype` if set, else the parameters' dtype, but at least float32.

        The released code has a float32 stream, too: under autocast its RMSNorm returns float32.
        """
        return self.residual_dtype or torch.promote_types(self.hidden_in.weight.dtype, torch.float32)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, condition: Condition | Tensor) -> Adapter:
        """One adapter per sample. A bare tensor is a condition without a mask."""
        if isinstance(condition, Condition) and condition.branch:
            return self.complete(self.branch(condition.branch)(replace(condition, branch="")))
        c_bld, mask_bl = self.read(condition)
        factors: dict[str, dict[str, Tensor]] = {}
        for layout in self.layout.groups:
            tokens = self.groups[layout.name]
            assert isinstance(tokens, GroupTokens)
            x_npd = self.norm_tokens(tokens.queries_npd())
            x_bnpd = self._refined(x_npd.expand(len(c_bld), -1, -1, -1), c_bld, mask_bl, layout)
            factors |= layout.unpack(*tokens.written(self.norm_final(x_bnpd)), tokens.shared_factors())
        return Adapter(self.targets, factors, self.scale)

    def branch(self, name: str) -> ParameterGenerator:
        """Return the generator of a kind of conditions; ValueError where the config names none."""
        if name not in self.branches:
            raise ValueError(f"condition: expected a branch of {sorted(self.config.branches)}, got {name!r}")
        branch = self.branches[name]
        assert isinstance(branch, ParameterGenerator)
        return branch

    def complete(self, adapter: Adapter) -> Adapter:
        """A branch's adapter with zeros for the targets that it does not write to."""
        first = next(iter(adapter.factors[adapter.targets[0].name].values()))
        factors = {
            target.name: adapter.factors.get(target.name)
            or {name: first.new_zeros(shape) for name, shape in target.shapes(adapter.batch, self.config.rank).items()}
            for target in self.targets
        }
        return Adapter(self.targets, factors, self.scale)

    def read(self, condition: Condition | Tensor) -> tuple[Tensor, Tensor | None]:
        """What the blocks read of a condition, `[b, L, d]`, and its mask; ValueError where it does not fit."""
        c_bld, mask_bl = self._projected(condition if isinstance(condition, Condition) else Condition(condition))
        return self.norm_input(c_bld), mask_bl

    def init_weights(self, b_init_std: float = DEFAULT_B_INIT_STD) -> None:
        """Start from nothing, so that the adapter is nearly a no-op while every parameter already receives gradient.

        - Linear maps: normal, variance 1 / inputs, biases 0. Those that write into the residual stream are divided by
          sqrt(4 * blocks), the number of branches that add up there, so that its size does not grow with depth (GPT-2).
        - Position tables: normal, variance 1/2 each, so that their sum has variance 1. Norm weights: 1.
        - `proj_out_A`: a generated A has element variance about 1 / in_dim, as in LoRA, so A x is as large as x. The
          projection is shared by all targets of a group; in_dim is their mean over the generated numbers.
        - `proj_out_B`: a generated B (or gain, or offset) has elements of `b_init_std`, small but not zero: with B = 0
          neither A nor what stands in front of it would receive gradient, and such a generator tends to ignore its
          condition.
        """
        if not b_init_std > 0:
            raise ValueError(f"b_init_std: expected a number above 0 (0 would stop A's gradients), got {b_init_std}")
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5)
                    module.bias.zero_()
                elif isinstance(module, nn.RMSNorm):
                    module.weight.fill_(1.0)
            shrink = (4 * self.config.num_pg_layers) ** -0.5
            for module in self.modules():
                if isinstance(module, Attention):
                    module.W_o.weight.mul_(shrink)
                elif isinstance(module, FeedForward):
                    module.fc2.weight.mul_(shrink)
            for module in self.groups.values():
                assert isinstance(module, GroupTokens)
                module.init_weights(b_init_std)
            for branch in self.branches.values():
                assert isinstance(branch, ParameterGenerator)
                branch.init_weights(b_init_std)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> ParameterGenerator:
        """Load `config.json` and safetensors, the released checkpoint included. `dtype` None keeps the files' dtype."""
        return load_generator(Path(folder), cls, dtype=dtype, device=torch.device(device))

    @classmethod
    def outline(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> ParameterGenerator:
        """Build a folder's generator on the meta device: config and headers are checked, no weights are read."""
        return outline_generator(Path(folder), cls, dtype=dtype)

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int = DEFAULT_SHARD_SIZE) -> None:
        """Write `config.json` and safetensors; several files and an index where they exceed `max_shard_size` bytes."""
        save_generator(self, self.config, Path(folder), max_shard_size)

    def _projected(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """All segments side by side, each through its own projection, `[b, L, d]`, and the mask `[b, L]` or None."""
        if set(condition.more) != set(self.config.more_inputs):
            raise ValueError(
                f"condition: expected the further segments {sorted(self.config.more_inputs)}, got "
                f"{sorted(condition.more)}; the condition must come from the base that this generator was made for"
            )
        segments: list[tuple[nn.Module, Segment, str]] = [
            (self.hidden_in, Segment(condition.tokens, condition.mask), "condition")
        ]
        segments += [
            (self.more_in[name], condition.more[name], f"condition {name}") for name in self.config.more_inputs
        ]
        projected, masks = [], []
        for projection, segment, name in segments:
            assert isinstance(projection, nn.Linear)
            c_bli, mask_bl = _checked(segment, projection.weight, name)
            if mask_bl is not None:
                # What stands in the padding must not matter, not even NaN: zero weight times NaN is NaN.
                c_bli = c_bli.masked_fill(~mask_bl[..., None], 0)
            projected.append(projection(c_bli))
            masks.append(mask_bl)
        if len(projected) == 1:
            return projected[0], masks[0]
        if len({len(part) for part in projected}) > 1:
            came = {name: len(segment.tokens) for _, segment, name in segments}
            raise ValueError(f"condition: expected as many samples in every segment, got {came}")
        c_bld = torch.cat(projected, dim=1)
        if all(mask is None for mask in masks):
            return c_bld, None
        full = [
            torch.ones(part.shape[:2], dtype=torch.bool, device=part.device) if mask is None else mask
            for part, mask in zip(projected, masks, strict=True)
        ]
        return c_bld, torch.cat(full, dim=1)

    def _refined(self, x_bnpd: Tensor, c_bld: Tensor, mask_bl: Tensor | None, layout: GroupLayout) -> Tensor:
        """The sequence of one group after all blocks, in the residual dtype."""
        x_bnpd = x_bnpd.to(self.stream_dtype)
        angles = self.angles(layout, c_bld, mask_bl)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_bnpd = recompute(block, x_bnpd, c_bld, angles, mask_bl, use_reentrant=False)
            else:
                x_bnpd = block(x_bnpd, c_bld, angles, mask_bl)
        return x_bnpd

    def angles(self, layout: GroupLayout, c_bld: Tensor, mask_bl: Tensor | None) -> BlockRotary:
        """The rotary tables of a group and a condition `[b, L, d]`."""
        rows, columns, keys = layout.num_tokens, layout.columns, c_bld.shape[1]
        angles = block_rotary(self.config.head_dim, layout.num_layers, rows, columns, keys, c_bld.device)
        if mask_bl is None:
            return angles
        # Real tokens are counted, wherever the padding stands: a sample's adapter is the one that it would get alone.
        counted = (mask_bl.cumsum(dim=1) - 1).clamp(min=0)
        return angles._replace(cross_keys=angles.cross_keys.at(counted))


def _checked(segment: Segment, weight: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """A segment's tokens in the dtype of its projection's weight, and its mask; ValueError where they do not fit."""
    tokens, mask = segment.tokens, segment.mask
    if tokens.ndim != 3 or tokens.shape[2] != weight.shape[1] or 0 in tokens.shape:
        raise ValueError(f"{name}: expected [b, L, {weight.shape[1]}] with b and L above 0, got {list(tokens.shape)}")
    if not tokens.is_floating_point():
        raise ValueError(f"{name}: expected a floating point dtype such as {weight.dtype}, got {tokens.dtype}")
    if tokens.device != weight.device:
        raise ValueError(f"{name}: expected on the generator's device {weight.device}, got {tokens.device}")
    if mask is None:
        return tokens.to(weight.dtype), None
    if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool or mask.device != tokens.device:
        raise ValueError(
            f"{name} mask: expected {list(tokens.shape[:2])} torch.bool on {tokens.device}, "
            f"got {list(mask.shape)} {mask.dtype} on {mask.device}"
        )
    if not mask.is_meta and not bool(mask.any(dim=1).all()):
        raise ValueError(f"{name} mask: expected at least one real token in every sample, got a sample with none")
    return tokens.to(weight.dtype), mask


class GroupTokens(nn.Module):
    """What one group of base layers has of its own: the tokens that it starts from, and the way back to numbers."""

    def __init__(self, layout: GroupLayout, config: GeneratorConfig) -> None:
        super().__init__()
        self.layout = layout
        self.row_width = config.d_model // config.dim_accumulation
        self.hw_pos = nn.Embedding(layout.num_tokens * config.rank, self.row_width)
        self.layer_pos = nn.Embedding(layout.num_layers, self.row_width)
        self.proj_out_A = nn.Linear(self.row_width, config.token_dim)
        self.proj_out_B = nn.Linear(self.row_width, config.token_dim)
        # Without a LoRA target nothing is written by proj_out_A, so that no gradient will ever reach it.
        self.proj_out_A.requires_grad_(layout.num_tokens_a > 0)
        # Of operators whose factors are not all generated; released generators have none, and no such parameters.
        if layout.shared:
            shapes = {name: (layout.num_layers, *factor.shape) for name, factor in layout.shared.items()}
            self.shared = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})

    def shared_factors(self) -> dict[str, dict[str, Tensor]]:
        """Target name -> factor name -> the generator's own `[1, ...]`, for the targets that have such factors."""
        found: dict[str, dict[str, Tensor]] = {}
        for number, targets in enumerate(self.layout.layers):
            for key in self.layout.shared:
                place, name = key.split("_", 1)
                found.setdefault(targets[int(place)].name, {})[name] = self.shared[key][number : number + 1]
        return found

    def queries_npd(self) -> Tensor:
        """[n, p, d]: every row of every token at every layer, a consecutive rows side by side."""
        rows = self.hw_pos.weight + self.layer_pos.weight[:, None, :]
        return rows.reshape(self.layout.num_layers, self.layout.positions_per_layer, -1)

    def written(self, x_bnpd: Tensor) -> tuple[Tensor, Tensor]:
        """A tokens `[b, n, nA, r, t]` and B tokens `[b, n, nB, r, t]`."""
        samples, layers = x_bnpd.shape[:2]
        tokens = x_bnpd.reshape(samples, layers, self.layout.num_tokens, self.layout.rank, self.row_width)
        a, b = torch.split_with_sizes(tokens, (self.layout.num_tokens_a, self.layout.num_tokens_b), dim=2)
        # Contiguous: a linear map of strided tokens would copy its weight for every base layer.
        return self.proj_out_A(a.contiguous()), self.proj_out_B(b.contiguous())

    def init_weights(self, b_init_std: float) -> None:
        """See `ParameterGenerator.init_weights`; rows that enter the projections have unit mean square."""
        sizes = [
            (target.in_dim, math.prod(factor.shape))
            for target, factors in zip(self.layout.layers[0], self.layout.factors, strict=True)
            for factor in factors
            if factor.kind == "A"
        ]
        mean_in_dim = sum(in_dim * size for in_dim, size in sizes) / max(1, sum(size for _, size in sizes)) or 1.0
        self.hw_pos.weight.normal_(std=0.5**0.5)
        self.layer_pos.weight.normal_(std=0.5**0.5)
        self.proj_out_A.weight.normal_(std=(mean_in_dim * self.row_width) ** -0.5)
        self.proj_out_B.weight.normal_(std=b_init_std * self.row_width**-0.5)
        if self.layout.shared:  # rows of an A of variance 1 / in_dim, and of a B of variance 1 / rank
            for part in self.shared.values():
                part.normal_(std=part.shape[-1] ** -0.5)
