"""A generator that writes a note into linear layers as an associative memory: one key and one value per token.

For every token i of a note, the key is the layer's own input h_i when the frozen model reads the note, and the value is
the direction that says the next token. The adapter is the ridge regression from keys to values under a learned metric
M, so that what the note says is copied and not chosen from a list. With K the rows M h_i at unit length:

    B = V [out, L],   A = (K R K^T + ridge)^-1 K R M / |h|  [L, in]

R = (I + weight C)^-1 keeps the memory from answering everything: C is the second moment of keys of ordinary texts, as
in MEMIT (Meng et al. 2023), and directions that they share with the note are used as little as possible. To it a few
ranks may be added that are the same for every note (how to answer). Learned are M = (I + P Q^T) diag(a), the strength
of every token, small corrections of keys and values, and those ranks.

Keys of a late layer hardly say any more whose fact it is. The reader LoRA carries that to them: ranks on attention
layers below the memory's, the same for every note, under which notes are read and questions are answered.

Shapes: b notes, L tokens, d width of the model, m width of a layer's input.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from openwu.errors import CheckpointError
from openwu.files.weights import fill
from openwu.files.writing import atomic_set, write_json
from openwu.kernels.modules import without_weights
from openwu.types import LORA, LORA_A, LORA_B, Adapter, Condition, Target

MODEL_TYPE = "openwu-associative"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

LATER_SHARPNESS, LATER_THRESHOLD = 16.0, 0.7
"""Factor on the cosines of a token's key with later ones, and the cosine from which those count, before training."""
LATER_SHARE = 4.0
"""Factor on the shares of later tokens, so that their weights are learned as fast as those of states."""

NEXT = "next"
"""Segment of a condition: rows of the output embedding of each token's successor `[b, L, d]`."""


@dataclass(frozen=True)
class AssociativeConfig:
    """Sizes of an associative generator."""

    targets: tuple[str, ...]
    """Paths of the adapted linear layers; each must write to the residual stream."""
    in_dim: int
    """m"""
    width: int
    """d, width of the model and of the values."""
    metric_rank: int = 128
    """Columns of P and Q."""
    correction_rank: int = 64
    """Width of the corrections of keys and values."""
    gate_width: int = 64
    """Hidden width of what decides a token's strength."""
    shared_rank: int = 8
    """Ranks that are the same for every note; 0: none."""
    condition_encoder: Mapping[str, Any] = field(default_factory=dict)
    """How the notes were read that it was trained on, and by which base; a memory refuses another base."""
    background_rank: int = 0
    """Directions of ordinary keys that are suppressed in a note's; 0: none."""
    reader: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Paths of linear layers with the reader LoRA, and their widths in and out; the base runs them before `targets`."""
    reader_rank: int = 8
    """Rank of the reader LoRA."""
    later: bool = False
    """A token's strength depends on later tokens with a key like its own, so that an update can turn it down."""

    def __post_init__(self) -> None:
        sizes = ("in_dim", "width", "metric_rank", "correction_rank", "gate_width", "reader_rank")
        wrong = [
            f"{name}: expected a whole number above 0, got {getattr(self, name)!r}"
            for name in sizes
            if type(getattr(self, name)) is not int or getattr(self, name) < 1
        ]
        wrong += [
            f"{name}: expected a whole number from 0 to in_dim {self.in_dim}, got {getattr(self, name)!r}"
            for name in ("shared_rank", "background_rank")
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) <= self.in_dim
        ]
        if not self.targets or len(set(self.targets)) != len(self.targets):
            wrong.append(f"targets: expected paths of different layers, got {self.targets!r}")
        if both := sorted(set(self.targets) & set(self.reader)):
            wrong.append(f"reader: expected other layers than targets, got {both} in both")
        if wrong:
            raise CheckpointError("; ".join(wrong))


class AssociativeLayer(nn.Module):
    """Keys and values of one adapted layer."""

    def __init__(self, config: AssociativeConfig, strength: float) -> None:
        super().__init__()
        self.looks_later = config.later
        d, m, c = config.width, config.in_dim, config.correction_rank
        self.scale = nn.Parameter(torch.ones(m))
        self.metric_in = nn.Parameter(torch.randn(m, config.metric_rank) * m**-0.5)
        self.metric_out = nn.Parameter(torch.zeros(m, config.metric_rank))
        self.key_down, self.key_up = nn.Linear(2 * d, c), nn.Linear(c, m, bias=False)
        self.value_scale = nn.Parameter(torch.ones(d))
        self.value_down, self.value_up = nn.Linear(3 * d, c), nn.Linear(c, d, bias=False)
        self.gate = nn.Sequential(nn.Linear(3 * d, config.gate_width), nn.GELU(), nn.Linear(config.gate_width, 1))
        if config.later:
            self.later = nn.Linear(d + 2, config.gate_width, bias=False)
            self.later_sharpness = nn.Parameter(torch.tensor(LATER_SHARPNESS))
            self.later_threshold = nn.Parameter(torch.tensor(LATER_THRESHOLD))
            nn.init.zeros_(self.later.weight)
        self.strength = nn.Parameter(torch.tensor(float(strength)).log())
        self.ridge = nn.Parameter(torch.tensor(-3.0))
        self.shared_a = nn.Parameter(torch.randn(config.shared_rank, m) * m**-0.5)
        self.shared_b = nn.Parameter(torch.zeros(d, config.shared_rank))
        # R = I - background background^T; fitted in closed form, never trained.
        self.background: Tensor
        self.register_buffer("background", torch.zeros(m, config.background_rank))
        last = self.gate[-1]
        assert isinstance(last, nn.Linear)
        for linear in (self.key_up, self.value_up, last):
            nn.init.zeros_(linear.weight)

    def forward(self, inputs: Tensor, states: Tensor, following: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return A `[b, L + s, m]` and B `[b, d, L + s]` of inputs `[b, L, m]` and states, following `[b, L, d]`."""
        whole = torch.cat([_with_next(states), following], dim=-1)
        held = mask[..., None].to(inputs.dtype)
        size = inputs.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        keys = self.keys(inputs, states) * held
        own = keys - (keys @ self.background) @ self.background.T
        gram = keys @ own.transpose(1, 2) + torch.diag_embed(self.ridge.exp() + (~mask).to(keys.dtype))
        a = self._returned(torch.linalg.solve(gram, own)) / size
        direction = F.normalize(following * self.value_scale, dim=-1)
        direction = direction + self.value_up(F.gelu(self.value_down(whole)))
        values = direction * (self.strength + self._gated(whole, keys, states, following, mask)).exp() * held
        many = len(inputs)
        a = torch.cat([a, self.shared_a.expand(many, -1, -1)], dim=1)
        b = torch.cat([values.transpose(1, 2), self.shared_b.expand(many, -1, -1)], dim=2)
        return a, b

    def _gated(self, whole: Tensor, keys: Tensor, states: Tensor, following: Tensor, mask: Tensor) -> Tensor:
        """Return the logarithm of every token's strength `[b, L, 1]`, beside the layer's own."""
        first, activation, last = self.gate
        hidden: Tensor = first(whole)
        if self.looks_later:
            places = torch.arange(mask.shape[1], device=mask.device)
            after = (places > places[:, None]) & mask[:, None]
            alike = self.later_sharpness * (keys @ keys.transpose(1, 2) - self.later_threshold)
            # The sum of all later tokens' exponentials stands beside 1, that of none.
            alike = F.pad(alike.masked_fill(~after, -torch.inf), (1, 0)).softmax(dim=-1)[..., 1:]
            said = F.normalize(following, dim=-1)
            other = alike * (1 - said @ said.transpose(1, 2))
            shares = LATER_SHARE * torch.stack([alike.sum(-1), other.sum(-1)], dim=-1)
            hidden = hidden + self.later(torch.cat([alike @ states, shares], dim=-1))
        gated: Tensor = last(activation(hidden))
        return gated

    def keys(self, inputs: Tensor, states: Tensor) -> Tensor:
        """Return a note's keys `[b, L, m]` of unit length under the metric."""
        # Unit length, so that a token with huge activations does not drown the others' keys.
        size = inputs.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        corrected = inputs / size + self.key_up(F.gelu(self.key_down(_with_next(states))))
        return F.normalize(self.measured(corrected), dim=-1)

    def queries(self, inputs: Tensor) -> Tensor:
        """Return what inputs `[..., m]` of the layer ask for, of unit length: comparable with `keys`."""
        return F.normalize(self.measured(F.normalize(inputs, dim=-1)), dim=-1)

    def measured(self, keys: Tensor) -> Tensor:
        """Return M of every key."""
        scaled = keys * self.scale
        return scaled + scaled @ self.metric_in @ self.metric_out.T

    def _returned(self, rows: Tensor) -> Tensor:
        """Return `rows` times M: their products with an input are those of `rows` with M of the input."""
        return (rows + rows @ self.metric_out @ self.metric_in.T) * self.scale


class AssociativeGenerator(nn.Module):
    """Writes an adapter from the states of a note: a condition with `tokens`, NEXT, and a segment for every target."""

    def __init__(self, config: AssociativeConfig, strengths: Sequence[float] | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            AssociativeLayer(config, strength) for strength in strengths or [100.0] * len(config.targets)
        )
        rank = config.reader_rank
        self.reader_a = nn.ParameterList(torch.randn(rank, width) * width**-0.5 for width, _ in config.reader.values())
        self.reader_b = nn.ParameterList(torch.zeros(width, rank) for _, width in config.reader.values())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AssociativeGenerator:
        """Load a folder that `save_pretrained` wrote, in float32. Raises CheckpointError for anything else."""
        path = Path(folder) / CONFIG_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: expected the config of an associative generator: {error}") from error
        known = {each.name for each in fields(AssociativeConfig)}
        younger = {"reader", "reader_rank", "later"}  # unknown to generators that were written before them
        fits = isinstance(data, dict) and data.pop("model_type", None) == MODEL_TYPE
        if not fits or not known - younger <= set(data) <= known:
            raise CheckpointError(
                f"{path}: expected model_type {MODEL_TYPE!r} and the fields {sorted(known)}; this is another model's"
            )
        data["reader"] = {name: tuple(widths) for name, widths in data.get("reader", {}).items()}
        config = AssociativeConfig(**{**data, "targets": tuple(data["targets"])})
        with without_weights():
            generator = cls(config)
        if problems := fill(generator, Path(folder) / WEIGHTS_FILE, torch.float32):
            raise CheckpointError.listing(f"{folder}: the weights do not fit {CONFIG_FILE}:", problems)
        return generator

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write config.json and model.safetensors atomically."""
        with atomic_set(Path(folder), CONFIG_FILE) as draft:
            weights = {name: tensor.detach().to(dtype).contiguous() for name, tensor in self.state_dict().items()}
            save_file(weights, draft / WEIGHTS_FILE)
            write_json(draft / CONFIG_FILE, {"model_type": MODEL_TYPE, **asdict(self.config)})

    def looking_later(self) -> AssociativeGenerator:
        """Return a generator that writes the same adapters, and whose strengths can be trained to heed later tokens."""
        if self.config.later:
            return self
        grown = AssociativeGenerator(replace(self.config, later=True))
        grown.load_state_dict(self.state_dict(), strict=False)
        return grown

    @torch.no_grad()
    def fit_metric(self, conditions: Iterable[Condition]) -> None:
        """Set every metric to a partial whitening of the keys of some notes: what they share counts less."""
        kept = list(conditions)
        rank = self.config.metric_rank
        for name, layer in zip(self.config.targets, self.layers, strict=True):
            rows = torch.cat([_real(each, name) for each in kept])
            axes, largest = _leading(rows.T @ rows / len(rows), rank + 1)
            axes = axes[:, :rank]
            shrunk = 1 - (largest[-1] / largest[: axes.shape[1]]).sqrt()
            assert isinstance(layer, AssociativeLayer)
            layer.metric_in.copy_(axes)
            layer.metric_out.copy_(-axes * shrunk)

    @torch.no_grad()
    def fit_background(self, conditions: Iterable[Condition], weight: float) -> None:
        """Set every layer's R from the keys of ordinary texts; `weight`: how much they count against a note's own key.

        Raises CheckpointError where the config leaves no room for it or the texts have too few tokens.
        """
        kept, rank = list(conditions), self.config.background_rank
        for name, layer in zip(self.config.targets, self.layers, strict=True):
            assert isinstance(layer, AssociativeLayer)
            keys = F.normalize(layer.measured(torch.cat([_real(each, name) for each in kept])), dim=-1)
            if not 0 < rank <= len(keys):
                raise CheckpointError(f"background_rank: expected 1 to the {len(keys)} tokens of the texts, got {rank}")
            axes, variances = _leading(keys.T @ keys / len(keys), rank)
            layer.background.copy_(axes * (1 - 1 / (1 + weight * variances)).sqrt())

    def match(self, condition: Condition, number: int, inputs: Tensor) -> Tensor:
        """Return the cosines of a layer's inputs with the keys of notes `[b, n, L]`; -inf where a token is padding.

        `number`: of the layer among `config.targets`; `inputs` `[b, n, m]`: what enters it, row i for note i.
        """
        layer, name = self.layers[number], self.config.targets[number]
        assert isinstance(layer, AssociativeLayer)
        keys = layer.keys(condition.more[name].tokens, _states(condition))
        cosines = layer.queries(inputs) @ keys.transpose(1, 2)
        return cosines.masked_fill(~_mask(condition)[:, None], -torch.inf)

    @property
    def shared_rank(self) -> int:
        """How many of an adapter's last ranks are the same for every note."""
        return self.config.shared_rank

    @property
    def targets(self) -> tuple[Target, ...]:
        return (*self._reader_targets, *self._memory_targets)

    @property
    def _memory_targets(self) -> tuple[Target, ...]:
        return tuple(Target(name, self.config.in_dim, self.config.width, operator=LORA) for name in self.config.targets)

    @property
    def _reader_targets(self) -> tuple[Target, ...]:
        rank = self.config.reader_rank
        return tuple(Target(name, *widths, operator=LORA, rank=rank) for name, widths in self.config.reader.items())

    def reading(self) -> Adapter | None:
        """Return the reader LoRA alone, under which notes are read: one sample; None for a generator without one."""
        if not self.config.reader:
            return None
        like = self.reader_a[0]
        empty = {
            target.name: {name: like.new_zeros(shape) for name, shape in target.shapes(1, 1).items()}
            for target in self._memory_targets
        }
        return Adapter(self.targets, {**self._reader_factors(1), **empty}, 1.0)

    def _reader_factors(self, batch: int) -> dict[str, dict[str, Tensor]]:
        pairs = zip(self.config.reader, self.reader_a, self.reader_b, strict=True)
        return {name: {LORA_A: a.expand(batch, -1, -1), LORA_B: b.expand(batch, -1, -1)} for name, a, b in pairs}

    def forward(self, condition: Condition) -> Adapter:
        """Generate one adapter per note; its rank is the number of tokens and the shared ranks."""
        mask, states = _mask(condition), _states(condition)
        following = condition.more[NEXT].tokens
        factors = self._reader_factors(condition.batch)
        for name, layer in zip(self.config.targets, self.layers, strict=True):
            a, b = layer(condition.more[name].tokens, states, following, mask)
            factors[name] = {LORA_A: a, LORA_B: b}
        return Adapter(self.targets, factors, 1.0)


def _states(condition: Condition) -> Tensor:
    return F.layer_norm(condition.tokens, condition.tokens.shape[-1:])


def _mask(condition: Condition) -> Tensor:
    """Return which tokens are real `[b, L]`."""
    if condition.mask is not None:
        return condition.mask
    return torch.ones(condition.tokens.shape[:2], dtype=torch.bool, device=condition.tokens.device)


def _with_next(states: Tensor) -> Tensor:
    """Return every token's state beside the next one's `[b, L, 2 d]`; the last one stands beside itself."""
    return torch.cat([states, torch.cat([states[:, 1:], states[:, -1:]], dim=1)], dim=-1)


def _real(condition: Condition, name: str) -> Tensor:
    """Return the keys of all real tokens of a segment at unit length `[tokens, m]`."""
    keys = condition.more[name].tokens
    return F.normalize(keys.flatten(0, 1) if condition.mask is None else keys[condition.mask], dim=-1)


def _leading(moments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` leading eigenvectors `[m, count]` and eigenvalues of a symmetric matrix, largest first."""
    values, axes = torch.linalg.eigh(moments)
    return axes.flip(1)[:, :count], values.flip(0)[:count].clamp_min(1e-12)
