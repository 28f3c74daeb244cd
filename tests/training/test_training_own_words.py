"""Labels of one's own: new tasks are understood, known sentences read as before, and weights are drawn back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.data.suite.phrases import OUT_OF_SCOPE, load_phrases
from openwu.errors import OpenwuError
from openwu.training.embedded.instruction_stages import InstructionStage
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.own_words import OwnCentres, new_labels, teach, with_labels
from openwu.training.retention import Retention, RetentionWarning

WORDINGS = {"shop": ("make it look like my shop", "use the style of our store"), "two": ("grade it the second way",)}
KNOWN = tuple(sentence for name in ("blur", "darken") for sentence in load_phrases()[name]["en"]["train"][:8])


@pytest.fixture(scope="module")
def shipped() -> EmbeddedModel:
    return EmbeddedModel.from_pretrained()


@pytest.fixture(scope="module")
def taught(shipped: EmbeddedModel) -> EmbeddedModel:
    model = with_labels(shipped, new_labels(shipped, WORDINGS))
    teach(model, WORDINGS)
    return model


def read_as(encoder: InstructionEncoder, *sentences: str) -> list[str]:
    return [reading.edit for reading in encoder.readings(sentences)]


def test_new_sentences_and_their_paraphrases_are_understood(taught: EmbeddedModel, shipped: EmbeddedModel) -> None:
    paraphrases = ("turn it into my shop look", "could you make this look like it is from my shop")
    assert read_as(taught.instruction, *WORDINGS["shop"], *paraphrases) == ["shop"] * 4
    assert read_as(taught.instruction, *WORDINGS["two"]) == ["two"]
    trained = taught.instruction.readings([*WORDINGS["shop"], *WORDINGS["two"]])
    assert all(each.is_wish(taught.instruction.config.accepted) for each in trained)
    assert set(read_as(shipped.instruction, *WORDINGS["shop"], *paraphrases)) != {"shop"}


def test_known_sentences_keep_tokens_and_meaning(taught: EmbeddedModel, shipped: EmbeddedModel) -> None:
    outside = load_phrases()[OUT_OF_SCOPE]["en"]["train"][:20]
    with torch.no_grad():
        before, after = (model.instruction([*KNOWN, *outside]) for model in (shipped, taught))
    assert float((before - after).abs().max()) < 0.02
    for sentence, was, now in zip(
        KNOWN, shipped.instruction.readings(KNOWN), taught.instruction.readings(KNOWN), strict=True
    ):
        assert (was.edit, now.edit) == (was.edit, was.edit), sentence
        assert abs(was.probability - now.probability) < 0.01, sentence
    for name, value in shipped.state_dict().items():
        if not name.startswith(("instruction.", "base.instruction.")):
            assert torch.equal(value, taught.state_dict()[name]), name


def test_new_mean_tokens_lie_outside_the_span_of_all_others(taught: EmbeddedModel) -> None:
    labels, centres = taught.config.instruction.labels, taught.instruction.centres.detach().flatten(1)
    assert labels[-1] == OUT_OF_SCOPE
    own = torch.tensor([labels.index(name) for name in WORDINGS])
    known = torch.tensor([i for i in range(len(labels)) if i not in own.tolist()])
    middle = centres[known].mean(0)
    alike = torch.nn.functional.cosine_similarity(
        (centres[own] - middle)[:, None], (centres[known] - middle)[None], dim=2
    )
    assert float(alike.abs().max()) < 1e-3
    first, second = centres[own] - middle
    assert abs(float(torch.nn.functional.cosine_similarity(first, second, dim=0))) < 1e-3


def test_a_model_with_own_labels_is_a_folder_like_any_other(taught: EmbeddedModel, tmp_path: Path) -> None:
    taught.save_pretrained(tmp_path, torch.float32)
    again = EmbeddedModel.from_pretrained(tmp_path)
    assert read_as(again.instruction, *WORDINGS["shop"]) == ["shop"] * 2
    assert {"shop", "two"} <= set(again.base.edits())
    assert new_labels(again, WORDINGS) == ()
    with pytest.raises(OpenwuError, match=r"labels: expected sub-tasks of the suite.*got \['shop', 'two'\]"):
        InstructionStage(again, 0, 4)
    with pytest.raises(OpenwuError, match="task: expected any other name than 'out_of_scope'"):
        new_labels(again, {OUT_OF_SCOPE: ("do nothing",)})


def test_gradients_reach_the_mean_tokens_of_new_labels_alone(taught: EmbeddedModel) -> None:
    own = OwnCentres(taught.instruction, ["shop"])
    assert [name for name, _ in own.named_parameters()] == ["moved"]
    sentences = [WORDINGS["shop"][0], KNOWN[0]]
    read = own.read(sentences)
    assert torch.equal(read, taught.instruction(sentences))
    torch.autograd.backward(read[0].sum())
    assert own.moved.grad is not None
    assert float(own.moved.grad.abs().min()) > 0
    before = taught.instruction.centres.detach().clone()
    with torch.no_grad():
        own.moved.fill_(0.01)
    moved = own.read(sentences).detach()
    own.store()
    assert torch.equal(taught.instruction(sentences), moved)
    assert not own.moved.any()
    changed = (taught.instruction.centres != before).any(2).any(1)
    assert [taught.config.instruction.labels[i] for i in changed.nonzero().flatten()] == ["shop"]
    with torch.no_grad():
        taught.instruction.centres.copy_(before)


def quadratic(weight: Tensor, steep: float) -> Retention:
    """A known task whose score falls with the square of a weight's distance from 0."""
    return Retention(lambda: {"known": 30 - steep * float(weight.square().mean())}, 0.5, "dB", "rest")


def test_weights_are_drawn_back_until_no_more_is_lost_than_allowed() -> None:
    weight = nn.Parameter(torch.zeros(4))
    known = quadratic(weight, 8.0)
    begun = {"w": weight.detach().clone()}
    with torch.no_grad():
        weight.fill_(1.0)
    share = known.draw_back({"w": weight}, begun)
    assert known.lost()["known"] == pytest.approx(8 * share**2)
    assert 0.4 < known.lost()["known"] <= 0.5
    assert torch.equal(weight.detach(), torch.full((4,), share))
    assert known.draw_back({"w": weight}, begun) == 1.0  # enough is kept: nothing is moved
    free = Retention(lambda: {"known": -float(weight.sum())}, math.inf, "dB", "rest")
    assert free.draw_back({"w": weight}, begun) == 1.0


def test_one_task_that_loses_more_than_each_may_draws_weights_back_too() -> None:
    weight = nn.Parameter(torch.zeros(4))
    steep = {"blur": 4.0, **dict.fromkeys(("warm", "cool", "fog", "rain", "snow", "night", "day", "sepia"), 0.0)}
    known = Retention(
        lambda: {name: 30 - each * float(weight.square().mean()) for name, each in steep.items()},
        *(0.5, "dB", "rest", 1.0),
    )
    begun = {"w": weight.detach().clone()}
    with torch.no_grad():
        weight.fill_(1.0)
    with pytest.warns(RetentionWarning, match=r"0\.44 dB are lost .*most on 'blur': 4\.00"):
        assert known.scalars()["known/worst"] == pytest.approx(4.0)
    share = known.draw_back({"w": weight}, begun)
    assert 0.4 < share < 0.5
    assert 0.8 < known.lost()["blur"] <= 1.0


def test_what_is_lost_however_near_the_start_warns() -> None:
    weight = nn.Parameter(torch.zeros(1))
    scores = iter([30.0])
    known = Retention(lambda: {"known": next(scores, 20.0)}, 0.5, "dB", "rest")
    with pytest.warns(
        RetentionWarning,
        match=r"10\.00 dB are lost .*most on 'known': 10\.00.* although the weights were drawn back to 0%",
    ):
        known.draw_back({"w": weight}, {"w": torch.zeros(1)})
