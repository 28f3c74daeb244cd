"""Check the fields of an edit request, and make tasks of them.

Every field is either served, or refused by name, or named in `openwu.ignored` of the answer; none is dropped silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from openwu.serving.engines import Metadata
from openwu.serving.errors import refused, unsupported

FORMATS = ("png", "jpeg", "webp")
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
METADATA = ("no_location", "keep", "strip")
IGNORED = ("quality", "input_fidelity", "moderation", "complexity")
"""Fields that clients send out of habit and that change nothing here."""
EXAMPLES = ("example_before", "example_after")
"""Parts with the pictures of a pair that shows an edit."""
LABELS = ("user", "safety_identifier")
"""Fields that are about the caller, not about the picture."""
FIELDS = (
    *("model", "prompt", "n", "size", "output_format", "output_compression", "background", "response_format", "stream"),
    *("partial_images", "strength", "seed", "then", "allow_out_of_scope", "adapter", "metadata"),
    *IGNORED,
    *LABELS,
)
ADAPTER_FIELDS = ("prompt", "image", *EXAMPLES, "model", "seed", "allow_out_of_scope", *LABELS)
"""Fields and pictures of the request that generates an adapter."""
MAX_N, MAX_THEN, MAX_REFERENCES = 10, 8, 15
MAX_SIDE, MIN_SIDE = 8192, 16
MAX_SEED = 2**63 - 1
FURTHER_SHARE = 0.1
"""Work on a pixel that is not edited, as a share of that on one that is."""
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")

Values = Mapping[str, Sequence[object]]
"""Name -> what was sent under it: strings of a form, or JSON values."""


@dataclass(frozen=True)
class EditSpec:
    """A checked edit request."""

    prompt: str
    images: tuple[bytes, ...]
    mask: bytes | None = None
    examples: tuple[tuple[bytes, bytes], ...] = ()
    """Pairs before and after an edit that is shown."""
    model: str | None = None
    n: int = 1
    size: tuple[int, int] | None = None
    output_format: str = "png"
    compression: int | None = None
    opaque: bool = False
    as_url: bool = False
    stream: bool = False
    strength: float = 1.0
    seed: int | None = None
    """None: the base's default."""
    then: tuple[str, ...] = ()
    allow_out_of_scope: bool = False
    adapter: str | None = None
    metadata: Metadata = "no_location"
    background: str = "auto"
    ignored: tuple[str, ...] = field(default=())


def edit_spec(
    values: Values,
    images: Sequence[bytes],
    mask: bytes | None = None,
    examples: Sequence[tuple[bytes, bytes]] = (),
) -> EditSpec:
    """Check all fields. Raises ServiceError that names the first one that is wrong."""
    for name in values:
        if name not in FIELDS:
            raise unsupported(name[:64], f"{name[:64]}: expected one of {', '.join(FIELDS)}; leave it out")
    if not images:
        raise refused(400, "missing_parameter", "image: expected the picture to edit, got none", "image")
    if len(images) > 1 + MAX_REFERENCES:
        raise refused(400, "too_many_images", f"image: expected at most 16 pictures, got {len(images)}", "image")
    if any(not data for data in images):
        raise refused(400, "invalid_image", "image: expected a picture, got an empty file", "image")
    adapter = _text(values, "adapter")
    prompt = _text(values, "prompt") or ""
    if not prompt.strip() and adapter is None and not examples:
        raise refused(400, "missing_parameter", "prompt: expected what to do, got nothing", "prompt")
    if examples and adapter is not None:
        raise unsupported("example_before", "example_before: expected none beside an adapter; leave one of them out")
    output_format = _choice(values, "output_format", FORMATS)
    compression = _whole(values, "output_compression", 0, 100)
    if compression is not None and output_format == "png" and compression != 100:
        raise unsupported("output_compression", "output_compression: expected with jpeg or webp; PNG is lossless")
    background = _choice(values, "background", ("auto", "opaque", "transparent"))
    if background == "transparent" and output_format == "jpeg":
        raise unsupported("background", "background: JPEG has no transparency; use png or webp")
    if background == "transparent":
        raise unsupported("background", "background: this model removes no backgrounds; use auto, which keeps yours")
    then = tuple(_texts(values, "then"))
    if len(then) > MAX_THEN:
        raise unsupported("then", f"then: expected at most {MAX_THEN} instructions, got {len(then)}")
    if then and (adapter is not None or examples):
        other = "an example" if examples else "an adapter"
        raise unsupported("then", f"then: expected nothing beside {other}, which is complete; leave it out")
    partial = _whole(values, "partial_images", 0, 3)
    ignored = [name for name in IGNORED if name in values]
    return EditSpec(
        prompt=prompt,
        images=tuple(images),
        mask=mask,
        examples=tuple(examples),
        model=_text(values, "model"),
        n=_whole(values, "n", 1, MAX_N) or 1,
        size=_size(values),
        output_format=output_format,
        compression=None if output_format == "png" else compression,
        opaque=background == "opaque",
        as_url=_choice(values, "response_format", ("b64_json", "url")) == "url",
        stream=_flag(values, "stream"),
        strength=_number(values, "strength", -4.0, 4.0, 1.0),
        seed=_whole(values, "seed", 0, MAX_SEED - MAX_N),
        then=then,
        allow_out_of_scope=_flag(values, "allow_out_of_scope"),
        adapter=adapter,
        metadata=cast(Metadata, _choice(values, "metadata", METADATA)),
        background=background,
        ignored=(*ignored, *(["partial_images"] if partial else [])),
    )


def cost_of(pixels: int, passes: int = 1, further: int = 0) -> float:
    """Return the work of a task, known before it runs: megapixels x passes, and what every request takes.

    `further`: pixels that are only decoded, scaled or encoded (references, masks, examples, a larger answer). Steps do
    not count: all requests of a service take as many, and its speed is measured.
    """
    return 0.05 + pixels / 1e6 * passes + FURTHER_SHARE * further / 1e6


def _one(values: Values, name: str) -> object:
    given = values.get(name, ())
    if len(given) > 1:
        raise refused(400, "invalid_value", f"{name}: expected one value, got {len(given)}", name)
    return given[0] if given else None


def _text(values: Values, name: str) -> str | None:
    value = _one(values, name)
    if value is not None and not isinstance(value, str):
        raise refused(400, "invalid_value", f"{name}: expected text, got {type(value).__name__}", name)
    return value


def _texts(values: Values, name: str) -> list[str]:
    texts = []
    for value in values.get(name, ()):
        if not isinstance(value, str):
            raise refused(400, "invalid_value", f"{name}: expected texts, got {type(value).__name__}", name)
        texts.append(value)
    return texts


def _choice(values: Values, name: str, choices: Sequence[str]) -> str:
    """One of some words; the first where the field is missing."""
    value = _text(values, name)
    if value is None or value == "":
        return choices[0]
    if value not in choices:
        raise unsupported(name, f"{name}: expected one of {', '.join(choices)}, got {value[:40]!r}")
    return value


def _flag(values: Values, name: str) -> bool:
    value = _one(values, name)
    if value is None or isinstance(value, bool):
        return bool(value)
    words = {"true": True, "1": True, "false": False, "0": False, "": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise refused(400, "invalid_value", f"{name}: expected true or false, got {str(value)[:40]!r}", name)
    return words[value.lower()]


def _number(values: Values, name: str, low: float, high: float, default: float) -> float:
    value = _one(values, name)
    if value is None or value == "":
        return default
    try:
        number = math.nan if isinstance(value, bool) else float(cast(str, value))
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        message = f"{name}: expected a number from {low:g} to {high:g}, got {str(value)[:40]!r}"
        raise refused(400, "invalid_value", message, name)
    return number


def _whole(values: Values, name: str, low: int, high: int) -> int | None:
    value = _one(values, name)
    if value is None or value == "":
        return None
    number = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value.strip()):
        number = int(value)
    if number is None or not low <= number <= high:
        message = f"{name}: expected a whole number from {low} to {high}, got {str(value)[:40]!r}"
        raise refused(400, "invalid_value", message, name)
    return number


def _size(values: Values) -> tuple[int, int] | None:
    value = _text(values, "size")
    if value in (None, "", "auto"):
        return None
    found = _SIZE.fullmatch(value or "")
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        message = f"size: expected auto or WIDTHxHEIGHT of {MIN_SIDE} to {MAX_SIDE} each, got {str(value)[:40]!r}"
        raise unsupported("size", message)
    return size
