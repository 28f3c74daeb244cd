"""Hidden states of any network as a condition: the output of one of its modules.

A frozen base has read more than an encoder of our own could learn beside it. The output is taken by a forward hook on a
module named by its path: lists of hidden states that models return have changed their meaning between versions (before
or after the last norm), a module's path has not.

Shapes: b samples, L tokens, d width of the module's output.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from openwu.errors import OpenwuError
from openwu.kernels.modules import capture_outputs
from openwu.types import Condition


class HiddenStates:
    """Reads a condition off one module of a network, without gradients; the network itself is not changed."""

    def __init__(self, network: nn.Module, module: str, *, stop_early: bool | None = None) -> None:
        """`module`: path of the module whose output `[b, L, d]` is the condition, such as `model.layers.17`.

        `stop_early`: end the forward pass behind the module. None: do so unless weights are moved while the network
        runs (accelerate's offloading), which has to finish its pass.

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
        with capture_outputs(self.network.get_submodule(self.module), stop=self.stop_early) as outputs:
            self.network(*args, **inputs)
        if not outputs:
            raise OpenwuError(f"{self.module}: expected the network to run this module, but it did not")
        tokens = outputs[0][0] if isinstance(outputs[0], tuple | list) else outputs[0]
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or not tokens.is_floating_point():
            found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise OpenwuError(f"{self.module}: expected hidden states [b, L, d], got {found}; name another module")
        if mask is None:
            return Condition(tokens)
        if mask.shape != tokens.shape[:2]:
            raise OpenwuError(f"mask: expected {list(tokens.shape[:2])} as the hidden states, got {list(mask.shape)}")
        return Condition(tokens, mask.to(tokens.device, torch.bool))
