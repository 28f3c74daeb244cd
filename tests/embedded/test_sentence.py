"""The sentence reader: what it reads, when that stands in place of rules and cuts, its file, and its training."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import openwu
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.sentence import FILE, SentenceConfig, SentenceReader
from openwu.backbones.embedded.words.whole import (
    AGREED,
    ALIKE,
    DOUBT,
    MORE,
    NEGATES,
    NOTHING,
    OTHER,
    TAKEN,
    Standing,
    Whole,
    affirmed,
    likeliest,
    same,
    stands,
    wishes_of,
)
from openwu.backbones.embedded.words.wishes import OUT_OF_SCOPE
from openwu.data.suite.phrases import LANGUAGES
from openwu.errors import CheckpointError, InstructionError, UnclearError
from openwu.export.embedded.graphs import SentenceGraph
from openwu.training.config import StageConfig
from openwu.training.embedded.config import SentenceRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.sentence_stage import SentenceStage, new_reader, train_sentence
from openwu.training.embedded.two_wishes import Sentence, joined_people
from openwu.training.loop import train_stage
from openwu.training.micro_batch import MicroBatch

LABELS = ("brighten", "lift_shadows", "cool", "white_balance", "add_noise", "snow", OUT_OF_SCOPE)


@pytest.fixture(scope="module")
def base() -> EmbeddedBase:
    folder = EmbeddedBase.bundled_folder()
    assert folder is not None
    return EmbeddedBase.from_pretrained(folder)


def tiny_reader(seed: int = 0) -> SentenceReader:
    torch.manual_seed(seed)
    sizes = {"width": 20, "num_layers": 1, "buckets": 128, "gram_width": 8}
    return SentenceReader(SentenceConfig(LABELS, **sizes)).requires_grad_(False)


def place(**shares: float) -> dict[str, float]:
    return {**dict.fromkeys((*LABELS, NOTHING), 0.0), **shares}


def test_places_are_read_up_to_the_first_with_nothing_more() -> None:
    end = place() | {NOTHING: 0.9}
    assert likeliest([place(cool=0.8), end, place(add_noise=1.0)]) == Whole(("cool",), pytest.approx(0.72))
    assert likeliest([place(cool=0.8), place(add_noise=0.5), end]).edits == ("cool", "add_noise")
    assert likeliest([place(out_of_scope=0.6), end]) == Whole((), 0.6)
    assert likeliest([place(cool=1.0), place(cool=1.0), end]).edits == ("cool",)  # said twice


def test_edits_of_which_either_is_right_count_together() -> None:
    found = likeliest([place(brighten=0.5, lift_shadows=0.4), place() | {NOTHING: 1.0}])
    assert found == Whole(("brighten",), pytest.approx(0.9))
    assert all(len(alike) == 2 for alike in ALIKE)
    assert same(("brighten", "add_noise"), ("add_noise", "lift_shadows"))
    assert not same(("brighten",), ("brighten", "add_noise"))
    assert not same(("brighten", "lift_shadows"), ("brighten", "add_noise"))


@pytest.mark.parametrize(
    ("edits", "probability", "found", "standing"),
    [
        (("cool",), TAKEN, (), Standing.WHOLE),
        (("cool",), TAKEN - 0.01, (), Standing.PARTS),
        ((), 1.0, (), Standing.PARTS),
        (("cool",), 1.0, ("white_balance",), Standing.PARTS),
        (("cool", "add_noise"), MORE, ("cool",), Standing.WHOLE),
        (("cool", "add_noise"), MORE - 0.01, ("cool",), Standing.PARTS),
        (("cool",), 1.0, ("cool", "add_noise"), Standing.PARTS),
        (("add_noise",), OTHER, ("cool",), Standing.WHOLE),
        (("add_noise",), (OTHER + DOUBT) / 2, ("cool",), Standing.NEITHER),
        (("add_noise",), DOUBT - 0.01, ("cool",), Standing.PARTS),
        ((), DOUBT, ("cool",), Standing.NEITHER),
        (("snow",), 1.0, ("cool",), Standing.PARTS),
        (("cool",), 1.0, ("snow",), Standing.PARTS),
    ],
)
def test_the_surer_answer_stands(
    edits: tuple[str, ...], probability: float, found: Sequence[str], standing: Standing
) -> None:
    assert stands(Whole(edits, probability), found, withdrawn=("snow",)) is standing


def test_readers_that_agree_need_less_certainty() -> None:
    whole = Whole(("lift_shadows", "cool"), AGREED)
    assert stands(whole, ()) is Standing.PARTS
    assert stands(whole, (), guessed=("brighten",)) is Standing.WHOLE
    assert stands(whole, (), guessed=("brighten", "add_noise")) is Standing.PARTS
    assert stands(Whole(("cool",), AGREED), (), guessed=("cool",)) is Standing.PARTS


def test_what_rules_read_of_negations_and_complaints_stands() -> None:
    whole = Whole(("add_noise",), 1.0)
    assert stands(whole, ("cool",)) is Standing.WHOLE
    assert stands(whole, ("cool",), cured=True) is Standing.PARTS
    assert stands(whole, (), negated=True) is Standing.WHOLE
    assert stands(Whole(("cool", "add_noise"), 1.0), ("cool",), cured=True) is Standing.WHOLE
    assert stands(Whole((), 1.0), ("cool",), negated=True) is Standing.PARTS


@pytest.mark.parametrize(
    ("edits", "probability", "found", "standing"),
    [
        (("cool", "add_noise"), MORE, ("cool",), Standing.WHOLE),  # a wish was lost
        (("cool", "add_noise"), MORE - 0.01, ("cool",), Standing.PARTS),
        (("cool",), OTHER, ("add_noise", "cool"), Standing.WHOLE),  # what was forbidden is done
        (("cool",), OTHER, ("denoise", "cool"), Standing.PARTS),  # the repair that a denial names
        (("brighten",), OTHER, ("denoise",), Standing.NEITHER),  # such a repair, and a wish that was lost
        (("brighten",), OTHER - 0.01, ("denoise",), Standing.PARTS),
    ],
)
def test_clauses_beside_a_denial_count(
    edits: tuple[str, ...], probability: float, found: Sequence[str], standing: Standing
) -> None:
    assert stands(Whole(edits, probability), found, negated=True) is standing


@pytest.mark.parametrize(
    ("sentence", "rest"),
    [
        ("not sepia but black and white with a vignette", "black and white with a vignette"),
        ("sharpen it, don't add grain", "sharpen it"),
        ("brighter but not warmer, and sharpen", "brighter, and sharpen"),
        ("别加颗粒，变黑白，再加暗角", "变黑白, 再加暗角"),
        ("don't make it warmer", ""),
        ("make it warm without grain, and sharpen it", "make it warm, and sharpen it"),
        ("弄成白天，颜色别太浓", "弄成白天, 颜色别太浓"),
        ("warmer, but not too warm", "warmer, not too warm"),
        ("变成卡通的，颜色要特别鲜", "变成卡通的, 颜色要特别鲜"),
        ("make it warmer", "make it warmer"),
    ],
)
def test_clauses_that_deny_are_left_out(sentence: str, rest: str) -> None:
    assert affirmed(sentence) == rest


@pytest.mark.parametrize(
    ("sentence", "edits"),
    [
        ("not sepia but black and white with a vignette", ["black_and_white", "vignette"]),
        ("sharpen it, don't add grain", ["sharpen"]),
        ("warmer, but not brighter", ["warm"]),
        ("no blur please, just sharpen it and add a vignette", ["sharpen", "vignette"]),
        ("brighter but not warmer, and sharpen", ["brighten", "sharpen"]),
        ("别加颗粒，变黑白，再加暗角", ["black_and_white", "vignette"]),
    ],
)
def test_a_wish_beside_a_denial_is_not_lost(sentence: str, edits: list[str]) -> None:
    understood = openwu.Editor.from_pretrained().understand(sentence)
    assert understood is not None
    assert [each.edit for each in (understood, *understood.then)] == edits


@pytest.mark.parametrize(
    ("sentence", "negates"),
    [
        ("sharpen it, don't add grain", True),
        ("brighter but not warmer", True),
        ("变黑白，别加颗粒", True),
        ("notably warmer, and another vignette", False),
        ("把别的颜色调淡", False),
    ],
)
def test_negations_are_seen(sentence: str, negates: bool) -> None:
    assert bool(NEGATES.search(sentence)) is negates


def test_wishes_keep_words_of_strength_and_numbers(base: EmbeddedBase) -> None:
    def read(sentence: str, *edits: str) -> list[tuple[str, str, float, str]]:
        found = wishes_of(Whole(edits, 0.9), sentence, base.read_sentences, base.config.instruction.accepted)
        assert found is not None
        assert all(each.settled and each.reading.probability >= 0.9 for each in found)
        return [(each.reading.edit, each.reading.degree, each.strength, each.number) for each in found]

    assert read("make it a little brighter", "brighten") == [("brighten", "little", 1.0, "")]
    (first, second) = read("20% brighter, add grain", "brighten", "add_noise")
    assert first[0] == "brighten"
    assert first[3] == "20%"
    assert first[2] == pytest.approx(0.2 / (0.5 ** (1 / 1.7) / 0.5 - 1))
    assert second == ("add_noise", "normal", 1.0, "")
    assert [each[0] for each in read("xyzzy and plugh", "warm", "sharpen")] == ["warm", "sharpen"]
    whole = Whole(("warm", "sharpen"), 0.9)
    assert wishes_of(whole, "xyzzy 20%, plugh", base.read_sentences, 0.85) is None  # a number that belongs to no wish


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_edit_by_its_own_sentence_is_that_edit(base: EmbeddedBase, language: str) -> None:
    filler = {"en": "xyzzy", "zh": "嗯"}[language]
    for name, edit in base.edits().items():
        if not edit.withdrawn:
            found = wishes_of(Whole((name,), 0.9), filler, base.read_sentences, 0.85)
            assert found is not None
            assert [each.reading.edit for each in found] == [name]
            assert base.instruction.readings([found[0].text])[0].edit == name


def test_padding_changes_nothing() -> None:
    reader = tiny_reader()
    sentences = ["too dark", "又暗又糊，还偏蓝", "make it much brighter and cooler please"]
    together = reader(reader.hashed(sentences))
    assert together.shape == (3, 3, len(LABELS) + 1)
    torch.testing.assert_close(together.exp().sum(-1), torch.ones(3, 3))
    for row, sentence in zip(together, sentences, strict=True):
        torch.testing.assert_close(row, reader(reader.hashed([sentence]))[0])


def test_the_graph_for_other_runtimes_computes_the_same() -> None:
    reader = tiny_reader()
    rows = reader.hashed(["less haze, more colour"])
    torch.testing.assert_close(SentenceGraph(reader)(rows), reader(rows).exp())


def test_nothing_to_read_is_no_error() -> None:
    assert len(tiny_reader().read(["", "!?", "a " * 200])) == 3


def test_a_file_comes_back_nearly_as_it_was(tmp_path: Path) -> None:
    reader = tiny_reader()
    reader.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    loaded = SentenceReader.load(tmp_path, LABELS)
    assert loaded is not None
    assert loaded.config == reader.config
    rows = reader.hashed(["darker, with grain"])
    torch.testing.assert_close(loaded(rows), reader(rows), atol=0.05, rtol=0)
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    twice = SentenceReader.load(again, LABELS)
    assert twice is not None
    torch.testing.assert_close(twice(rows), loaded(rows), atol=0.01, rtol=0)


def test_other_labels_and_no_file_mean_no_reader(tmp_path: Path) -> None:
    assert SentenceReader.load(tmp_path, LABELS) is None
    tiny_reader().save(tmp_path)
    assert SentenceReader.load(tmp_path, (*LABELS[:-1], "mine", OUT_OF_SCOPE)) is None


@pytest.mark.parametrize("contents", [b"", b"no safetensors", None])
def test_a_broken_file_is_named(tmp_path: Path, contents: bytes | None) -> None:
    tiny_reader().save(tmp_path)
    stored = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(stored[: len(stored) // 2] if contents is None else contents)
    with pytest.raises(CheckpointError, match="expected a sentence reader's weights, got a broken file"):
        SentenceReader.load(tmp_path, LABELS)


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width: expected a multiple of heads=5, got 21"):
        SentenceConfig(LABELS, width=21)


def test_a_model_keeps_its_reader(tmp_path: Path) -> None:
    model = EmbeddedModel.from_pretrained()
    assert model.base.sentences is not None
    assert model.copy().base.sentences is model.base.sentences
    model.save_pretrained(tmp_path)
    assert EmbeddedModel.from_pretrained(tmp_path).base.sentences is not None
    model.base.sentences = None
    model.save_pretrained(tmp_path)  # no reader of another model is left behind
    assert not (tmp_path / FILE).exists()
    assert EmbeddedModel.from_pretrained(tmp_path).base.sentences is None


SEVERAL = {
    "too dark and too blue": {"brighten", "lift_shadows"},
    "hdr and super saturated": {"hdr"},
    "cartoon style, brighter": {"cartoon"},
    "又暗又糊": {"brighten", "lift_shadows"},
    "太暗，还发蓝": {"brighten", "lift_shadows"},
}


@pytest.mark.parametrize("sentence", SEVERAL)
def test_several_wishes_in_one_sentence_are_all_read(sentence: str) -> None:
    found = openwu.Editor.from_pretrained().understand(sentence)
    assert found is not None
    assert found.edit in SEVERAL[sentence]
    assert len(found.then) == 1


def test_readers_that_contradict_each_other_ask_back(base: EmbeddedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = base.sentences
    assert reader is not None
    monkeypatch.setattr(type(reader), "read", lambda _, sentences: [Whole(("sepia",), 0.8) for _ in sentences])
    job = base.read((), ("make it warmer",))
    with pytest.raises(UnclearError, match=r"may ask for warm, or sepia, and it is not clear which; .*--edit NAME"):
        base.understand(job)
    monkeypatch.setattr(type(reader), "read", lambda _, sentences: [Whole((), 0.9) for _ in sentences])
    with pytest.raises(InstructionError, match="may ask for warm, or none"):
        base.understand(job)


def test_sentences_of_people_are_put_together() -> None:
    one, other = (
        Sentence(text, "en", (frozenset({edit}),)) for text, edit in (("Too dark!", "brighten"), ("warmer", "warm"))
    )
    both = joined_people(one, other, random.Random(0))
    assert both.edits == (frozenset({"brighten"}), frozenset({"warm"}))
    assert both.text.startswith(("Too dark", "first Too dark"))
    assert joined_people(one, one, random.Random(0)) is one


RECIPE = SentenceRecipe(
    name="sentence", sentence=StageConfig(steps=8, shapes=((24, 0),), learning_rate=5e-3, warmup=1), composed=60
)


@pytest.fixture(scope="module")
def stage() -> SentenceStage:
    return SentenceStage(new_reader(EmbeddedModel.from_pretrained().instruction.config.labels, 0), RECIPE)


def test_right_labels_stand_at_their_places(stage: SentenceStage) -> None:
    last = len(stage.index)
    two = Sentence("", "en", (frozenset({"brighten", "lift_shadows"}), frozenset({"warm"})))
    right = stage.right([two, Sentence("", "en", ())])
    assert right[0, 0].nonzero().flatten().tolist() == sorted(stage.index[e] for e in ("brighten", "lift_shadows"))
    assert right[0, 1].nonzero().flatten().tolist() == [stage.index["warm"]]
    assert right[0, 2].nonzero().flatten().tolist() == [last]
    assert right[1, 0].nonzero().flatten().tolist() == [stage.index[OUT_OF_SCOPE]]
    assert right[1, 1:].nonzero()[:, 1].tolist() == [last, last]


def test_draws_depend_on_seed_and_step_alone(stage: SentenceStage) -> None:
    assert stage.drawn(3) == stage.drawn(3)
    assert stage.drawn(3) != stage.drawn(4)
    sentences = stage.drawn(3)
    rows = stage.rows(sentences, 3)
    assert torch.equal(rows, stage.rows(sentences, 3))
    whole = stage.reader.hashed([each.text for each in sentences])
    assert 0.1 < 1 - (rows > 0).sum() / (whole > 0).sum() < 0.3
    assert torch.equal((rows > 0).any(2), (whole > 0).any(2))  # n-grams are left out, words are not
    assert {len(each.edits) for step in range(8) for each in stage.drawn(step)} >= {0, 1, 2}


def test_micro_batches_add_up_to_the_batch(stage: SentenceStage) -> None:
    with stage.loss(0) as whole, stage.loss(0, MicroBatch(0, 2)) as first, stage.loss(0, MicroBatch(1, 2)) as second:
        torch.testing.assert_close(whole, first + second)


def test_a_training_lowers_the_loss_and_writes_a_reader(tmp_path: Path) -> None:
    fresh = SentenceStage(new_reader(EmbeddedModel.from_pretrained().instruction.config.labels, 0), RECIPE)
    with torch.no_grad(), fresh.loss(99) as before:
        pass
    train_stage(fresh, RECIPE.sentence)
    with torch.no_grad(), fresh.loss(99) as after:
        pass
    assert after < before - 1
    assert set(fresh.evaluate().scalars) == {"held_out/right", "fresh/right", "stranger/right"}
    short = dataclasses.replace(RECIPE, sentence=dataclasses.replace(RECIPE.sentence, steps=1), evaluate_every=0)
    train_sentence(short, tmp_path)
    assert SentenceReader.load(tmp_path / "model", fresh.reader.config.labels) is not None
    assert (tmp_path / "model" / "provenance.json").exists()
