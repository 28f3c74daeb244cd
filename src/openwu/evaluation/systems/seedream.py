"""ByteDance's Seedream behind `POST /images/generations`, with pictures as data URLs."""

from __future__ import annotations

import base64
from typing import Any

from PIL import Image

from openwu.evaluation.cases import Case
from openwu.evaluation.http import CallError, Endpoint
from openwu.evaluation.systems import System, SystemOptions
from openwu.evaluation.systems.openai_images import decoded, png, remote


class Seedream(System):
    """Asks for one picture without a watermark, in base64."""

    def __init__(self, name: str, model: str, endpoint: Endpoint, workers: int = 1) -> None:
        self.name, self.model, self.endpoint, self.workers = name, model, endpoint, workers
        self.is_paid = not endpoint.is_local

    def identity(self) -> dict[str, object]:
        return {"kind": "seedream", "model": self.model, "endpoint": self.endpoint.public_url, "size": "2K"}

    def check(self) -> None:
        self.endpoint.key()

    def edit(self, case: Case) -> Image.Image:
        pictures = [png(case.image(i)) for i in range(len(case.pictures))]
        urls = ["data:image/png;base64," + base64.b64encode(each).decode() for each in pictures]
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": case.instruction,
            "image": urls[0] if len(urls) == 1 else urls,
            "size": "2K",
            "sequential_image_generation": "disabled",
            "response_format": "b64_json",
            "watermark": False,
        }
        found = self.endpoint.post("/images/generations", body=body).get("data")
        if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
            raise CallError(f"{self.name}: expected one picture in data")
        return decoded(found[0].get("b64_json"), self.name)


def seedream_45(options: SystemOptions) -> Seedream:
    """Seedream 4.5."""
    endpoint = remote(options, "https://ark.ap-southeast.bytepluses.com/api/v3", "ARK_API_KEY")
    return Seedream(options.name, options.model or "seedream-4-5-251128", endpoint, options.workers)
