"""Compute the stacked experts of transformers' mixtures (5 and later) by grouped GEMMs that adapters can hook.

`group_experts` registers an experts implementation with transformers, by the interface that it has for this, and gives
every container the modules in which its products are computed. Parameters and state-dict names stay.

Shapes: T tokens, k experts per token, S = T * k, E experts, H hidden width, I width inside an expert.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from openwu.errors import OpenwuError, TargetError
from openwu.kernels.grouped import GroupedProduct, Routed

IMPLEMENTATION = "openwu"
"""Name under which transformers finds `forward`."""

WEIGHTS = ("gate_up_proj", "down_proj")


def group_experts(model: nn.Module) -> list[str]:
    """Compute all stacked experts of a transformers model by grouped GEMMs; return the paths of their containers.

    Raises OpenwuError without transformers 5, TargetError if the model has no such experts.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise OpenwuError("grouped experts: expected transformers 5 or later; pip install 'transformers>=5'") from error
    found = {path: module for path, module in model.named_modules() if is_stacked(module)}
    if not found:
        raise TargetError(
            f"grouped experts: {type(model).__name__} has no experts with stacked weights gate_up_proj and down_proj "
            "that transformers computes by its experts interface (Llama 4 has others); merge adapters for those"
        )
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    for module in found.values():
        transposed = bool(module.is_transposed)
        module.products = nn.ModuleDict({name: GroupedProduct(transposed=transposed) for name in WEIGHTS})
        # What `model.set_experts_implementation` would set; that one exists for whole models only.
        module.config._experts_implementation = IMPLEMENTATION
    return list(found)


def forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the experts: hidden states `[T, H]`, indices and weights of the chosen experts `[T, k]` -> `[T, H]`."""
    held: Any = experts  # attributes, not parameters: PEFT computes the weights from others while it is around them
    first, last = held.products["gate_up_proj"], held.products["down_proj"]
    gate_up_proj, down_proj = held.gate_up_proj, held.down_proj
    routed = Routed.of(top_k_index, len(gate_up_proj))
    gate_up = first(first.gather(hidden_states, routed), gate_up_proj, routed)
    if held.has_bias:
        gate_up = gate_up + held.gate_up_proj_bias[routed.expert_s]
    down = last(_gated(experts, last, gate_up), down_proj, routed)
    if held.has_bias:
        down = down + held.down_proj_bias[routed.expert_s]
    return routed.combine(down, top_k_weights).to(hidden_states.dtype)


def _gated(experts: nn.Module, last: GroupedProduct, gate_up_s: Tensor) -> Tensor:
    """Apply the gate, `[S, 2I]` -> `[S, I]`; the usual gate writes into the last product's spare-column buffer."""
    from transformers.integrations import moe

    gate_of: Any = getattr(experts, "_apply_gate")  # noqa: B009 (a method, not a tensor)
    usual = getattr(moe, "_default_apply_gate", None)  # not part of transformers' interface
    if usual is None or getattr(gate_of, "__func__", None) is not usual:
        return gate_of(gate_up_s)  # type: ignore[no-any-return]
    gate, up = gate_up_s.chunk(2, -1)
    act_fn: Any = experts.act_fn
    return last.multiply(act_fn(gate), up)


def is_stacked(module: nn.Module) -> bool:
    """Tell whether a module holds stacked experts of transformers, in the layout that `forward` computes."""
    parameters = dict(module.named_parameters(recurse=False))
    biases = {f"{name}_bias" for name in WEIGHTS} if getattr(module, "has_bias", False) else set()
    return (
        set(parameters) == set(WEIGHTS) | biases
        and all(parameters[name].ndim == 3 for name in WEIGHTS)
        and getattr(module, "has_gate", False)
        and isinstance(getattr(module, "is_transposed", None), bool)
        and not getattr(module, "has_post_expert_norm", False)
        and hasattr(module, "_apply_gate")
    )
