"""What the embedded model can be asked for: log-probabilities of the sub-tasks enter, a refusal leaves, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from openwu.data.suite import EDITS
from openwu.data.suite.phrases import OUT_OF_SCOPE, load_phrases
from openwu.errors import InstructionError

NEAREST = 3
"""How many known edits a refusal names."""


def check_scope(
    instructions: Sequence[str], log_probabilities: Tensor, labels: Sequence[str], referenced: Sequence[bool]
) -> None:
    """Raise InstructionError for the first instruction that no sub-task serves, or that lacks its reference picture.

    log_probabilities: `[b, labels]`; referenced: whether each request has a second picture.
    """
    outside = labels.index(OUT_OF_SCOPE)
    for instruction, logs, second in zip(instructions, log_probabilities, referenced, strict=True):
        ranked = [int(index) for index in logs.argsort(descending=True)]
        label = labels[ranked[0]]
        if ranked[0] == outside:
            nearest = [labels[index] for index in ranked if index != outside][:NEAREST]
            raise InstructionError(
                f"instruction: the embedded model does not know how to {instruction!r}; the nearest edits it knows "
                f"are: {', '.join(shown(name, instruction) for name in nearest)}. Ask for one of them, try anyway with "
                "--allow-out-of-scope (allow_out_of_scope=True), or pass a larger model with --model FOLDER "
                "(Editor.from_pretrained(folder))"
            )
        if not second and label in EDITS and EDITS[label].needs_reference:
            raise InstructionError(
                f"instruction: {instruction!r} asks for the look of a second picture, but only one came; add it with "
                "--reference FILE (images=[photo, reference])"
            )


def shown(name: str, instruction: str) -> str:
    """A sub-task with an example of how to ask for it, in the instruction's language."""
    language = "zh" if any("一" <= character <= "鿿" for character in instruction) else "en"
    plain = name.replace("_", " ")
    return f"{plain} ({load_phrases()[name][language]['train'][0]!r})" if name in EDITS else plain
