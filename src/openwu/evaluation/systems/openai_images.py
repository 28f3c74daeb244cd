"""Editors behind `POST /v1/images/edits`: GPT Image, and every server that speaks the same, ours included."""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image

from openwu.errors import OpenwuError, PictureError
from openwu.evaluation.cases import Case
from openwu.evaluation.http import CallError, Endpoint, Form
from openwu.evaluation.systems import System, SystemOptions
from openwu.images import read_picture


def remote(options: SystemOptions, url: str, key_variable: str, header: str = "Authorization") -> Endpoint:
    """Return the endpoint of a system: the user's, or else its maker's."""
    local = Endpoint(options.url or url).is_local
    variable = options.key_variable or (None if local else key_variable)
    prefix = "Bearer " if header == "Authorization" else ""
    return Endpoint(options.url or url, variable, header, prefix, options.timeout)


class OpenAIImages(System):
    """Sends pictures and instruction as a multipart form, and reads one picture in base64."""

    def __init__(self, name: str, model: str, endpoint: Endpoint, workers: int = 1) -> None:
        self.name, self.model, self.endpoint, self.workers = name, model, endpoint, workers
        self.is_paid = not endpoint.is_local

    def identity(self) -> dict[str, object]:
        return {"kind": "images/edits", "model": self.model, "endpoint": self.endpoint.public_url}

    def check(self) -> None:
        self.endpoint.key()

    def edit(self, case: Case) -> Image.Image:
        field = "image" if len(case.pictures) == 1 else "image[]"
        files = [(field, (f"{i}.png", png(case.image(i)), "image/png")) for i in range(len(case.pictures))]
        fields = {"model": self.model, "prompt": case.instruction, "n": "1"}
        if not self.model.startswith("gpt-image"):  # GPT Image answers in base64 alone, and refuses the field
            fields["response_format"] = "b64_json"
        found = self.endpoint.post("/images/edits", form=Form(fields, files)).get("data")
        if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
            raise CallError(f"{self.name}: expected one picture in data, got {_amount(found)}")
        return decoded(found[0].get("b64_json"), self.name)


def png(image: Image.Image) -> bytes:
    """Encode a picture as PNG without metadata."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def decoded(data: object, name: str) -> Image.Image:
    """Decode a picture in base64. Raises CallError for what is none."""
    if not isinstance(data, str) or not data:
        raise CallError(f"{name}: expected a picture in base64, got {type(data).__name__}")
    try:
        return read_picture(base64.b64decode(data, validate=True)).to_image()
    except (binascii.Error, ValueError, PictureError) as error:
        raise CallError(f"{name}: expected a picture in base64, got what cannot be read ({error})") from error


def _amount(found: object) -> str:
    return f"{len(found)}" if isinstance(found, list) else type(found).__name__


def gpt_image_15(options: SystemOptions) -> OpenAIImages:
    """GPT Image 1.5."""
    return _gpt(options, "gpt-image-1.5")


def gpt_image_2(options: SystemOptions) -> OpenAIImages:
    """GPT Image 2."""
    return _gpt(options, "gpt-image-2")


def _gpt(options: SystemOptions, model: str) -> OpenAIImages:
    endpoint = remote(options, "https://api.openai.com/v1", "OPENAI_API_KEY")
    return OpenAIImages(options.name, options.model or model, endpoint, options.workers)


def compatible(options: SystemOptions) -> OpenAIImages:
    """Any server that answers `POST {url}/images/edits`. Raises OpenwuError without an address."""
    if options.url is None:
        raise OpenwuError("openai-compatible: expected --endpoint URL, got none")
    endpoint = Endpoint(options.url, options.key_variable, timeout=options.timeout)
    return OpenAIImages(options.name, options.model or "openwu", endpoint, options.workers)
