"""Reading sentences: words, hashes, independence of the batch, closeness of mistyped words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openwu.condition.instruction import InstructionConfig, InstructionEncoder, hash_words, split_words, word_grams

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


def test_a_mistyped_word_stays_closer_than_another_one(encoder: InstructionEncoder) -> None:
    right, mistyped, other = encoder(["brighten the photo", "brihgten the photo", "sharpen the photo"])
    assert (right - mistyped).norm() < 0.9 * (right - other).norm()


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"labels": ("a",)}, "labels"), ({"labels": ("a", "a")}, "labels"), ({"labels": LABELS, "heads": 3}, "width")],
)
def test_config_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        InstructionConfig(**fields)
