"""Conditions from a model that is there already: inputs of any network enter, what one of its modules says leaves.

A frozen base has read more than an encoder of our own could learn beside it. What it says is taken by a forward hook on
a module named by its path: lists of hidden states that models return have changed their meaning between versions
(before or after the last norm), a module's path says what is meant.

Shapes: b samples, L tokens, d width of what the module says.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from openwu.errors import OpenwuError
from openwu.types import Condition


class HiddenStates:
    """Reads a condition off one module of a network, without gradients; the network itself is not changed."""

    def __init__(self, network: nn.Module, module: str, *, stop_early: bool | None = None) -> None:
        """`module`: path of the module whose output `[b, L, d]` is the condition, such as `model.layers.17`.

        `stop_early`: leave the forward pass once the module has spoken; what stands behind it is not computed. None:
        do so unless weights are moved while the network runs (accelerate's offloading), which has to finish its pass.

        Raises OpenwuError where the network has no such module.
        """
        modules = dict(network.named_modules())
        if module not in modules or not module:
            near = difflib.get_close_matches(module, modules, n=3)
            raise OpenwuError(
                f"module: expected the path of a module of {type(network).__name__}, got {module!r}"
                + (f"; near it are {', '.join(near)}" if near else "; named_modules() lists them")
            )
        offloaded = any(hasattr(each, "_hf_hook") for each in modules.values())
        self.network, self.module = network, module
        self.stop_early = not offloaded if stop_early is None else stop_early

    @torch.no_grad()
    def __call__(self, *args: Any, mask: Tensor | None = None, **inputs: Any) -> Condition:
        """Run the network on `args` and `inputs`; the module's first output becomes the condition's tokens.

        `mask` `[b, L]`, 1 or True where a token is real, goes into the condition; a network that needs it too, such as
        a language model its `attention_mask`, gets it among `inputs`.

        Raises OpenwuError where the module did not run, did not return `[b, L, d]`, or the mask is of another shape.
        """
        said: list[Any] = []

        def listen(_: nn.Module, __: Any, output: Any) -> None:
            said.append(output)
            if self.stop_early:
                raise _HeardError

        # Last of all hooks, so that it hears what the rest of the network would.
        hook = self.network.get_submodule(self.module).register_forward_hook(listen)
        try:
            self.network(*args, **inputs)
        except _HeardError:
            pass
        finally:
            hook.remove()
        if not said:
            raise OpenwuError(f"{self.module}: expected the network to run this module, but it did not")
        tokens = said[0][0] if isinstance(said[0], tuple | list) else said[0]
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or not tokens.is_floating_point():
            came = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise OpenwuError(f"{self.module}: expected hidden states [b, L, d], got {came}; name another module")
        if mask is None:
            return Condition(tokens)
        if mask.shape != tokens.shape[:2]:
            raise OpenwuError(f"mask: expected {list(tokens.shape[:2])} as the hidden states, got {list(mask.shape)}")
        return Condition(tokens, mask.to(tokens.device, torch.bool))


class _HeardError(Exception):
    """Leaves a forward pass that has said what was wanted."""
