"""A causal language model of transformers as a frozen base: texts enter, tokens and logits or answers leave.

It knows nothing of adapters. `layer_groups` says which of its weights a generator can write for: the linear maps of
attention and MLP in every decoder layer, and the stacked weights of a mixture's experts, found by walking the model and
not by a table of architectures. Embeddings, norms, routers and the output head are never among them.

Shapes: b samples, n tokens of the longest text of a batch, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openwu.backbones.causal_lm.experts import WEIGHTS, group_experts, is_stacked
from openwu.backbones.causal_lm.loading import load_folder
from openwu.config import GroupedTarget, LayerGroup, PlainTarget
from openwu.errors import OpenwuError, TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""Token number that no loss counts, as everywhere in torch."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last names of linear maps that choose experts or weigh them; no adapter is written for these."""

Dialogue = Sequence[tuple[str, str]]
"""A text as questions and answers in turn; only the answers are learned."""


@dataclass(frozen=True)
class Texts:
    """A batch of tokenized texts."""

    ids: Tensor
    """Token numbers `[b, n]`"""
    mask: Tensor
    """`[b, n]`: 1 where a token is real, 0 where it pads."""
    wanted: Tensor
    """`[b, n]`: the token numbers that a training asks for, IGNORED elsewhere."""


class CausalLM:
    """A frozen language model with its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """The model is frozen and put into evaluation mode (no dropout).

        Experts whose weights are stacked are computed by grouped products from now on (`group_experts`), which changes
        no result but its rounding; adapters can reach them there.
        """
        self.model: nn.Module = model.requires_grad_(False).eval()
        if any(is_stacked(module) for module in self.model.modules()):
            group_experts(self.model)
        self.tokenizer = tokenizer
        self._config = model.config.get_text_config()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> CausalLM:
        """Load a folder of config.json, safetensors and tokenizer files; nothing is downloaded, no code of it is run.

        `dtype` None keeps the one that config.json names. Raises CheckpointError for a folder that is no causal
        language model, lacks weights, or holds only pickled ones; OpenwuError where transformers is not installed.
        """
        model, tokenizer = load_folder(Path(folder), dtype)
        return cls(model.to(torch.device(device)), tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Width of a hidden state, the `input_dim` of a generator that reads this model."""
        return int(self._config.hidden_size)

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the decoder layers, in order, e.g. `model.layers.0`."""
        prefix, stack = self._decoder()
        return tuple(f"{prefix}{index}" for index in range(len(stack)))

    def layer_groups(self, only: Iterable[str] | None = None) -> tuple[LayerGroup, ...]:
        """What a generator can write for: the linear maps and the experts of every decoder layer.

        `only`: last names of the wanted weights, such as `("q_proj", "v_proj")`; `gate_up_proj` and `down_proj` for
        experts. Layers like the first one make up one group; a layer with other widths is a group of its own. Raises
        TargetError where the layers lack a name in `only`, or hold experts of an unknown layout that are not left out.
        """
        prefix, stack = self._decoder()
        wanted = None if only is None else set(only)
        alike = [_targets(layer, f"{prefix}{index}", wanted) for index, layer in enumerate(stack)]
        missing = (wanted or set()) - {name for targets in alike for target in targets for name in _last_names(target)}
        if missing or not any(alike):
            every = [target for layer in stack for target in _known_targets(layer)]
            found = sorted({name for target in every for name in _last_names(target)})
            raise TargetError(f"only: expected names among {found}, got {sorted(missing or wanted or ())}")
        run = next((index for index, targets in enumerate(alike) if targets != alike[0]), len(alike))
        groups = [LayerGroup(prefix, run, alike[0])] if alike[0] else []
        groups += [
            LayerGroup(f"{prefix}{index}.", 1, targets, name=f"layer{index}", indexed=False)
            for index, targets in enumerate(alike)
            if index >= run and targets
        ]
        return tuple(groups)

    def read(self, texts: Sequence[str]) -> Texts:
        """Whole texts, padded on the right; every token counts in a loss but the first, which nothing precedes."""
        return self.turns([[("", text)] for text in texts])

    def turns(self, samples: Sequence[Dialogue]) -> Texts:
        """Questions and answers of each sample one after another, padded on the right; only answers are wanted.

        Question and answer are tokenized apart, so that the tokens before an answer are those that `generate` sees. An
        answer of a model that writes spaces into its tokens begins with one.
        """
        # Together, and equal parts once: a call of the tokenizer costs far more than the words in it.
        numbers_of = self._encode_all({part for turns in samples for turn in turns for part in turn})
        start = self._encode("", start=True)
        ids, wanted = [], []
        for turns in samples:
            numbers, asked = list(start), [IGNORED] * len(start)
            for question, answer in turns:
                said, heard = numbers_of[question], numbers_of[answer]
                numbers += said + heard
                asked += [IGNORED] * len(said) + heard
            ids.append(numbers)
            wanted.append(asked)
        empty = [number for number, each in enumerate(ids) if not each]
        if empty or not ids:
            raise OpenwuError(f"texts: expected at least one, none of them empty; got {len(ids)} with {empty} empty")
        return Texts(self._padded(ids, self._pad), self._mask(ids), self._padded(wanted, IGNORED))

    def logits(self, texts: Texts) -> Tensor:
        """`[b, n, V]`: at every token, what the next one should be. Keeps gradients for adapters that are applied."""
        said: Tensor = self.model(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False).logits
        return said

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 32, use_cache: bool = True) -> list[str]:
        """Continue each prompt with its likeliest words, up to the model's end token; the prompt is not repeated.

        Prompts are padded on the left, so that row i of every forward pass is prompt i: an adapter that is applied
        around this call, one for the whole of it, gives every prompt its own sample.
        """
        from transformers import GenerationConfig

        if not prompts or max_new_tokens < 1:
            raise OpenwuError(
                f"generate: expected prompts and max_new_tokens above 0, got {len(prompts)} and {max_new_tokens}"
            )
        ids = [self._encode("", start=True) + self._encode(prompt) for prompt in prompts]
        if not all(ids):
            raise OpenwuError("prompts: expected text in each, got an empty one; this tokenizer has no start token")
        # Of the folder's generation settings only where to stop is taken: sampling would not repeat itself.
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=self._pad,
            eos_token_id=getattr(self.model, "generation_config", self._config).eos_token_id,
        )
        prompted = self._padded(ids, self._pad, left=True)
        generate: Any = self.model.generate
        whole = generate(input_ids=prompted, attention_mask=self._mask(ids, left=True), generation_config=settings)
        texts = self.tokenizer.batch_decode(whole[:, prompted.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @property
    def _pad(self) -> int:
        """Stands in padding, which the mask hides: any number that the model knows serves where there is no own one."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else 0

    def _encode(self, text: str, *, start: bool = False) -> list[int]:
        """Token numbers of a part of a text; `start`: the tokens alone that this tokenizer puts in front of a text."""
        if not start:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        first = self.tokenizer.bos_token_id
        begun = list(self.tokenizer("", add_special_tokens=True)["input_ids"])
        return [first] if first is not None and begun[:1] == [first] else []

    def _encode_all(self, parts: Collection[str]) -> dict[str, list[int]]:
        """Token numbers of each of these parts of texts."""
        words = sorted(part for part in parts if part)
        found = self.tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
        return {"": [], **{word: list(numbers) for word, numbers in zip(words, found, strict=True)}}

    def _padded(self, rows: Sequence[Sequence[int]], filler: int, *, left: bool = False) -> Tensor:
        longest = max(len(row) for row in rows)
        blanks = [[filler] * (longest - len(row)) for row in rows]
        filled = [[*blank, *row] if left else [*row, *blank] for row, blank in zip(rows, blanks, strict=True)]
        return torch.tensor(filled, device=self.device)

    def _mask(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
        return self._padded([[1] * len(row) for row in rows], 0, left=left)

    def _decoder(self) -> tuple[str, nn.ModuleList]:
        """Path in front of a decoder layer's number, and the layers."""
        count = int(self._config.num_hidden_layers)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count and any(map(_is_linear, module.modules())):
                return f"{name}.", module
        raise TargetError(
            f"{type(self.model).__name__}: expected a list of {count} decoder layers with nn.Linear modules, found "
            "none; GPT-2's own Conv1D layers are not supported"
        )


def _targets(layer: nn.Module, path: str, wanted: set[str] | None) -> tuple[PlainTarget | GroupedTarget, ...]:
    """What is wanted of one decoder layer, in its own order."""
    foreign = _foreign_experts(layer)
    for name in foreign:
        inside = [weight.removesuffix(".weight") for weight, _ in layer.get_submodule(name).named_parameters()]
        if wanted is None or wanted & {weight.rpartition(".")[2] for weight in inside}:
            known = sorted({last for target in _known_targets(layer) for last in _last_names(target)})
            raise TargetError(
                f"{path}.{name}: a mixture of experts whose weights are not stacked as gate_up_proj [E, 2I, H] and "
                f"down_proj [E, H, I] without biases; leave it out: layer_groups(only={tuple(known)})"
            )
    known_targets = [_chosen(target, wanted) for target in _known_targets(layer)]
    return tuple(target for target in known_targets if target is not None)


def _known_targets(layer: nn.Module) -> list[PlainTarget | GroupedTarget]:
    """All linear maps and stacked experts of a decoder layer but routers, and what lies in experts of other layouts."""
    foreign = tuple(f"{name}." for name in _foreign_experts(layer))
    found: list[PlainTarget | GroupedTarget] = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ROUTERS and not name.startswith(foreign):
            found.append(PlainTarget(name, module.in_features, module.out_features))
        elif is_stacked(module):
            shapes = {weight: module.get_parameter(weight).shape for weight in WEIGHTS}  # [E, out, in]
            weights = tuple(PlainTarget(weight, shape[2], shape[1]) for weight, shape in shapes.items())
            found.append(GroupedTarget(name, len(module.get_parameter(WEIGHTS[0])), weights))
    return found


def _foreign_experts(layer: nn.Module) -> list[str]:
    """Containers of experts whose layout is not known."""
    return [
        name
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] == "experts" and not is_stacked(module)
    ]


def _chosen(target: PlainTarget | GroupedTarget, wanted: set[str] | None) -> PlainTarget | GroupedTarget | None:
    """A target, or as much of it as is wanted."""
    if wanted is None:
        return target
    if isinstance(target, PlainTarget):
        return target if _last_names(target)[0] in wanted else None
    weights = tuple(weight for weight in target.weights if weight.name in wanted)
    return GroupedTarget(target.name, target.num_experts, weights) if weights else None


def _last_names(target: PlainTarget | GroupedTarget) -> list[str]:
    """What `only` calls a target's weights."""
    if isinstance(target, PlainTarget):
        return [target.name.rpartition(".")[2]]
    return [weight.name for weight in target.weights]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
