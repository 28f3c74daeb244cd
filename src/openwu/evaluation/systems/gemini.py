"""Gemini's image models (Nano Banana) behind `POST /models/{model}:generateContent`."""

from __future__ import annotations

import base64
from typing import Any

from PIL import Image

from openwu.evaluation.cases import Case
from openwu.evaluation.http import CallError, Endpoint
from openwu.evaluation.systems import RefusedError, System, SystemOptions
from openwu.evaluation.systems.openai_images import decoded, png, remote

DECLINED = (
    "SAFETY",
    "IMAGE_SAFETY",
    "PROHIBITED_CONTENT",
    "IMAGE_PROHIBITED_CONTENT",
    "BLOCKLIST",
    "RECITATION",
    "SPII",
)
"""Finish and block reasons that are refusals."""


class Gemini(System):
    """Sends pictures inline, and reads the one picture among the answer's parts."""

    def __init__(self, name: str, model: str, endpoint: Endpoint, workers: int = 1) -> None:
        self.name, self.model, self.endpoint, self.workers = name, model, endpoint, workers
        self.is_paid = not endpoint.is_local

    def identity(self) -> dict[str, object]:
        return {"kind": "generateContent", "model": self.model, "endpoint": self.endpoint.public_url}

    def check(self) -> None:
        self.endpoint.key()

    def edit(self, case: Case) -> Image.Image:
        pictures = [png(case.image(i)) for i in range(len(case.pictures))]
        parts: list[dict[str, Any]] = [
            {"inlineData": {"mimeType": "image/png", "data": base64.b64encode(each).decode()}} for each in pictures
        ]
        body = {
            "contents": [{"role": "user", "parts": [{"text": case.instruction}, *parts]}],
            "generationConfig": {"responseModalities": ["IMAGE"]},
        }
        return self._picture(self.endpoint.post(f"/models/{self.model}:generateContent", body=body))

    def _picture(self, reply: dict[str, Any]) -> Image.Image:
        feedback = reply.get("promptFeedback")
        if isinstance(feedback, dict) and feedback.get("blockReason"):
            raise RefusedError(f"{self.name}: blocked ({feedback['blockReason']})")
        candidates = reply.get("candidates")
        if not isinstance(candidates, list) or len(candidates) != 1 or not isinstance(candidates[0], dict):
            raise CallError(f"{self.name}: expected one candidate")
        if candidates[0].get("finishReason") in DECLINED:
            raise RefusedError(f"{self.name}: refused ({candidates[0]['finishReason']})")
        content = candidates[0].get("content")
        parts = content.get("parts") if isinstance(content, dict) else None
        found = [
            part["inlineData"].get("data")
            for part in (parts if isinstance(parts, list) else [])
            if isinstance(part, dict) and isinstance(part.get("inlineData"), dict) and not part.get("thought")
        ]
        if len(found) != 1:
            raise CallError(f"{self.name}: expected one picture, got {len(found)}")
        return decoded(found[0], self.name)


def nano_banana_2(options: SystemOptions) -> Gemini:
    """Nano Banana 2."""
    return _gemini(options, "gemini-3.1-flash-image-preview")


def nano_banana_pro(options: SystemOptions) -> Gemini:
    """Nano Banana Pro."""
    return _gemini(options, "gemini-3-pro-image-preview")


def _gemini(options: SystemOptions, model: str) -> Gemini:
    url = "https://generativelanguage.googleapis.com/v1beta"
    endpoint = remote(options, url, "GEMINI_API_KEY", "x-goog-api-key")
    return Gemini(options.name, options.model or model, endpoint, options.workers)
