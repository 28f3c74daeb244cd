"""Two wishes that no rule tells apart: cuts of a sentence, what is learned of them, and questions, not guesses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.words.cuts import Judged, cuts, judge, phrases_of, score_of, weighed
from openwu.backbones.embedded.words.cuts import model as cuts_model
from openwu.backbones.embedded.words.wishes import OUT_OF_SCOPE, Reading, wishes
from openwu.data.suite import EDITS
from openwu.data.suite.phrases import letters
from openwu.errors import InstructionError
from openwu.training.config import StageConfig
from openwu.training.embedded.config import CutsRecipe
from openwu.training.embedded.two_wishes import HELD_OUT, brief, composed, shared, single, told, written
from openwu.training.embedded.wish_cuts import fit, gather, train_cuts, training_sentences
from openwu.training.run import load_recipe


def reading(**probabilities: float) -> Reading:
    ranked = tuple(sorted(probabilities.items(), key=lambda entry: -entry[1]))
    return Reading(*ranked[0], ranked=ranked)


def taken_for(base: EmbeddedBase, sentence: str) -> list[str] | None:
    """The edits of a sentence; None where it is refused."""
    accepted = base.config.instruction.accepted
    try:
        found = wishes(sentence, base.read_sentences, accepted)
    except InstructionError:
        return None
    return [wish.reading.edit for wish in found] if all(w.reading.is_wish(accepted) for w in found) else None


def test_a_cut_stands_between_any_two_words_and_joining_words_belong_to_no_side() -> None:
    found = [(cut.left, cut.right) for cut in cuts("softer, and then a bit warmer")]
    assert found[0] == ("softer", "a bit warmer")
    assert found[-1] == ("softer, and then a bit", "warmer")
    assert ("调亮", "锐化") in [(cut.left, cut.right) for cut in cuts("调亮，并且锐化")]
    assert all(cuts(text) == [] for text in ("brighter", "!", ""))


def test_a_side_has_its_clause_next_to_the_cut() -> None:
    cut = next(each for each in cuts("softer, warmer, it's a wedding") if each.left == "softer")
    assert (cut.right, cut.right_clause, cut.mark) == ("warmer, it's a wedding", "warmer", ",")
    assert (cut.words_before, cut.words_after[:1]) == (("softer",), ("warmer",))


def test_sides_without_two_different_edits_have_no_score() -> None:
    (cut,) = cuts("warmer softer")
    warm, soft = reading(warm=0.9, soften=0.05, out_of_scope=0.05), reading(soften=0.9, warm=0.1, out_of_scope=0.0)
    assert score_of(cut, warm, warm, soft) is not None
    assert score_of(cut, warm, warm, warm) is None
    assert score_of(cut, warm, warm, reading(soften=0.4, warm=0.1, out_of_scope=0.5)) is None


def test_the_judge_names_both_sides_and_a_probability() -> None:
    known = {"warmer": reading(warm=1.0, soften=0.0), "softer": reading(soften=1.0, warm=0.0)}

    def read(texts: Sequence[str]) -> list[Reading]:
        return [known.get(text, reading(out_of_scope=1.0, warm=0.0, soften=0.0)) for text in texts]

    found = judge("warmer and softer", reading(warm=0.6, soften=0.4, out_of_scope=0.0), read)
    assert isinstance(found, Judged)
    assert (found.left_text, found.right_text) == ("warmer", "softer")
    assert 0.5 < found.probability <= 1
    assert judge("warmer", known["warmer"], read) is None


@pytest.mark.parametrize(
    ("sentence", "edits"),
    [
        ("pull the whites back, warm the rest up", {"recover_highlights", "warm"}),
        ("charcoal drawing with softer contrast", {"charcoal", "contrast_down"}),
        ("hdr plus a bit extra saturation for the travel blog", {"hdr", "saturate"}),
        ("sepia and some scratches on it, for a western party invite", {"sepia", "scratches"}),
        ("网点效果加上偏红，音乐会用的", {"halftone", "tint_red"}),
        ("棕褐色加颗粒，老上海的感觉", {"sepia", "add_noise"}),
    ],
)
def test_a_second_wish_is_done_or_asked_for(base: EmbeddedBase, sentence: str, edits: set[str]) -> None:
    found = taken_for(base, sentence)
    assert found is None or set(found) == edits


@pytest.mark.parametrize(
    ("sentence", "edit"),
    [
        ("brighten it, we were in a cellar bar at night", "brighten"),
        ("sharpen it, it was a foggy morning", "sharpen"),
        ("make it look like a watercolour for my mum's birthday", "watercolour"),
        ("less noise please, I shot this at night", "denoise"),
        ("old newsprint dot screen please. taken with a grainy old camera", "halftone"),
        ("让照片更温暖，昨天下雪拍的", "warm"),
    ],
)
def test_a_reason_is_no_wish(base: EmbeddedBase, sentence: str, edit: str) -> None:
    assert taken_for(base, sentence) in ([edit], None)


def test_what_is_unclear_is_refused_with_both_edits(base: EmbeddedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    for bar in ("CLEAR", "CLEAR_NEAR"):
        monkeypatch.setattr(f"openwu.backbones.embedded.words.wishes.{bar}", 1.1)
    with pytest.raises(InstructionError, match=r"may ask for more than one edit, .*sepia.*add noise.*--then"):
        wishes("棕褐色加颗粒，老上海的感觉", base.read_sentences, base.config.instruction.accepted)


def test_composed_sentences_ask_for_what_their_parts_do() -> None:
    assert composed(40, seed=3) == composed(40, seed=3)
    assert composed(40, seed=3) != composed(40, seed=4)
    found = [*composed(40, seed=3), *brief(80, seed=3), *shared(20, seed=3)]
    assert {name for each in found for edit in each.edits for name in edit} <= set(EDITS)
    assert all(len(each.edits) == 2 and each.edits[0] != each.edits[1] for each in found)
    assert {each.language for each in found} == {"en", "zh"}


def test_the_writers_labels_are_edits_of_the_suite() -> None:
    found, more, idioms = written(), written("developed"), written("idioms")
    assert (len(found), sum(len(each.edits) == 2 for each in found)) == (1198, 340)
    assert (len(more), sum(len(each.edits) == 2 for each in more)) == (127, 93)
    assert (len(idioms), sum(len(each.edits) == 2 for each in idioms)) == (2493, 300)
    every = [*found, *more, *idioms]
    assert {name for each in every for edit in each.edits for name in edit} <= set(EDITS)
    assert all(usual in edits for each in every for usual, edits in zip(each.usual, each.edits, strict=True))
    held_out = {letters(each.text) for split in HELD_OUT for each in single(1000, 0, split)}
    same = held_out & {letters(each.text) for each in (*found, *idioms)}
    assert same == {"letitrain"}  # which two writers had; the edit is withdrawn


def test_cuts_json_is_written_by_its_recipe(tmp_path: Path) -> None:
    small = {"composed": 40, "shared": 4, "brief": 40, "told": 4, "single": 0}
    made = load_recipe(
        Path(__file__).parents[2] / "recipes" / "cuts.py", [f"{key}={value}" for key, value in small.items()]
    )
    assert isinstance(made, CutsRecipe)
    kept = training_sentences(made)
    assert len(kept) > 7000
    assert {len(each.edits) for each in kept} == {0, 1, 2}
    stage = StageConfig(steps=2, shapes=((1, 0),), learning_rate=2e-2)
    base = EmbeddedBase.bundled_folder()
    recipe = replace(made, cuts=stage, export=str(tmp_path / "words"), start=str(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openwu.training.embedded.wish_cuts.training_sentences", lambda _: composed(40, 0))
        for run in ("a", "b"):
            train_cuts(recipe, tmp_path / run)
    first, second, exported = (tmp_path / part / "cuts.json" for part in ("a/model", "b/model", "words"))
    assert first.read_bytes() == second.read_bytes() == exported.read_bytes()
    assert set(json.loads(first.read_text())) == set(cuts_model())


def test_a_scene_beside_a_wish_is_no_wish() -> None:
    found = told(60, seed=3)
    assert all(len(each.edits) == 1 for each in found)
    assert any("snow" in each.text or "雪" in each.text for each in found)


def test_the_model_learns_where_a_second_wish_begins(base: EmbeddedBase) -> None:
    examples = gather(base.instruction, [*brief(60, 0), *single(1, 0)[::6]])
    model = fit(examples, StageConfig(steps=150, shapes=((1, 0),), learning_rate=2e-2))
    assert model["words"]
    two = [each for each in examples if len(each.sentence.edits) == 2 and any(each.right)]
    assert len(two) >= 30
    right = 0
    for each in two:
        scores = [weighed(model, *row) for row in zip(each.numbers, each.phrases, strict=True)]
        right += each.right[scores.index(max(scores))] and max(scores) > 0
    assert right >= 0.8 * len(two)
    one = [each for each in examples if len(each.sentence.edits) == 1]
    split = [max((weighed(model, *row) for row in zip(e.numbers, e.phrases, strict=True)), default=-1.0) for e in one]
    assert sum(score > 0 for score in split) <= 0.1 * len(one)


def test_words_around_a_cut_know_their_language_and_side() -> None:
    cut = next(each for each in cuts("softer and warmer") if each.left == "softer")
    assert {"e last softer", "e next and", "e after warmer", "e mark "} <= set(phrases_of(cut))
    assert OUT_OF_SCOPE not in EDITS
