"""Words for parts of a picture, for what shall stay as it is or is not asked for, and the edits that obey them."""

from __future__ import annotations

import re

from openwu.backbones.embedded.words.language import word_set

LOCAL = word_set(
    "lift_shadows recover_highlights vignette remove_vignette tilt_shift hdr hue_shift take_palette "
    "take_tone take_grain take_style take_light take_sharpness take_cast"
)
"""Edits that concern part of the tones, the frame or another picture by themselves."""
REGION = (
    r"(?:sky|clouds?|faces?|person|people|man|woman|men|women|boy|girl|child|kids?|baby|bride|groom|dog|cat|horse|bird|"
    r"background|foreground|subject|cars?|house|building|houses|buildings|trees?|flowers?|grass|water|sea|lake|river|"
    r"mountains?|hair|eyes?|skin|lips|teeth|hands?|dress|shirt|jacket|hat|left|right|top|bottom|upper|lower|wall|floor|"
    r"window|door|text|sign|logo|table|chair|food|road|street|beach|sand|ground|object|part|area|side|half)"
)
_REGION_ZH = (
    r"(?:天空?|地面|脸|人|背景|前景|主体|头发|眼睛|皮肤|衣服|裙子?|衬衫|车|房子?|花|草地?|水面?|树|山|海|湖|墙|鞋|"
    r"门|窗|路|狗|猫|杯子?|T恤|嘴唇|月亮)"
)
_COLOURS = word_set(
    "warm cool sepia black_and_white colourise invert hue_shift tint_red tint_green tint_blue tint_purple "
    "white_balance age fade pencil charcoal halftone cross_stitch neon blueprint sunset night day "
    "take_palette take_style take_cast"
)
_LIGHT = word_set("brighten darken lift_shadows recover_highlights hdr invert night day sunset take_light take_tone")
KEEPS: tuple[tuple[re.Pattern[str], frozenset[str]], ...] = (
    (re.compile(r"\b(?:colou?rs?|hues?)\b|颜色|色彩", re.I), _COLOURS),
    (re.compile(r"\bsaturation\b|饱和度", re.I), _COLOURS | {"saturate", "desaturate", "unfade"}),
    (re.compile(r"\b(?:brightness|exposure|lightness)\b|亮度", re.I), _LIGHT),
    (re.compile(r"\bcontrast\b|对比", re.I), word_set("contrast_up contrast_down hdr unfade fade invert take_tone")),
    (re.compile(r"\b(?:rest|others?|everything else)\b|其[他它余]|别的|剩下", re.I), frozenset()),
)
"""What a sentence may ask to keep as it is, and the edits that would change it."""
_KEPT = (
    r"(?:colou?rs?|hues?|saturation|brightness|exposure|lightness|contrast|rest|others?|everything else|"
    rf"{REGION[3:-1]})"
)
_THE = r"(?:the|his|her|its|my|our|their|this|that|these|those|all|original|other)"
PARTS = (
    re.compile(
        rf"\b(?:except|apart from|other than|aside from|excluding)\b(?: for)?(?: {_THE})* (?:\w+ )?{_KEPT}\b", re.I
    ),
    re.compile(rf"(?<!not )\b(?:only|just)\b(?: on| in| at| to)? {_THE} (?:\w+ )?{REGION}\b", re.I),
    re.compile(rf"(?<!not )\b(?:only|just)\b(?: the)? {REGION}\b", re.I),
    re.compile(rf"\bbut not(?: {_THE})* (?:\w+ )?{REGION}\b|\b{_THE} (?:\w+ )?{REGION} (?:alone|only)\b", re.I),
    re.compile(rf"\b(?:more|less|no) light on {_THE} {REGION}\b", re.I),
    re.compile(
        r"(?:左|右|上|下)(?:面|边)?(?:的?一半|半边|半部分).{0,8}[调变改弄加做]|"
        r"(?:左|右|上|下)[边面侧].{0,6}(?:别动|不动|不要动|别变|不变)"
    ),
    re.compile(rf"{_REGION_ZH}.{{0,4}}(?:别[变动碰]|不要[动变])|(?:别|不要)[动碰].{{0,4}}(?:其[他它余]|别的)"),
    re.compile(rf"{_REGION_ZH}.*(?:别的|其[他它余]|剩下).{{0,3}}(?:别动|不动|不变|别碰|不要[动变])"),
    re.compile(rf"{_REGION_ZH}(?:不要动|别动|不动|保持不变|不要变)"),
    re.compile(r"除了.{1,8}(?:以外|之外|外|都|其[他它余])|.{1,4}以外"),
    re.compile(
        r"(?<!不)只(?!剩)(?:把|让|给|对|将|改|动|在)?.{0,3}(?:天空?|脸|人物?|背景|前景|主体|左|右|"
        r"上半|下半|头发|眼睛|皮肤|衣服|车|房子|花|草|水|树)"
    ),
)
"""Sentences that ask for a part of the picture."""
KEEPING = (
    re.compile(
        rf"(?:\b(?:but|and|while)\s+)?\b(?:keep|keeping|leave|leaving|preserve|preserving|without (?:changing|touching|"
        rf"affecting)|don['’]?t (?:touch|change)|do not (?:touch|change))\b(?: {_THE})+ (?:\w+ )?(?P<kept>{_KEPT})\b"
        r"(?: (?:as (?:they are|it is|is|before)|the same|unchanged|alone|intact|vivid|bright|strong|rich|natural))?",
        re.I,
    ),
    re.compile(
        r"(?:但是?|而且|并且?)?(?:还|也)?(?:保持|保留|不要动|别动|不动|不改变?|别改)(?:住|原来的?|原有的?)?"
        r"(?P<kept>颜色|色彩|亮度|对比度?|饱和度|背景|人物?|脸|天空|其[他它余])(?:不变|不动)?"
    ),
    re.compile(
        r"(?:但是?|而且|并且?)?(?P<kept>其[他它余]|别的|剩下|颜色|色彩|亮度|对比度?|饱和度|背景|人物?|脸|天空)"
        r".{0,4}?(?:不变|别动|不动|不要动|不用[动调改]|别碰|保持不变|别改|不改|保持)"
    ),
)
"""Sentences that ask to keep something as it is."""
REJECTED = re.compile(
    r"[\s,]*\b(?:instead of|rather than)\s+[^,.;:!?]+?"
    r"(?:[,.;:!?]+\s*|$|\s+(?=(?:i|i['’]d|we|please|make|give|turn|can|could|just|do|try)\b))",
    re.IGNORECASE,
)
"""What is not wanted, before or after what is: "instead of sepia I'd like black and white", "warm rather than cool"."""

UNWANTED = re.compile(
    r"[\s,;]*\b(?:but |and )?without (?!changing|touching|affecting)\w+ing\b[^,.;!?]*|"
    r"(?:^|[\s,;]+)(?:but |and )?keep(?:ing)? the (?:rain|snow|fog|mist|haze|noise|grain|vignette|blur|scratches)\b"
    r"(?: as it is)?[,;.]?|"
    r"[，,]?\s*(?:但是?|可是?|又)?(?:不要|(?<![特区个级分辨识告离性类])别(?![人的墅致]))(?:再|更)?"
    r"(?![太过动变改碰调给让把])[^，,。；;！!？? 太过]{1,6}(?=[。！!]*$)",
    re.IGNORECASE,
)
"""What shall not happen beside what is wanted: "denoise without blurring", 去噪但别磨皮."""
LIMIT = re.compile(r"[\s,;]*\bbut not (?:too|so|that) \w+(?=[\s.!?]*$)", re.IGNORECASE)
"""How far a wish goes, said with a word of its own: "warmer, but not too warm"."""
DENIED: tuple[tuple[re.Pattern[str], frozenset[str]], ...] = (
    *(
        (
            re.compile(
                rf"\b(?:less|fewer|not (?:so|too|as)|no more|without|too) {english}(?:dish|ish)?\b|"
                rf"(?:少|不要|别|不想|太)(?:一?[点些]|那么|这么|太|再)?{chinese}|偏{chinese}了",
                re.IGNORECASE,
            ),
            frozenset({f"tint_{english}"}),
        )
        for english, chinese in (("red", "红"), ("green", "绿"), ("blue", "蓝"), ("purple", "紫"))
    ),
    (
        re.compile(r"\btoo (?:pale|faded|washed out|dull)\b|太(?:淡|浅|苍白)", re.IGNORECASE),
        frozenset({"fade"}),
    ),
    *(
        (
            re.compile(
                r"\b(?:remove|undo|get rid of|lose|take (?:away|off|out))\s+(?:the\s+|this\s+|that\s+)?"
                rf"(?:{english})\b|"
                rf"\b(?:take|make) (?:the|this|that) (?:{english})\b[^.,;]*\b(?:away|off|out)\b|"
                rf"(?:去掉|去除|移除|取消|消除)(?:这种|那种)?(?:{chinese})",
                re.IGNORECASE,
            ),
            frozenset({edit}),
        )
        for edit, english, chinese in (
            ("sepia", "sepia", "棕褐|怀旧"),
            ("oil", "oil|oily", "油画"),
            ("watercolour", "watercolou?r", "水彩"),
            ("cartoon", "cartoon", "卡通|漫画|动漫"),
            ("pencil", "pencil|sketch", "铅笔|素描"),
            ("charcoal", "charcoal", "炭笔"),
            ("halftone", "halftone", "半调|网点"),
            ("cross_stitch", "cross[ -]stitch", "十字绣"),
            ("emboss", "emboss\\w*", "浮雕"),
            ("neon", "neon", "霓虹"),
            ("sunset", "sunset", "日落|夕阳"),
        )
    ),
)
"""Words for what there shall be less of, or what shall go, and the edits that would bring more."""


_QUALITY = (
    r"(?:contrast|brightness|exposure|saturation|colou?rs?|sharpness|light(?:ing)?|noise|grain|tones?|white balance|"
    r"focus|shadows|highlights)"
)
CONTENT = re.compile(
    rf"(?:^|[\s,;.]+)(?:the |its |my )?{_QUALITY}(?:['’]s| is| are| looks?)(?: already| just| perfectly| totally)? "
    r"(?:fine|ok(?:ay)?|good|great|perfect|all ?right|enough|lovely)(?: as it is| already| now| enough)?"
    r"(?:[,;.]?\s*(?:but|and|just)\b|[,;.]|$)\s*|"
    r"(?:^|[，,。；\s])(?:亮度|对比度?|饱和度?|锐度|清晰度|颜色|色彩|曝光|光线|色温|白平衡)(?:已经|都)?(?:很|挺|蛮)?"
    r"(?:好|可以|行|不错|正好|刚好|没问题|够|合适)(?:了|的)?(?:[，,。；]|$)(?:但是?|就是)?",
    re.IGNORECASE,
)
"""What is said to be good as it is: "the sharpness is fine", 亮度刚好."""
TOLD = re.compile(
    r"[,;.]\s*(?:because |as |since )?(?:i|we|it|she|he|they)(?:['’]ve| have)? (?:took|shot|made|was|were|got|had|"
    r"forgot|visited|photographed)\b(?:(?!\b(?:please|too|so|need|want|but|should|looks?)\b)[^,.;!?])*[.!?]*$|"
    r"[，,。]\s*(?:这是|是|因为)?[^，,。太想要不]{0,10}(?:拍的|照的)[。！]*$",
    re.IGNORECASE,
)
"""Where and when a picture was taken, behind a command: "brighten it, I took it at night"."""
