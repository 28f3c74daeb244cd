"""Refusals: which sentences, and what they tell."""

from __future__ import annotations

import pytest
import torch

from openwu.data.phrases import OUT_OF_SCOPE
from openwu.errors import InstructionError
from openwu.scope import check_scope

LABELS = ("brighten", OUT_OF_SCOPE, "black_and_white", "blur", "fog")


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_what_some_edit_serves_passes() -> None:
    check_scope(["brighter"], logs(0.4, 0.3, 0.1, 0.1, 0.1), LABELS)
    with pytest.raises(InstructionError):
        check_scope(["brighter"], logs(0.3, 0.4, 0.1, 0.1, 0.1), LABELS)


def test_a_refusal_names_the_sentence_the_nearest_edits_and_a_way_out() -> None:
    with pytest.raises(InstructionError) as refused:
        check_scope(["add a dragon"], logs(0.05, 0.5, 0.2, 0.15, 0.1), LABELS)
    message = str(refused.value)
    assert "'add a dragon'" in message
    assert "black and white, blur, fog." in message
    assert "brighten" not in message
    assert "--anyway" in message


def test_every_sentence_of_a_batch_is_checked() -> None:
    both = torch.cat([logs(0.9, 0.05, 0.02, 0.02, 0.01), logs(0.1, 0.6, 0.1, 0.1, 0.1)])
    with pytest.raises(InstructionError, match="'second'"):
        check_scope(["first", "second"], both, LABELS)
