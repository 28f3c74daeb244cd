"""What the embedded model can be asked for: log-probabilities of the sub-tasks enter, a refusal leaves, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from openwu.data.phrases import OUT_OF_SCOPE
from openwu.errors import InstructionError

NEAREST = 3
"""How many known edits a refusal names."""


def check_scope(instructions: Sequence[str], log_probabilities: Tensor, labels: Sequence[str]) -> None:
    """Raise InstructionError for the first instruction that no sub-task serves. log_probabilities: `[b, labels]`"""
    outside = labels.index(OUT_OF_SCOPE)
    for instruction, logs in zip(instructions, log_probabilities, strict=True):
        ranked = [int(index) for index in logs.argsort(descending=True)]
        if ranked[0] != outside:
            continue
        nearest = [labels[index].replace("_", " ") for index in ranked if index != outside][:NEAREST]
        raise InstructionError(
            f"instruction: the embedded model does not know how to {instruction!r}; the nearest edits it knows are: "
            f"{', '.join(nearest)}. Ask for one of them, try anyway with --anyway (anyway=True), or use a larger base"
        )
