"""The page's JavaScript reads sentences as Python does: hashes, and what the rules make of the encoder's readings."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from node import node

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.catalogue import known_edits
from openwu.backbones.embedded.instruction import hash_phrases, hash_words
from openwu.backbones.embedded.understanding import read_wishes
from openwu.backbones.embedded.words.whole import NOTHING, Whole
from openwu.backbones.embedded.words.wishes import Reading
from openwu.data.suite.phrases import load_phrases
from openwu.errors import InstructionError
from openwu.export.embedded.onnx import description
from openwu.export.embedded.rules import javascript, rules
from openwu.images.instruction import check_instruction

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's modules")

ODD = """
don't darken it, brighten it
don't make it darker
please do not add snow
no fog
instead of sepia I'd like black and white
make it warm rather than cool
not too bright
without changing the colours, blur it
make only the sky darker
blur the background
make everything except the face black and white
make it brighter but keep the colours
add fog but leave the brightness as it is
keep the background and add rain
add a vignette but keep the colours
lift the shadows but keep the brightness
take the colours of the other picture but keep the brightness
make it brighter and add grain
blur it, then add snow
brighten then blur
add grain and a vignette
black and white with grain
sharpen it and remove the person on the left
make it 20% brighter
make it 300% brighter
half a stop darker
one stop brighter
reduce the contrast to 80%
increase saturation by 15 percent and add a vignette
too yellow
it looks flat
the photo is overexposed
not sharp enough
make the blurred photo sharp
turn this very blurry image into a sharp one
make the flat photo contrasty
could you make my dark pictures look bright
blurry -> sharp
from cold to warm
make the dark photo black and white
turn my colour photo into b&w
take the sepia away
去掉油画感
from sharp to blurry
彩色照片变单色
让这张模糊的图清楚一点
lacks contrast
the colours are off
don't make it so dark
b&w
grain
tilt shift
sharper please
write my name on it
translate this
make me a sandwich
rends la photo plus lumineuse
mach das Bild heller bitte
сделай ярче
明るくして
先调亮再加颗粒
不要变暗，要变亮
加雨，别加雾
亮度提高百分之二十
对比度降低30%
太暗了
颜色太淡
曝光不足
不够清晰
看不清楚
除了天空都变黑白
保持颜色不变，加暗角
只把天空变暗
帮我把这张照片弄得像老照片一样
清晰一点
雾
take the colours of the other picture
MAKE IT BRIGHTER!!!
  make   it  warmer
café style ☕
make it brighter—and warmer
don’t darken it, brighten it
vignette
1
more contrast less saturation
night scene with rain
too dark and too yellow
油画风格，颜色鲜艳
增加对比度和饱和度
remove the noise, I took it in the rain
pull the whites back, warm the rest up
increase saturation, the sharpness is fine
亮度刚好，饱和度再高一点
brighten it, I took it at night
调亮一点，晚上拍的
make it night, but keep the colours vivid
everybody is so cold and blue
too dark and blurry
too dry
denoise without blurring
更暖一点不要更亮
把噪点去掉但别磨皮
keep the rain, remove the noise
warmer, but not too warm
turn down the warmth and up the contrast
more blue less red
多点蓝少点红
偏红了
the sky is too pale
would this look better in black and white?
饭菜绿绿的没食欲
对比度不用动，锐化一下
is golden hour before or after sunset?
how do i print this on canvas
佳能和索尼哪个噪点少？
怎么这么暗？
why is it so dark?
adding some grain, warming up the tones, and less noise
too dark and too blue
hdr and super saturated
cartoon style, brighter
less haze, more colour. it was a gorgeous morning
20% brighter and a bit warmer, it was a grey day
a touch of grain on it, black and white, vignette
又暗又糊
太暗，还发蓝
水彩的感觉，然后整体柔和一点
十字绣，稍微素一点
亮度加百分之二十，颗粒也来点
not sepia but black and white with a vignette
no blur please, just sharpen it and add a vignette
brighter but not warmer, and sharpen
别加颗粒，变黑白，再加暗角
make it warm without grain, and sharpen it
brighten and warm it, nothing else, no vignette
弄成白天，颜色别太浓
变成卡通的，颜色要特别鲜
I don't want it any lighter overall, only the shadows opened and the noise that comes with that removed.
顏色太濃了很俗欸，淡一點點就好，不要變黑白
""".strip().splitlines()


@pytest.fixture(scope="module")
def base() -> EmbeddedBase:
    folder = EmbeddedBase.bundled_folder()
    assert folder is not None
    return EmbeddedBase.from_pretrained(folder)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """Some phrases of every edit, the examples in Chinese, and odd ones."""
    splits = [split for languages in load_phrases().values() for split in languages.values()]
    phrases = [text for split in splits for texts in split.values() for text in texts]
    examples = [each.examples["zh"] for each in known_edits().values()]
    return [*ODD, *examples, *phrases[:: len(phrases) // 150]]


def test_rows_of_the_table_are_the_same(base: EmbeddedBase, sentences: list[str], tmp_path: Path) -> None:
    code = """
    import { Words } from "./words.js";
    const words = new Words(given.tables, given.config);
    console.log(JSON.stringify(given.sentences.map((each) => {
      const { rows, dims } = words.rows(each);
      return { rows: [...rows].map(Number), dims };
    })));
    """
    given = {"tables": rules()["instruction"], "config": description(base)["instruction"], "sentences": sentences}
    for sentence, found in zip(sentences, node(tmp_path, code, given), strict=True):
        expected = hash_words([sentence], base.config.instruction)
        assert found == {"rows": expected.flatten().tolist(), "dims": list(expected.shape)}, sentence


def test_rows_of_the_phrase_table_are_the_same(base: EmbeddedBase, sentences: list[str], tmp_path: Path) -> None:
    code = """
    import { Words } from "./words.js";
    const words = new Words(given.tables, given.config);
    console.log(JSON.stringify(given.sentences.map((each) => {
      const { rows, dims } = words.phraseRows(each);
      return { rows: [...rows].map(Number), dims };
    })));
    """
    more = [*sentences, "brighten " * 70, "’"]  # more words than are read, and none
    given = {"tables": rules()["instruction"], "config": description(base)["instruction"], "sentences": more}
    for sentence, found in zip(more, node(tmp_path, code, given), strict=True):
        expected = hash_phrases([sentence], base.config.instruction)
        assert sorted(found["rows"]) == sorted(expected[0].tolist()), sentence
        assert found["dims"] == list(expected.shape)


class Heard:
    """Every sentence that the encoder was asked for, and what it took it for."""

    def __init__(self, base: EmbeddedBase) -> None:
        self.base, self.readings = base, dict[str, dict[str, object]]()
        self.places = dict[str, list[list[tuple[str, float]]]]()
        """Of every whole sentence what the page's graph says: (label, probability) of every label at each place."""

    def listen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = self.base.instruction
        readings = encoder.readings

        def heard(sentences: Sequence[str]) -> list[Reading]:
            found = readings(sentences)
            self.readings |= {text: asdict(reading) for text, reading in zip(sentences, found, strict=True)}
            return found

        monkeypatch.setattr(encoder, "readings", heard)
        reader = self.base.sentences
        assert reader is not None
        read = reader.read

        def heard_whole(sentences: Sequence[str]) -> list[Whole]:
            names = (*reader.config.labels, NOTHING)
            rows = reader(reader.hashed(sentences)).exp().tolist()
            for text, row in zip(sentences, rows, strict=True):
                self.places[text] = [list(zip(names, place, strict=True)) for place in row]
            return read(sentences)

        monkeypatch.setattr(reader, "read", heard_whole)


def outcome(base: EmbeddedBase, sentence: str) -> list[list[object]] | None:
    """(edit, text, strength) of every wish; None for a sentence that is refused."""
    accepted = base.config.instruction.accepted
    try:
        found = read_wishes(base.instruction, base.sentences, check_instruction(sentence))
    except InstructionError:
        return None
    withdrawn = base.config.instruction.withdrawn
    if not all(
        wish.reading.is_wish(0 if wish.settled else accepted) and wish.reading.edit not in withdrawn for wish in found
    ):
        return None
    return [[wish.reading.edit, wish.text, round(wish.strength, 9)] for wish in found]


def test_rules_make_the_same_of_sentences(
    base: EmbeddedBase, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
    import { Rules, Refusal } from "./rules.js";
    const encode = async (sentences) => sentences.map((text) => {
      if (!Object.hasOwn(given.readings, text)) throw new Error(`Python never read ${JSON.stringify(text)}`);
      return given.readings[text];
    });
    const { edits, instruction, accepted } = given.model;
    const places = async (text) => given.places[text];
    const rules = new Rules(given.tables, edits, instruction.labels, accepted, encode, places);
    const outcomes = [];
    for (const sentence of given.sentences) {
      try {
        const found = await rules.understand(sentence, true);
        outcomes.push(found.map(({ reading, text, strength }) => [reading.edit, text, Number(strength.toFixed(9))]));
      } catch (error) {
        outcomes.push(error instanceof Refusal ? null : String(error));
      }
    }
    console.log(JSON.stringify(outcomes));
    """
    heard = Heard(base)
    heard.listen(monkeypatch)
    expected = [outcome(base, sentence) for sentence in sentences]
    given: dict[str, object] = {
        "tables": rules(),
        "model": description(base),
        "readings": heard.readings,
        "places": heard.places,
        "sentences": sentences,
    }
    found = node(tmp_path, code, given)
    differing = [each for each in zip(sentences, expected, found, strict=True) if each[1] != each[2]]
    assert not differing
    refused = sum(each is None for each in expected)
    assert refused >= 20
    assert len(expected) - refused >= 200


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"\bfog\b", "雾 fog.", True),
        (r"\bfog\b", "雾fog", False),  # a Chinese character is a letter
        (r"(?P<word>\w+)!", "亮!", True),
        (r"[^\W\d_]+", "42_", False),
        (r"a\-b|n['’]t", "a-b", True),
    ],
)
def test_patterns_mean_the_same(pattern: str, text: str, found: bool, tmp_path: Path) -> None:
    code = 'console.log(JSON.stringify(new RegExp(given.pattern, "u").test(given.text)));'
    assert node(tmp_path, code, {"pattern": javascript(pattern), "text": text}) is found
