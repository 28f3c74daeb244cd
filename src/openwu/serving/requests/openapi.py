"""What the OpenAPI schema says of bodies that the routes read themselves."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from openwu.serving.requests.forms import FILES, MAX_EXAMPLES
from openwu.serving.requests.schema import (
    ADAPTER_FIELDS,
    EXAMPLES,
    FIELDS,
    FORMATS,
    MAX_N,
    MAX_REFERENCES,
    MAX_SEED,
    MAX_THEN,
    METADATA,
)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for code, text in {
        "4XX": "Refused: the error object says what was expected, what came, and what to do",
        "5XX": "Failed, or not ready",
    }.items()
}
_FIELDS: dict[str, Any] = {
    "prompt": {"type": "string", "maxLength": 500},
    "model": {"type": "string"},
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_N, "default": 1},
    "size": {"type": "string", "pattern": "^(auto|[0-9]{2,4}x[0-9]{2,4})$", "default": "auto"},
    "output_format": {"type": "string", "enum": list(FORMATS), "default": "png"},
    "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
    "background": {"type": "string", "enum": ["auto", "opaque"], "default": "auto"},
    "response_format": {"type": "string", "enum": ["b64_json", "url"], "default": "b64_json"},
    "stream": {"type": "boolean", "default": False},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
    "strength": {"type": "number", "minimum": -4, "maximum": 4, "default": 1},
    "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED - MAX_N},
    "then": {"type": "array", "items": {"type": "string"}, "maxItems": MAX_THEN},
    "allow_out_of_scope": {"type": "boolean", "default": False},
    "adapter": {"type": "string", "description": "Id of an adapter of yours, used instead of generating one"},
    "metadata": {"type": "string", "enum": list(METADATA), "default": METADATA[0]},
}
_FILE = {"type": "string", "format": "binary"}
_URL = {
    "type": "object",
    "required": ["image_url"],
    "properties": {"image_url": {"type": "string", "format": "uri", "description": "A data URL; none is fetched"}},
}


def _operation(names: Collection[str]) -> dict[str, Any]:
    """Return the body of an operation that takes these fields, as multipart and as JSON."""

    def body(pictures: str, picture: dict[str, Any]) -> dict[str, Any]:
        own = {"type": "array", "items": picture, "minItems": 1, "maxItems": 1 + MAX_REFERENCES}
        pairs = {name: {"type": "array", "items": picture, "maxItems": MAX_EXAMPLES} for name in EXAMPLES}
        known = {pictures: own, "mask": picture, **pairs, **_FIELDS}
        properties = {name: each for name, each in known.items() if name in names or name == pictures}
        return {"schema": {"type": "object", "required": [pictures], "properties": properties}}

    content = {"multipart/form-data": body("image", _FILE), "application/json": body("images", _URL)}
    return {"requestBody": {"required": True, "content": content}}


EDIT_OPERATION = _operation(FILES + FIELDS)
"""Of `POST /v1/images/edits`."""
ADAPTER_OPERATION = _operation(ADAPTER_FIELDS)
"""Of `POST /v1/adapters`."""
