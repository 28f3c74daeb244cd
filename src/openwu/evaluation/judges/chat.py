"""A vision-language model behind an OpenAI-compatible endpoint, as the one who answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from openwu.evaluation.http import CallError, CallRefusedError, Endpoint
from openwu.evaluation.judges import (
    EDITED,
    FAILED,
    FIRST,
    REFERENCE,
    REFUSED,
    SECOND,
    SOURCE,
    TARGET,
    Answer,
    Question,
    Respondent,
)
from openwu.evaluation.stages.record import UNPARSED, StoredCase

CAPTIONS = {
    SOURCE: "Picture before the edit:",
    REFERENCE: "Second picture of the request:",
    EDITED: "Picture after the edit:",
    FIRST: "First edited picture:",
    SECOND: "Second edited picture:",
    TARGET: "Picture as it should be:",
}
PREPARED = "png, at the source's size"
"""How pictures are sent; part of every key."""


class ChatModel(Respondent):
    """Asks `POST {url}/chat/completions` with `response_format: json_schema`, at temperature 0."""

    def __init__(self, endpoint: Endpoint, model: str, *, max_tokens: int = 1024, use_schema: bool = True) -> None:
        """`use_schema`: False for servers that do not know `response_format`; the parser is as strict either way."""
        self.endpoint, self.model, self.max_tokens, self.use_schema = endpoint, model, max_tokens, use_schema
        self.name = model
        self.is_paid = not endpoint.is_local

    def identity(self) -> dict[str, object]:
        return {
            "model": self.model,
            "endpoint": self.endpoint.public_url,
            "max_tokens": self.max_tokens,
            "schema": self.use_schema,
            "temperature": 0,
            "pictures": PREPARED,
        }

    def check(self) -> None:
        self.endpoint.key()

    def answer(self, question: Question, _case: StoredCase, pictures: Mapping[str, Image.Image], /) -> Answer:
        try:
            reply = self.endpoint.post("/chat/completions", body=self._body(question, pictures))
        except CallRefusedError as error:
            return Answer(REFUSED, note=str(error))
        except CallError as error:
            return Answer(FAILED, note=str(error))
        return read_reply(question, reply)

    def _body(self, question: Question, pictures: Mapping[str, Image.Image]) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
        for name in question.shows:
            content.append({"type": "text", "text": CAPTIONS[name]})
            content.append({"type": "image_url", "image_url": {"url": data_url(pictures[name])}})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        if self.use_schema:
            schema = {"name": question.name.replace("-", "_"), "strict": True, "schema": question.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


def read_reply(question: Question, reply: Mapping[str, Any]) -> Answer:
    """Read a chat completion: refusals and cut-off or doubled answers are told apart from scores."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return Answer(UNPARSED, reply=str(reply)[:2000], note="expected one choice")
    message, reason = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict):
        return Answer(UNPARSED, reply=str(reply)[:2000], note="expected a message")
    if message.get("refusal") or reason == "content_filter":
        return Answer(REFUSED, reply=str(message.get("refusal") or ""), note=f"finish_reason {reason!r}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        return Answer(UNPARSED, reply=str(reply)[:2000], note="expected text")
    if reason == "length":
        return Answer(UNPARSED, reply=content, note="the answer was cut off; raise --max-tokens")
    return question.parse(content)


def data_url(image: Image.Image) -> str:
    """Encode a picture as a PNG data URL, without metadata."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
