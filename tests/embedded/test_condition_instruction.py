"""Reading sentences: words, hashes, independence of the batch, closeness of mistyped words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openwu.backbones.embedded.instruction import (
    NUM_DEGREES,
    SETTLED,
    InstructionConfig,
    InstructionEncoder,
    hash_words,
    split_words,
    word_grams,
)
from openwu.data.suite.phrases import DEGREES

LABELS = ("one", "two")


@pytest.fixture
def encoder() -> InstructionEncoder:
    """Untrained, with a random table where training starts from zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = InstructionEncoder(InstructionConfig(LABELS, width=32, num_tokens=3, max_words=12, buckets=4096))
        torch.nn.init.normal_(encoder.table.weight)
    with torch.no_grad():
        encoder.table.weight[0] = 0
    return encoder.requires_grad_(False)


def test_words() -> None:
    assert split_words("Don't BLUR it, please!") == ["dont", "blur", "it", ",", "please", "!"]
    assert split_words("把照片 blur 一下") == ["把", "照", "片", "blur", "一", "下"]
    assert split_words(" ") == []


def test_grams() -> None:
    assert word_grams(["blur"], 0) == ["=blur", "<bl", "blu", "lur", "ur>", "<blu", "blur", "lur>", "<blur", "blur>"]
    assert word_grams(["照", "片"], 0) == ["照", "照片"]
    assert word_grams(["照", "片"], 1) == ["片", "片$"]


def test_hashes_are_the_same_everywhere_and_forever() -> None:
    rows = hash_words(["fog", "雾"], InstructionConfig(LABELS, buckets=8192))
    assert rows.tolist() == [[[736, 6641, 636, 3736, 7875, 5684, 3548]], [[6297, 2799, 0, 0, 0, 0, 0]]]


def test_rows_stay_within_the_table_and_long_words_are_cut() -> None:
    config = InstructionConfig(LABELS, buckets=8, max_words=5, max_grams=4)
    rows = hash_words(["a very long sentence about nothing at all", "extraordinarily"], config)
    assert rows.shape == (2, 5, 4)
    assert rows.max() < 8
    assert bool((rows[1, 0] > 0).all())
    assert not rows[1, 1:].any()


def test_a_sentence_alone_equals_the_sentence_in_a_batch(encoder: InstructionEncoder) -> None:
    sentences = ["blur", "please make the whole picture a little bit warmer", "把照片调亮一点", "!"]
    together = encoder(sentences)
    assert together.shape == (4, 3, 32)
    for i, sentence in enumerate(sentences):
        torch.testing.assert_close(together[i : i + 1], encoder([sentence]), atol=1e-5, rtol=1e-5)


def test_order_matters(encoder: InstructionEncoder) -> None:
    assert (encoder(["sharp not soft"]) - encoder(["soft not sharp"])).abs().max() > 0.01


def test_mistyped_words_stay_closer_than_other_ones(encoder: InstructionEncoder) -> None:
    """On the average over words: the vectors of letters are random here."""
    words = ["brighten", "colourise", "saturation", "watercolour", "restore", "vignette"]
    slips = ["brighetn", "colourrise", "saturtion", "waterclour", "rstore", "vignete"]
    right, mistyped = (encoder([f"{word} the photo" for word in each]) for each in (words, slips))
    apart = (right - mistyped).flatten(1).norm(dim=1).mean()
    assert apart < 0.85 * (right - right.roll(1, 0)).flatten(1).norm(dim=1).mean()


def test_unknown_words_add_nothing_from_untouched_rows(encoder: InstructionEncoder) -> None:
    """A table in which only the rows of known words were touched by training."""
    touched = hash_words(["blur the photo"], encoder.config).unique()
    with torch.no_grad():
        kept = encoder.table.weight[touched].clone()
        encoder.table.weight.zero_()
        encoder.table.weight[touched] = kept
    unknown = [word for word in ("xqzv", "wkjy", "ggfd") if not (_rows(word, encoder)[:, None] == touched).any()]
    assert len(unknown) >= 2
    first, second = encoder([f"blur {word}" for word in unknown[:2]])
    torch.testing.assert_close(first, second)
    assert (encoder(["blur photo"])[0] - first).abs().max() > 0.01


def _rows(word: str, encoder: InstructionEncoder) -> torch.Tensor:
    rows = hash_words([word], encoder.config).unique()
    return rows[rows > 0]


def test_what_comes_after_the_last_word_is_not_read(encoder: InstructionEncoder) -> None:
    twelve = "one two three four five six seven eight nine ten eleven twelve"
    assert torch.equal(encoder([twelve + " and much more"]), encoder([twelve]))
    assert not torch.equal(encoder(["so " + twelve]), encoder([twelve]))


@pytest.mark.parametrize("sentence", ["", "   ", "é", "🙂", "\u0130", "x" * 500])
def test_any_text_gives_finite_tokens(encoder: InstructionEncoder, sentence: str) -> None:
    assert bool(encoder([sentence]).isfinite().all())


def test_probabilities_sum_to_one(encoder: InstructionEncoder) -> None:
    logs = encoder.log_probabilities(encoder(["blur", "sharpen"]))
    assert logs.shape == (2, 2)
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(2))


def test_degrees_are_read_from_the_same_tokens(encoder: InstructionEncoder) -> None:
    assert list(DEGREES) == ["little", "normal", "strong"]  # in the order of the head's outputs
    assert len(DEGREES) == NUM_DEGREES
    tokens = encoder(["blur it a little", "blur it", "blur it strongly"])
    logs = encoder.degree_log_probabilities(tokens)
    assert logs.shape == (3, NUM_DEGREES)
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(3))
    labels = encoder.log_probabilities(tokens)
    with torch.no_grad():
        encoder.grade.bias += torch.tensor([0.0, 0.0, 5.0])
    assert (encoder.degree_log_probabilities(tokens).argmax(1) == 2).all()
    assert torch.equal(encoder.log_probabilities(tokens), labels)


SENTENCES = ["brighten the photo", "把照片调亮一点", "!"]


def test_dropping_nothing_changes_nothing(encoder: InstructionEncoder) -> None:
    assert torch.equal(encoder(SENTENCES, dropped=(0.0, torch.Generator())), encoder(SENTENCES))


def test_dropped_grams_depend_on_the_generator_alone(encoder: InstructionEncoder) -> None:
    torch.manual_seed(0)
    first, same, other = (encoder(SENTENCES, dropped=(0.3, torch.Generator().manual_seed(s))) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, encoder(SENTENCES))


def test_a_sentence_stays_itself_when_some_grams_are_dropped(encoder: InstructionEncoder) -> None:
    whole, other = encoder(["brighten the photo", "sharpen the photo"])
    generator = torch.Generator().manual_seed(0)
    closer = [
        bool((encoder(["brighten the photo"], dropped=(0.1, generator))[0] - whole).norm() < (other - whole).norm())
        for _ in range(40)
    ]
    assert sum(closer) >= 36


def test_something_stays_of_every_sentence(encoder: InstructionEncoder) -> None:
    """Where nothing would be left, everything is: another word would be a lie."""
    tokens = encoder([*SENTENCES, ""], dropped=(1.0, torch.Generator().manual_seed(0)))
    assert torch.equal(tokens, encoder([*SENTENCES, ""]))


def test_tokens_are_drawn_towards_what_is_typical(encoder: InstructionEncoder) -> None:
    """A sentence that is surely taken for the second label, without strength, ends next to that label's centre."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        encoder.centres.normal_(generator=generator)
        encoder.degree_centres.normal_(generator=generator)
        encoder.classify.bias += torch.tensor([0.0, 100.0])
        encoder.grade.bias += torch.tensor([0.0, 100.0, 0.0])
    read, settled = encoder.read_words(SENTENCES), encoder(SENTENCES)
    typical = (encoder.centres[1] + encoder.degree_centres[1]).expand_as(read)
    torch.testing.assert_close(settled, (1 - SETTLED) * read + SETTLED * typical)
    assert torch.equal(encoder.settled(read, encoder.phrase_logits(SENTENCES)), settled)


def test_centres_are_learned_without_moving_the_words(encoder: InstructionEncoder) -> None:
    encoder.requires_grad_(True)
    labels, degrees = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 2])
    optimizer = torch.optim.SGD([encoder.centres, encoder.degree_centres], lr=10.0)
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward(encoder.off_centre(encoder.read_words(SENTENCES), labels, degrees))
        optimizer.step()
    assert encoder.table.weight.grad is None
    read = encoder.read_words(SENTENCES)
    torch.testing.assert_close(encoder.centres[0] + encoder.degree_centres[1], read[:2].mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(encoder.centres[1] + encoder.degree_centres[2], read[2], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"labels": ("a",)}, "labels"), ({"labels": ("a", "a")}, "labels"), ({"labels": LABELS, "heads": 3}, "width")],
)
def test_config_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        InstructionConfig(**fields)
