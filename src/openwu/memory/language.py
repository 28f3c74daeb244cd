"""Functional memory for a language model: a context enters, an adapter leaves that answers without the context.

    context -> frozen model -> condition -> generator -> adapter -> the same frozen model, asked without the context

The model reads a context without any adapter; what one of its decoder layers says of every token is the condition. The
adapter stands for the context from then on: it can be kept, mixed with others in one batch, and thrown away.

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
    """A frozen language model and a generator that writes an adapter from what the model has read."""

    def __init__(
        self, base: CausalLM, generator: ParameterGenerator, *, reads: str | None = None, spare_columns: int = 0
    ) -> None:
        """`reads`: path of the module whose output is the condition; None: the last but one of the decoder layers.

        The last layer has already turned to the next word; those before it say more of what was read. `spare_columns`:
        spare columns beside the weights of stacked experts, see `openwu.attach`. Raises
        OpenwuError where the generator's `input_dim` is not the model's width, TargetError where its targets do not
        fit the model.
        """
        if generator.config.input_dim != base.width:
            raise OpenwuError(
                f"generator: expected input_dim {base.width}, the model's width, got {generator.config.input_dim}"
            )
        self.base, self.generator = base, generator
        self.fast = FastGenerator(generator)
        self.encoder = HiddenStates(base.model, reads or base.layers[max(0, len(base.layers) - 2)])
        self.handle = attach(base.model, generator.targets, spare_columns=spare_columns)

    def condition(self, contexts: Sequence[str]) -> Condition:
        """Tokens `[b, L, d]` and their mask: what the model says of each context, without an adapter."""
        texts = self.base.read(contexts)
        return self.encoder(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False, mask=texts.mask)

    def adapt(self, contexts: Sequence[str]) -> Adapter:
        """One adapter for every context, with gradients to the generator where they are enabled.

        Without them the fast path generates, which keeps what it made of the generator's weights: see
        `openwu.generator.inference.fast` for optimisers that change weights unseen.
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
        """The likeliest answers, every question under its own sample of `adapter`; None: the model alone.

        `rows[i]`: sample of question i, -1 for none; default: question i has sample i, or all have the only one.
        """
        if adapter is None:
            return self.base.generate(questions, max_new_tokens=max_new_tokens)
        with self.handle.applied(adapter, rows):
            return self.base.generate(questions, max_new_tokens=max_new_tokens)

    def close(self) -> None:
        """Take the hooks off the model, so that another generator can be attached to it."""
        self.handle.detach()
