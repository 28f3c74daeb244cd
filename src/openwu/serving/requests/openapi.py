"""What the OpenAPI schema says of bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

from openwu.serving.requests.forms import MAX_EXAMPLES
from openwu.serving.requests.schema import EXAMPLES, FORMATS, MAX_N, METADATA

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
    "seed": {"type": "integer", "minimum": 0},
    "then": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
    "allow_out_of_scope": {"type": "boolean", "default": False},
    "adapter": {"type": "string", "description": "Id of an adapter of yours, used instead of generating one"},
    "metadata": {"type": "string", "enum": list(METADATA), "default": METADATA[0]},
}
_FILE = {"type": "string", "format": "binary"}
_URL = {"type": "object", "required": ["image_url"], "properties": {"image_url": {"type": "string"}}}


def _body(pictures: str, picture: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a body, by the name and the kind of its pictures."""
    own = {"type": "array", "items": picture, "minItems": 1, "maxItems": 16}
    pairs = {name: {"type": "array", "items": picture, "maxItems": MAX_EXAMPLES} for name in EXAMPLES}
    properties = {pictures: own, "mask": picture, **pairs, **_FIELDS}
    return {"schema": {"type": "object", "required": [pictures], "properties": properties}}


EDIT_OPERATION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": _body("image", _FILE),
            "application/json": _body("images", _URL),
        },
    }
}
