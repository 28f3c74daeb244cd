"""Other people's editors on this machine: their own diffusers pipeline with their own defaults, without any adapter."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from openwu.errors import OpenwuError
from openwu.evaluation.cases import Case
from openwu.evaluation.systems import System, SystemOptions
from openwu.extras import library


class DiffusersPipeline(System):
    """Loads a pipeline from a folder or hub id and calls it with picture, instruction and a seed of the case."""

    def __init__(
        self,
        options: SystemOptions,
        repository: str,
        *,
        defaults: Mapping[str, object] | None = None,
        several: bool = False,
        guidance_name: str = "guidance_scale",
    ) -> None:
        """`defaults`: what its makers call it with. `several`: whether it reads more than one picture.

        `guidance_name`: the pipeline's argument that `--guidance` sets.
        """
        self.name, self.options, self.several = options.name, options, several
        self.repository = options.model or repository
        given = {"num_inference_steps": options.steps, guidance_name: options.guidance}
        self.arguments = {**(defaults or {}), **{key: value for key, value in given.items() if value is not None}}

    def identity(self) -> dict[str, object]:
        version = library("diffusers").__version__
        return {"kind": "diffusers", "model": self._model, "diffusers": version, "arguments": dict(self.arguments)}

    @property
    def _model(self) -> str:
        """The hub id; of a folder what its pipeline is made of, since its place says nothing."""
        index = Path(self.repository) / "model_index.json"
        return index.read_text(encoding="utf-8") if index.is_file() else self.repository

    @cached_property
    def pipeline(self) -> Any:
        """The loaded pipeline. Raises OpenwuError where it cannot be loaded."""
        device = self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        try:
            pipeline = library("diffusers").DiffusionPipeline.from_pretrained(self.repository, dtype=dtype)
        except (OSError, ValueError, AttributeError) as error:
            raise OpenwuError(
                f"{self.name}: expected a diffusers pipeline in {self.repository!r}, which this version of diffusers "
                f"knows; got {type(error).__name__}: {str(error)[:200]}; pass its folder as --model"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def check(self) -> None:
        _ = self.pipeline

    def edit(self, case: Case) -> Image.Image:
        """Edit one case. Raises OpenwuError for several pictures where the pipeline reads one."""
        if len(case.pictures) > 1 and not self.several:
            raise OpenwuError(f"{self.name}: expected one picture, got {len(case.pictures)}")
        images = [case.image(i) for i in range(len(case.pictures))]
        generator = torch.Generator().manual_seed(zlib.crc32(case.key.encode()))
        image = images if len(images) > 1 else images[0]
        with torch.inference_mode():
            made = self.pipeline(image=image, prompt=case.instruction, generator=generator, **self.arguments)
        found: Image.Image = made.images[0]
        return found


def step1x_edit(options: SystemOptions) -> DiffusersPipeline:
    """Step1X-Edit v1.1; needs a diffusers that has its pipeline."""
    defaults = {"num_inference_steps": 28, "true_cfg_scale": 6.0}
    repository = "stepfun-ai/Step1X-Edit-v1p1-diffusers"
    return DiffusersPipeline(options, repository, defaults=defaults, guidance_name="true_cfg_scale")


def qwen_image_edit(options: SystemOptions) -> DiffusersPipeline:
    """Qwen-Image-Edit."""
    return DiffusersPipeline(options, "Qwen/Qwen-Image-Edit", defaults=QWEN, guidance_name="true_cfg_scale")


def qwen_image_edit_2511(options: SystemOptions) -> DiffusersPipeline:
    """Qwen-Image-Edit-2511, which reads several pictures."""
    defaults = {**QWEN, "num_inference_steps": 40}
    return DiffusersPipeline(
        options, "Qwen/Qwen-Image-Edit-2511", defaults=defaults, several=True, guidance_name="true_cfg_scale"
    )


def longcat_image_edit(options: SystemOptions) -> DiffusersPipeline:
    """LongCat-Image-Edit."""
    defaults = {"num_inference_steps": 50, "guidance_scale": 4.5, "negative_prompt": ""}
    return DiffusersPipeline(options, "meituan-longcat/LongCat-Image-Edit", defaults=defaults)


def flux2_dev(options: SystemOptions) -> DiffusersPipeline:
    """FLUX.2 [dev], which reads several pictures."""
    defaults = {"num_inference_steps": 50, "guidance_scale": 4.0}
    return DiffusersPipeline(options, "black-forest-labs/FLUX.2-dev", defaults=defaults, several=True)


def flux_kontext(options: SystemOptions) -> DiffusersPipeline:
    """FLUX.1 Kontext [dev]."""
    defaults = {"num_inference_steps": 28, "guidance_scale": 2.5}
    return DiffusersPipeline(options, "black-forest-labs/FLUX.1-Kontext-dev", defaults=defaults)


QWEN = {"num_inference_steps": 50, "true_cfg_scale": 4.0, "negative_prompt": " "}
