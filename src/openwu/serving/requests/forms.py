"""Read the body of a request, multipart or JSON, into the fields that `schema` checks."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from openwu.serving.errors import refused, unsupported
from openwu.serving.requests.schema import EXAMPLES

MAX_FILES, MAX_FIELDS, MAX_FIELD_BYTES, MAX_EXAMPLES = 17, 40, 64 * 2**10, 4
FILES = ("image", "mask", *EXAMPLES)
_SURROGATE = re.compile("[\ud800-\udfff]")
_DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w=.-]+)*;base64,", re.ASCII)


@dataclass
class Body:
    """What a request brought: values and files by their names, in their order, `[]` taken off the names."""

    values: dict[str, list[object]] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)

    def add(self, name: str, value: object) -> None:
        """Keep a value or, where it is bytes, a file. Raises ServiceError for text that no Unicode is."""
        for text in (name, value):
            if isinstance(text, str) and _SURROGATE.search(text):
                message = f"body: expected Unicode text, got {text[:40]!r}; repair its encoding"
                raise refused(400, "invalid_body", message)
        held: dict[str, list[Any]] = self.files if isinstance(value, bytes) else self.values
        held.setdefault(name.removesuffix("[]"), []).append(value)

    def one_file(self, name: str) -> bytes | None:
        """Return the only file of a name; None where there is none. Raises ServiceError where there are several."""
        found = self.files.get(name, [])
        if len(found) > 1:
            raise refused(400, "invalid_value", f"{name}: expected one file, got {len(found)}", name)
        return found[0] if found else None


async def read_body(request: Request) -> Body:
    """Read a body by its declared type. Raises ServiceError: 400 for what cannot be parsed, 415 for another type."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise refused(415, "unsupported_media_type", f"expected a body as it is, got {coding[:60]!r}; send it without")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _multipart(request)
    if kind == "application/json":
        return _from_json(await request.body())
    raise refused(415, "unsupported_media_type", f"expected multipart/form-data or application/json, got {kind[:60]!r}")


class _Form(MultiPartParser):
    """Starlette's parser, which takes a body that was cut off for a whole one: what is missing may be the mask."""

    _ended = False

    def on_end(self) -> None:
        self._ended = True

    async def parse(self) -> FormData:
        async with aclosing(self._whole(self.stream)) as self.stream:
            return await super().parse()

    async def _whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self._ended:
            raise MultiPartException("expected the closing boundary, got a body that was cut off; send it again")


async def _multipart(request: Request) -> Body:
    body = Body()
    try:
        async with aclosing(request.stream()) as stream:
            parser = _Form(
                request.headers, stream, max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
            )
            form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            message = f"image: expected at most {MAX_FILES} files, got more"
            raise refused(400, "too_many_images", message, "image") from error
        raise refused(400, "invalid_body", f"body: {error.message}") from error
    except (ValueError, KeyError, LookupError) as error:
        raise refused(400, "invalid_body", "body: expected multipart/form-data; it could not be parsed") from error
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                plain = name.removesuffix("[]")
                if plain not in FILES:
                    raise unsupported(plain[:64], f"{plain[:64]}: expected no file of this name; leave it out")
                body.add(name, await value.read())
            elif name.removesuffix("[]") in FILES:
                raise refused(400, "invalid_image", f"{name}: expected a file, got text; send it as a file part", name)
            else:
                body.add(name, value)
    finally:
        await form.close()
    return body


def _from_json(data: bytes) -> Body:
    body = Body()
    try:
        fields = json.loads(data, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise refused(400, "invalid_body", "body: expected a JSON object; it could not be parsed") from error
    if not isinstance(fields, dict):
        raise refused(400, "invalid_body", f"body: expected a JSON object, got {type(fields).__name__}")
    for name, value in fields.items():
        if value is None:
            continue
        if name in ("images", "image"):
            entries = value if isinstance(value, list) else [value]
            for entry in entries[: MAX_FILES + 1]:
                body.add("image", picture_of(entry, name))
        elif name in FILES:
            for entry in (value if isinstance(value, list) else [value])[: MAX_FILES + 1]:
                body.add(name, picture_of(entry, name))
        else:
            for entry in value if isinstance(value, list) else [value]:
                body.add(name, entry)
    if len(body.values) > MAX_FIELDS:
        raise refused(400, "invalid_body", f"body: expected at most {MAX_FIELDS} fields, got {len(body.values)}")
    return body


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of its members. Raises ServiceError for a name that comes twice: one of them would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise refused(400, "invalid_value", f"{name[:40]}: expected one value, got {times}", name[:40])
    return found


def picture_of(entry: object, name: str) -> bytes:
    """Decode `{"image_url": "data:..."}` or a data URL. Nothing is ever fetched: other URLs raise ServiceError."""
    url = entry.get("image_url") if isinstance(entry, dict) else entry
    if isinstance(entry, dict) and "file_id" in entry:
        raise unsupported(name, f"{name}: expected the picture itself, got a file_id; send a data URL")
    if isinstance(url, dict):
        url = url.get("url")
    if not isinstance(url, str):
        raise refused(400, "invalid_image", f'{name}: expected {{"image_url": "data:image/png;base64,..."}}', name)
    if url[:8].lower().startswith(("http:", "https:", "file:", "ftp:")):
        raise unsupported(name, f"{name}: expected a data URL; this service fetches no URLs")
    found = _DATA_URL.match(url)
    if found is None:
        raise refused(400, "invalid_image", f"{name}: expected data:image/png;base64,..., got {url[:30]!r}", name)
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(400, "invalid_image", f"{name}: expected base64, got something else: {error}", name) from error


def example_pairs(body: Body) -> list[tuple[bytes, bytes]]:
    """Return the pairs of an edit that is shown, in their order. Raises ServiceError where a picture has no partner."""
    before, after = (body.files.get(name, []) for name in EXAMPLES)
    if len(before) != len(after):
        missing = EXAMPLES[len(before) > len(after)]
        message = f"{missing}: expected as many pictures before as after, got {len(before)} and {len(after)}"
        raise refused(400, "missing_parameter", message, missing)
    if len(before) > MAX_EXAMPLES:
        message = f"example_before: expected at most {MAX_EXAMPLES} pairs, got {len(before)}"
        raise refused(400, "too_many_images", message, "example_before")
    for name, files in zip(EXAMPLES, (before, after), strict=True):
        if any(not data for data in files):
            raise refused(400, "invalid_image", f"{name}: expected a picture, got an empty file", name)
    return list(zip(before, after, strict=True))
