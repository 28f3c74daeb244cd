"""Functional memory for a language model: generate an adapter from a context, and answer without the context.

    context -> frozen model -> condition -> generator -> adapter -> the same frozen model, without the context

The model reads a context without any adapter; the hidden states of one decoder layer are the condition. The adapter
replaces the context from then on: it can be stored, mixed with others in one batch, and discarded.

Shapes: b contexts, L tokens of the longest one, d width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openwu.adapters.inject import attach
from openwu.backbones.causal_lm.base import CausalLM
from openwu.conditions.hidden_states import HiddenStates
from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.model import ParameterGenerator
from openwu.types import Adapter, Condition


class LanguageMemory:
    """A frozen language model and a generator of adapters from its hidden states."""

    def __init__(
        self,
        base: CausalLM,
        generator: ParameterGenerator,
        *,
        condition_module: str | None = None,
        spare_columns: int = 0,
    ) -> None:
        """Attach the generator's targets to the model.

        `condition_module`: path of the module whose output is the condition; None: the last but one of the decoder
        layers, since the last one's states are specialised on the next token. `spare_columns`: for stacked experts, see
        `openwu.attach`. Raises OpenwuError if the generator's `input_dim` is not the model's width, TargetError if its
        targets do not fit the model.
        """
        if generator.config.input_dim != base.width:
            raise OpenwuError(
                f"generator: expected input_dim {base.width}, the model's width, got {generator.config.input_dim}"
            )
        self.base, self.generator = base, generator
        self.fast = FastGenerator(generator)
        self.encoder = HiddenStates(base.model, condition_module or base.layers[max(0, len(base.layers) - 2)])
        self.handle = attach(base.model, generator.targets, spare_columns=spare_columns)

    def condition(self, contexts: Sequence[str]) -> Condition:
        """Return the hidden states `[b, L, d]` of each context and their mask, computed without an adapter."""
        texts = self.base.tokenize(contexts)
        return self.encoder(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False, mask=texts.mask)

    def adapt(self, contexts: Sequence[str]) -> Adapter:
        """Generate one adapter per context, with gradients to the generator if they are enabled.

        Without them the fast path generates, which caches what it prepares from the generator's weights: see
        `openwu.generator.inference.fast` for optimisers that change weights unnoticed.
        """
        condition = self.condition(contexts)
        adapter: Adapter = self.generator(condition) if torch.is_grad_enabled() else self.fast(condition)
        return adapter

    @torch.no_grad()
    def answer(
        self,
        questions: Sequence[str],
        adapter: Adapter | None = None,
        *,
        rows: Sequence[int] | Tensor | None = None,
        max_new_tokens: int = 32,
    ) -> list[str]:
        """Answer by greedy decoding, every question under its own sample of `adapter`; None: without an adapter.

        `rows[i]`: sample of question i, -1 for none; by default sample i, or the only one for all.
        """
        if adapter is None:
            return self.base.generate(questions, max_new_tokens=max_new_tokens)
        with self.handle.applied(adapter, rows):
            return self.base.generate(questions, max_new_tokens=max_new_tokens)

    def close(self) -> None:
        """Detach from the model, so that another generator can be attached."""
        self.handle.detach()
