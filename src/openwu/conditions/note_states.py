"""Read a note token by token: hidden states of one layer, and the inputs of every layer that will remember it.

What an associative generator (`openwu.generator.associative`) needs: keys are the inputs of the adapted layers when the
frozen model reads the note, values come from the output embedding of every token's successor.

Shapes: b notes, n tokens of the longest one with its prompt, L tokens without the prompt, d width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from openwu.errors import OpenwuError
from openwu.kernels.modules import capture_inputs, capture_outputs
from openwu.types import Condition, Segment


class NoteStates:
    """Reads conditions off a frozen network in one forward pass that stops at the last layer it needs."""

    def __init__(self, network: nn.Module, states: str, inputs: Sequence[str], output_rows: Tensor, successor: str):
        """Name what is read.

        `states`: path of the module whose output `[b, n, d]` becomes the condition's tokens; `inputs`: paths of the
        linear layers whose inputs become segments of the same names, in the order in which the network runs them;
        `output_rows` `[V, d]`: the output embedding; `successor`: name of its segment. Raises OpenwuError where the
        network has no such module.
        """
        modules = dict(network.named_modules())
        if missing := [path for path in (states, *inputs) if path not in modules]:
            raise OpenwuError(f"note states: expected modules of {type(network).__name__}, it lacks {missing}")
        self.network, self.states, self.inputs = network, states, tuple(inputs)
        self.output_rows, self.successor = output_rows, successor

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor,
        following: Tensor,
        *,
        skip: int,
        scope: AbstractContextManager[None] | None = None,
    ) -> Condition:
        """Read token ids `[b, n]`, padded on the right, under their mask `[b, n]`.

        `following` `[b, n]`: the id after each token. The first `skip` tokens, those of the prompt before a note, are
        read by the network and left out of the condition. `scope`: entered around the network's forward pass, which it
        may change; gradients reach what it adds.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and scope is not None), ExitStack() as stack:
            states = stack.enter_context(capture_outputs(self.network.get_submodule(self.states), stop=False))
            *earlier, last = (self.network.get_submodule(path) for path in self.inputs)
            captured = [stack.enter_context(capture_inputs(module, stop=False)) for module in earlier]
            captured.append(stack.enter_context(capture_inputs(last, stop=True)))
            stack.enter_context(scope or nullcontext())  # innermost: what stops the network passes it as an error
            self.network(input_ids=ids, attention_mask=mask, use_cache=False)
        if not states or not all(captured):
            raise OpenwuError(
                f"note states: expected the network to run {self.states} and {self.inputs}, {self.inputs[-1]} last"
            )
        tokens = states[0][0] if isinstance(states[0], tuple | list) else states[0]
        real = mask[:, skip:].to(torch.bool)
        segments = {
            path: Segment(calls[0][0][0][:, skip:], real) for path, calls in zip(self.inputs, captured, strict=True)
        }
        segments[self.successor] = Segment(self.output_rows[following[:, skip:]], real)
        return Condition(tokens[:, skip:], real, segments)
