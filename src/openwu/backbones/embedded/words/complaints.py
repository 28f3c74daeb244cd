"""Complaints and single words: "too yellow", "underexposed", 颜色太淡, 清晰一点 -> the edits that cure or do them.

A complaint names what is wrong with a picture, and an encoder that counts words takes it for a wish to have more of
that. These rules read only sentences that are a complaint from the first word to the last, English or Chinese; every
entry lists the edits that cure it, the usual one first. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from openwu.backbones.embedded.words.language import word_set

Cure = tuple[str, ...]

_DARKER: Cure = ("darken", "recover_highlights")
_BRIGHTER: Cure = ("brighten", "lift_shadows")
_CRISPER: Cure = ("deblur", "sharpen", "remove_motion_blur")
_CLEARER: Cure = ("sharpen", "deblur")
_SOFTER: Cure = ("soften", "blur")
_BALANCED: Cure = ("white_balance",)
_WARMER: Cure = ("warm", "white_balance")
_COOLER: Cure = ("cool", "white_balance")
_RICHER: Cure = ("saturate", "unfade")
_PALER: Cure = ("desaturate",)
_PUNCHIER: Cure = ("contrast_up", "hdr")
_GENTLER: Cure = ("contrast_down",)
_CLEANER: Cure = ("denoise", "remove_salt_pepper", "remove_jpeg")
_LIFTED: Cure = ("dehaze", "contrast_up")


def _table(*rows: tuple[str, Cure]) -> Mapping[str, Cure]:
    return {word.replace("_", " "): cure for words, cure in rows for word in words.split()}


_TOO = _table(
    ("bright light overexposed blown_out white hot", _DARKER),
    ("dark dim gloomy murky underexposed black shadowy", _BRIGHTER),
    ("yellow orange", _COOLER[1:] + _COOLER[:1]),
    ("blue bluish cyan", _WARMER[1:] + _WARMER[:1]),
    ("green greenish magenta red reddish purple pink yellowish", _BALANCED),
    ("cold cool chilly", _WARMER),
    ("warm", _COOLER),
    ("flat", _PUNCHIER),
    ("contrasty harsh", _GENTLER),
    ("dull pale colourless colorless drab muted desaturated", (*_RICHER, *_PUNCHIER)),
    ("colourful colorful saturated oversaturated vivid vibrant garish gaudy", _PALER),
    ("dry", ("rain",)),
    ("blurry blurred fuzzy unsharp out_of_focus", _CRISPER),
    ("soft", (*_CLEARER, *_CRISPER)),
    ("sharp crisp", _SOFTER),
    ("noisy grainy speckled", _CLEANER),
    ("hazy foggy misty", _LIFTED),
    ("washed_out faded", ("unfade", *_PUNCHIER, *_RICHER, "dehaze")),
)
"""Adjective -> cure, behind "too" or "so"."""
_FAULTY = word_set(
    "overexposed underexposed dark dim gloomy murky flat dull pale drab blurry blurred fuzzy unsharp noisy grainy "
    "speckled hazy faded cold chilly bluish yellowish greenish reddish orange yellow green blue red purple magenta"
) | {"out of focus", "washed out", "blown out"}
"""Adjectives that complain without "too" where they describe the picture: "it looks flat"."""
_UNWANTED = frozenset({"underexposed", "overexposed", "oversaturated"})
"""Adjectives that nobody wishes for: complaints without any other word."""
_MUCH = _table(
    ("contrast", _GENTLER),
    ("saturation colour color", _PALER),
    ("noise grain", _CLEANER),
    ("haze fog mist", _LIFTED),
    ("light brightness exposure", _DARKER),
    ("blur", _CRISPER),
    ("sharpness sharpening", _SOFTER),
    ("vignette vignetting", ("remove_vignette",)),
    ("shadow darkness", _BRIGHTER),
)
_LITTLE = _table(
    ("contrast punch contrasty punchy", _PUNCHIER),
    ("saturation colour color colourful colorful saturated vivid vibrant", _RICHER),
    ("light brightness exposure bright exposed", _BRIGHTER),
    ("sharpness clarity sharp clear crisp", _CLEARER + _CRISPER),
    ("warmth warm", _WARMER),
    ("dark", _DARKER),
    ("cool cold", _COOLER),
)
"""Noun or adjective -> cure, where a picture has too little of it."""
_GOAL = _table(
    ("sharp sharper crisp crisper in_focus", (*_CLEARER, *_CRISPER)),
    ("clear clearer", (*_CLEARER, *_CRISPER, "dehaze")),
    ("soft softer", _SOFTER),
    ("bright brighter light lighter", _BRIGHTER),
    ("dark darker", _DARKER),
    ("warm warmer", _WARMER),
    ("cool cooler cold colder", _COOLER),
    ("contrasty punchy punchier", _PUNCHIER),
    ("vivid vibrant colourful colorful saturated lively", (*_RICHER, "unfade")),
    ("muted pale subdued", _PALER),
    ("clean cleaner smooth smoother", _CLEANER),
    ("natural neutral normal right good fine", tuple(dict.fromkeys(each for cure in _TOO.values() for each in cure))),
)
"""Adjective -> what a picture with a fault is to become by its cure: "make the blurred photo sharp"."""
_STATES = word_set(
    "colour color coloured colored colourful colorful clean clear new modern sepia monochrome grey gray greyscale "
    "grayscale day daytime sunny night nighttime sharp crisp old bright dark flat contrasty noisy grainy blurry "
    "blurred foggy hazy"
) | {"black and white", "full colour", "full color", "high contrast", "low contrast"}
"""What a picture may be before it is made something else."""
_BECOME = _table(
    ("black_and_white monochrome greyscale grayscale b&w bw", ("black_and_white",)),
    ("sepia", ("sepia",)),
    ("colour color coloured colored full_colour full_color", ("colourise",)),
    ("noisy grainy", ("add_noise",)),
    ("foggy misty hazy", ("fog",)),
    ("old vintage aged", ("age",)),
    ("blurry blurred", ("blur", "soften")),
    ("night nighttime", ("night",)),
    ("day daytime", ("day",)),
    ("high_contrast", _PUNCHIER),
    ("low_contrast flat", _GENTLER),
)
"""What a picture in such a state is made, whatever else its state suggests: "turn my colour photo black and white"."""

_SUBJECT = (
    r"(?:(?:(?:the|this|that|my|these|all)\s+)*(?:whole\s+|entire\s+)?(?:photo(?:graph)?|picture|image|pic|shot|snapshot|"
    r"colou?rs?|exposure|light(?:ing)?|scene|every(?:thing|body|one)|tones?|skin|faces?|people|thing|it|this|that|they|"
    r"we|i)(?:['’]?s|['’]?re|['’]?m)?\s+)?"
)
_VERB = (
    r"(?:is|are|was|looks?|looking|seems?|feels?|appears?|(?:came|turned|comes|turns) out|has|have|got|"
    r"there(?:['’]s| is))"
)
_ADVERBS = (
    r"(?:(?:a (?:bit|little|tad|touch)|far|much|way|rather|quite|really|very|just|somewhat|slightly|kind of|still)\s+)*"
)
_TOO_EN = re.compile(rf"{_SUBJECT}(?:{_VERB}\s+)?{_ADVERBS}(?:too|overly|so)\s+(?P<word>[a-z ]+)", re.I)
_IS_EN = re.compile(
    rf"(?:{_SUBJECT}{_VERB}|(?:it|this|that|everything)['’]s)\s+{_ADVERBS}(?P<word>[a-z ]+)",
    re.I,
)
_MUCH_EN = re.compile(rf"{_SUBJECT}(?:{_VERB}\s+)?{_ADVERBS}too much\s+(?P<word>[a-z]+)", re.I)
_LITTLE_EN = re.compile(
    rf"{_SUBJECT}(?:{_VERB}\s+)?(?:{_ADVERBS}(?:not enough|too little)\s+(?P<noun>[a-z]+)|"
    r"(?:not|isn['’]?t|aren['’]?t)\s+(?P<word>[a-z]+)\s+enough|(?:lacks?|lacking)\s+(?P<lack>[a-z]+))",
    re.I,
)
_NOT_SO_EN = re.compile(
    r"(?:(?:(?:do\s*n['’]?t|do not|never)\s+make\s+(?:it|this|the \w+)|not|(?:should|must) not be|should\s*n['’]?t be)"
    r"\s+(?:(?:quite|all)\s+)?(?:so|too|that)|"
    r"(?:(?:make|i want|get)\s+(?:it|this|them|(?:the|my) \w+)\s+(?:to\s+)?(?:(?:look|be)\s+)?|"
    r"(?:it|this|(?:the|my) \w+)\s+(?:should|needs? to|must)\s+(?:look|be)\s+)?"
    r"(?:(?:a (?:bit|little|lot)|much)\s+)?less)"
    r"\s+(?P<word>[a-z ]+)",
    re.I,
)
"""What shall be less of a fault: "not so dark", "make it less flat"."""
_MADE_EN = (
    re.compile(
        r"(?:(?:please|pls|can you|could you|would you|now|just)\s+)*"
        r"(?:make|turn|get|change|transform|i want|i need|i['’]d like)\s+(?:(?:the|this|that|my|these|all|an?)\s+)+"
        rf"{_ADVERBS}(?P<fault>[a-z ]+?)\s+"
        r"(?:photo(?:graph)?|picture|image|pic|shot|snapshot|scene|light(?:ing)?|colou?r|tone)s?\s+"
        rf"(?:(?:to\s+)?(?:look|be|appear)\s+|(?:in)?to\s+)?(?:an?\s+|more\s+|nice and\s+)*{_ADVERBS}"
        r"(?P<goal>[a-z& ]+?)(?:\s+(?:one|again|photo|picture|image|scene|shot)s?)?",
        re.I,
    ),
    re.compile(
        r"(?:from\s+)?(?P<fault>[a-z ]+?)(?:\s+(?:photo|picture|image)s?)?\s*(?:->|=>|→|\b(?:in)?to\b)\s*(?:an?\s+)?"
        r"(?P<goal>[a-z& ]+?)(?:\s+(?:one|photo|picture|image)s?)?",
        re.I,
    ),
)
"""A fault, and what it shall become: "make the blurred photo sharp", "from dark to bright"."""
_OFF_EN = re.compile(
    rf"(?:the\s+|these\s+|its\s+|my\s+)?(?:colou?rs?|white balance|skin tones?)\s+{_VERB}\s+{_ADVERBS}"
    r"(?:all\s+|completely\s+)?(?:off|wrong|weird|strange|odd|unnatural|not right)",
    re.I,
)

_TOO_ZH = _table(
    ("亮 曝 白", _DARKER),
    ("暗 黑 昏暗 阴暗 暗淡", _BRIGHTER),
    ("黄 橙 橘", _COOLER[1:] + _COOLER[:1]),
    ("蓝 青", _WARMER[1:] + _WARMER[:1]),
    ("绿 红 紫 粉", _BALANCED),
    ("冷", _WARMER),
    ("暖", _COOLER),
    ("平 平淡", (*_PUNCHIER, *_RICHER)),
    ("灰 灰蒙蒙 雾蒙蒙", (*_LIFTED, "unfade")),
    ("淡 浅 寡淡 不鲜艳", _RICHER),
    ("艳 鲜艳 浓 艳丽", _PALER),
    ("糊 模糊 虚", _CRISPER),
    ("清晰 锐 锐利 清楚", _SOFTER),
    ("硬", _GENTLER),
)
_NOUN_ZH: Mapping[str, tuple[Cure, Cure]] = {
    "曝光": (_DARKER, _BRIGHTER),
    "亮度": (_DARKER, _BRIGHTER),
    "光线": (_DARKER, _BRIGHTER),
    "对比度": (_GENTLER, _PUNCHIER),
    "对比": (_GENTLER, _PUNCHIER),
    "饱和度": (_PALER, _RICHER),
    "锐度": (_SOFTER, _CLEARER + _CRISPER),
    "清晰度": (_SOFTER, _CLEARER + _CRISPER),
    "噪点": (_CLEANER, ("add_noise",)),
    "颗粒": (_CLEANER, ("add_noise",)),
    "噪声": (_CLEANER, ("add_noise",)),
}
"""Quantity -> (cure of too much, cure of too little)."""
_ABOUT_ZH = (
    r"(?:(?:这张|这幅|那张|整张|整个|整体|我的)?(?:照片|图片|相片|图|画面|颜色|色彩|色调|整体|拍得|拍的|看起来|看着|看上去|"
    r"显得|感觉|还是|都)+)?"
)
_END_ZH = r"(?:了|啊|呀|吧|啦|一点|了点|了一点|了些)?"
_TOO_IN_ZH = re.compile(
    rf"(?:{_ABOUT_ZH}(?:太过|过于|太|有点儿?|有些|略微?|(?:不要|别)(?:这么|那么|太))|(?:照片|图片|颜色|色彩|色调|肤色)偏)(?P<word>\w+?){_END_ZH}"
)
_MUCH_ZH = re.compile(rf"{_ABOUT_ZH}(?P<noun>{'|'.join(_NOUN_ZH)})(?:太|过|偏|有点)(?:高|强|大|多|度|重){_END_ZH}")
_LITTLE_ZH = re.compile(
    rf"{_ABOUT_ZH}(?:(?P<noun>{'|'.join(_NOUN_ZH)})(?:不足|不够|(?:太|过|偏|有点)(?:低|弱|小|少|不足|不够)){_END_ZH}|"
    rf"(?:缺乏|缺少)(?P<lack>{'|'.join(_NOUN_ZH)}))"
)
_NOT_ENOUGH_ZH: Mapping[str, Cure] = _table(
    ("亮 明亮", _BRIGHTER),
    ("暗", _DARKER),
    ("清晰 清楚 锐 锐利", _CLEARER + _CRISPER),
    ("鲜艳 艳 浓 饱和", _RICHER),
    ("暖", _WARMER),
    ("冷", _COOLER),
)
_NOT_ENOUGH_IN_ZH = re.compile(rf"{_ABOUT_ZH}(?:不够|不太?)(?P<word>\w+?){_END_ZH}")
_PATTERNS_ZH: tuple[tuple[re.Pattern[str], Cure], ...] = (
    (re.compile(rf"{_ABOUT_ZH}(?:欠曝|曝光欠缺){_END_ZH}"), _BRIGHTER),
    (
        re.compile(
            r".{0,8}?(?:黄黄|绿绿|蓝蓝|红红|青青|紫紫|[发偏][黄绿蓝红青紫])的?[，,]?.{0,2}"
            rf"(?:没食欲|没胃口|难看|不好看|吓人|恶心|不自然|不健康|不正常){_END_ZH}"
        ),
        _BALANCED,
    ),
    (re.compile(rf"{_ABOUT_ZH}(?:过曝|曝过){_END_ZH}"), _DARKER),
    (
        re.compile(
            rf"{_ABOUT_ZH}(?:看不太?清楚?|拍?[糊虚]了|模糊了|失焦了|跑焦了?|脱焦了?|对焦不准|没对上焦|模模糊糊的?){_END_ZH}"
        ),
        _CRISPER,
    ),
    (re.compile(rf"{_ABOUT_ZH}(?:发灰|灰蒙蒙的?|灰灰的?){_END_ZH}"), (*_LIFTED, "unfade")),
    (
        re.compile(
            r"(?:照片|图片|画面)?(?:颜色|色彩|色调|肤色|白平衡)(?:有点|看起来)?"
            rf"(?:不对劲?|失真|怪怪的|奇怪|不正常?|不准确?|偏了){_END_ZH}"
        ),
        _BALANCED,
    ),
    (
        re.compile(
            r"(?:把|让|使|将)?(?:它|这张|那张|我的|整张)?彩色?的?(?:照片|图片|相片|图|画面)?(?:变|变成|变为|改成|转成|转为|调成|处理成)"
            r"(?:单色|黑白|灰度)的?"
        ),
        ("black_and_white",),
    ),
    (
        re.compile(
            r"(?:把|让|使|将)?(?:它|这张|那张|我的|整张)?[很太]?(?:模糊|糊|虚)(?:掉|了)?的?(?:照片|图片|相片|图|画面|地方)?"
            r"(?:再|更加?|变[得成]?|弄得?|处理得?|调得?|做|给我)*(?:清晰|清楚)的?(?:一?[点些]儿?|起来|一下)?"
        ),
        _CRISPER,
    ),
    (
        re.compile(
            r"(?:把|让|使|将)?(?:它|这张|整个)?(?:照片|图片|图|画面|模糊的地方)?"
            r"(?:再|更加?|变得?|弄得?|处理得?|调得?|做|给我)*(?:清晰|清楚)(?:一?[点些]儿?|起来|一下)?"
        ),
        _CLEARER + _CRISPER,
    ),
    (
        re.compile(
            r"(?:把|让|将)?(?:照片|图片|画面)?的?(?:提高|增加|加强|提升|增强|改善)(?:一下|一?[点些])?(?:照片|图片|画面)?的?清晰度"
        ),
        (*_CLEARER, *_CRISPER, "hdr"),
    ),
)
_POLITE = re.compile(
    r"^(?:请你?|帮我|麻烦|(?:hey|hi|sorry|ugh|well|but)\b)[\s,，]*|[\s,，]*(?:please|pls|thanks|谢谢|拜托)$", re.I
)
_WORDS = {
    "bright": "brighten",
    "brighter": "brighten",
    "lighter": "brighten",
    "dark": "darken",
    "darker": "darken",
    "dim": "darken",
    "sharp": "sharpen",
    "sharper": "sharpen",
    "clear": "sharpen",
    "clearer": "sharpen",
    "crisp": "sharpen",
    "warmer": "warm",
    "cooler": "cool",
    "colder": "cool",
    "colourful": "saturate",
    "colorful": "saturate",
    "grain": "add_noise",
    "b&w": "black_and_white",
    "bw": "black_and_white",
    "亮": "brighten",
    "亮点": "brighten",
    "暗": "darken",
    "暗点": "darken",
    "雾": "fog",
    "雨": "rain",
    "雪": "snow",
    "暖": "warm",
    "冷": "cool",
    "黑白": "black_and_white",
}
"""Single words that ask for an edit."""


def cures(sentence: str) -> Cure:
    """Return the edits that cure what a sentence complains about, the usual one first; none for other sentences."""
    text = sentence.strip(" .,!?。，！？~～…")
    for _ in range(2):
        text = _POLITE.sub("", text).strip()
    return _english(" ".join(text.lower().split())) or _chinese(text)


def single_word(sentence: str) -> str | None:
    """Return the edit that a sentence of one word asks for; None for other sentences."""
    return _WORDS.get(sentence.strip(" .,!?。，！？").lower().removesuffix(" please"))


def _english(text: str) -> Cure:
    if text in _UNWANTED:
        return _TOO[text]
    if _OFF_EN.fullmatch(text):
        return _BALANCED
    if found := _MUCH_EN.fullmatch(text):
        return _MUCH.get(found["word"], ())
    if found := _LITTLE_EN.fullmatch(text):
        return _LITTLE.get(found["noun"] or found["word"] or found["lack"], ())
    for pattern in _MADE_EN:
        found = pattern.fullmatch(text)
        goal = _GOAL.get(found["goal"], ()) if found else ()
        if found and (made := tuple(each for each in _TOO.get(found["fault"], ()) if each in goal)):
            return made
        if found and found["fault"] in _STATES and found["goal"] in _BECOME:
            return _BECOME[found["goal"]]
    for pattern, known in ((_NOT_SO_EN, _TOO.keys()), (_TOO_EN, _TOO.keys()), (_IS_EN, _FAULTY)):
        found = pattern.fullmatch(text)
        if found and found["word"] in known:
            return _TOO.get(found["word"], ())
        both = found["word"].split(" and ") if found else []
        if len(both) == 2 and set(both) <= set(known):  # "cold and blue" is one fault, "dark and blurry" are two
            return tuple(each for each in _TOO[both[0]] if each in _TOO[both[1]])
    return ()


def _chinese(text: str) -> Cure:
    for pattern, cure in _PATTERNS_ZH:
        if pattern.fullmatch(text):
            return cure
    if found := _MUCH_ZH.fullmatch(text):
        return _NOUN_ZH[found["noun"]][0]
    if found := _LITTLE_ZH.fullmatch(text):
        return _NOUN_ZH[found["noun"] or found["lack"]][1]
    found = _NOT_ENOUGH_IN_ZH.fullmatch(text)
    if found and found["word"] in _NOT_ENOUGH_ZH:
        return _NOT_ENOUGH_ZH[found["word"]]
    found = _TOO_IN_ZH.fullmatch(text)
    return _TOO_ZH.get(found["word"], ()) if found else ()
