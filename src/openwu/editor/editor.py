"""Edit photographs with a frozen base and a generator that writes one adapter per request, for every base alike.

    request -> condition -> generator -> adapter -> frozen base -> picture

Every request of a batch has its own adapter: the base says which rows of its denoiser's input belong to which request,
or runs a copy of the denoiser with the adapter merged into its weights where that is cheaper.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from openwu.backbones.protocol import Backbone, EditJob
from openwu.editor.cache import AdapterCache, GeneratorIdentity, request_key
from openwu.editor.compatibility import AdapterScope, attach_generator, check_targets, encoder_for
from openwu.editor.loading import load_pair
from openwu.editor.requests import (
    EditRequest,
    EditResult,
    Picture,
    Progress,
    checked_instructions,
    in_sequence,
    listed,
    part_of,
    timed,
    with_instruction,
)
from openwu.errors import InstructionError, PictureError, TargetError
from openwu.export.fit import with_kernels
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.model import ParameterGenerator
from openwu.images import Photo, read_picture
from openwu.registry import OPERATORS, module_of
from openwu.types import Adapter, Condition, LoadingOptions, SamplingOptions


class Editor:
    """A frozen base, its generator, and what lies between them."""

    def __init__(
        self,
        backbone: Backbone,
        generator: ParameterGenerator,
        *,
        name: str | None = None,
        sampling: SamplingOptions | None = None,
        cache: AdapterCache | str | Path | None = None,
    ) -> None:
        """`name`: the base's, for messages. `sampling`: of every edit, unless a call has its own. `cache`: see below.

        Raises TargetError for a generator that was made for another base.
        """
        self.backbone = backbone
        self.generator = generator.requires_grad_(False).eval()
        self.fast = FastGenerator(self.generator)
        self.name = name or type(backbone).__name__
        self.sampling = sampling or SamplingOptions()
        self.cache = AdapterCache(cache) if isinstance(cache, str | Path) else cache
        check_targets(generator.config, backbone, self.name)
        self.encoder = encoder_for(generator.config, backbone, self.name)
        self.handle = attach_generator(backbone, generator, self.name)
        self._turns = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        base: str | Path | None = None,
        generator: str | Path | None = None,
        loading: LoadingOptions | None = None,
        sampling: SamplingOptions | None = None,
        cache: AdapterCache | str | Path | None = None,
    ) -> Editor:
        """Load a base and its generator.

        `model`: None for the model inside the package, a folder that `openwu train` wrote, or the name of a base in
        `openwu.registry.BASES`. `base`: the base's folder or hub id. `generator`: the generator's folder, for bases
        that do not bring one. `cache`: where adapters are looked up before they are generated; an AdapterCache, or a
        folder for one of default sizes.

        Raises OpenwuError for what a user can mend, options that the base does not have included.
        """
        name, backbone, made = load_pair(model, base, generator, loading or LoadingOptions())
        return cls(backbone, made, name=name, sampling=sampling, cache=cache)

    def edit(
        self,
        images: Picture | Sequence[Picture],
        instruction: str = "",
        *,
        then: str | Sequence[str] = (),
        sequential: bool = False,
        strength: float = 1.0,
        seed: int = 0,
        reasoning: str | None = None,
        adapter: Adapter | None = None,
        allow_out_of_scope: bool = False,
        sampling: SamplingOptions | None = None,
        progress: Progress | None = None,
    ) -> EditResult:
        """Edit one picture; further ones in `images` are references of instructions such as "take its colours".

        `then` asks for more in the same pass: the updates of all instructions are added up; with `sequential` each
        instruction has a pass of its own, on the result of the one before, and the result's adapter is the last one's.
        `adapter` reuses an adapter instead of generating one; without an instruction the base then reads the one that
        the adapter was generated for. `reasoning`: see `EditRequest`. `allow_out_of_scope` tries instructions that the
        base would refuse. `progress` is called with (parts done, parts in all).

        Raises OpenwuError that names the argument for one that this base cannot serve.
        """
        if adapter is not None and adapter.batch != 1:
            raise TargetError(f"adapter: expected one sample, got {adapter.batch}; pick one with adapter.select([i])")
        if adapter is not None and then:
            raise InstructionError("then: expected nothing beside a given adapter; add adapters up with Adapter.sum")
        request = EditRequest(listed(images), instruction, strength, seed, then, reasoning)
        if not sequential or not then:
            return self._edited([request], adapter, allow_out_of_scope, sampling, progress)[0]
        self._check([request], allow_out_of_scope, sampling)
        timings: dict[str, float] = {}
        with timed(timings, "read"):
            photos = self._photos(request)
        asked = checked_instructions(request, None, self.backbone.check_instruction)
        if not allow_out_of_scope:  # all instructions, before the first pass
            with self._turn(), torch.no_grad():
                self.backbone.check_scope([self.backbone.read(photos, asked, seed, reasoning)])

        def edit(pictures: list[Picture], text: str, report: Progress | None) -> EditResult:
            one = EditRequest(pictures, text, strength, seed, (), reasoning)
            return self._edited([one], None, allow_out_of_scope, sampling, report)[0]

        return in_sequence(edit, photos, asked, progress, timings)

    def edit_batch(
        self,
        requests: Sequence[EditRequest],
        *,
        allow_out_of_scope: bool = False,
        sampling: SamplingOptions | None = None,
        progress: Progress | None = None,
    ) -> list[EditResult]:
        """Edit many pictures, each with its own adapter.

        Up to `sampling.batch` requests share a call of the generator, and of the base where it can take them together.
        """
        return self._edited(list(requests), None, allow_out_of_scope, sampling, progress) if requests else []

    @torch.no_grad()  # not inference mode: a caller may train on what comes back
    def adapt(
        self,
        images: Picture | Sequence[Picture],
        instruction: str,
        *,
        seed: int = 0,
        reasoning: str | None = None,
        allow_out_of_scope: bool = False,
    ) -> Adapter:
        """Generate the adapter (b = 1) of a request, or take it from the cache.

        `seed`: of what is drawn while the request is read; a base that draws nothing gives the same for every seed.
        """
        request = EditRequest(listed(images), instruction, seed=seed, reasoning=reasoning)
        self._check([request], allow_out_of_scope, None)
        job = self.backbone.read(
            self._photos(request), (self.backbone.check_instruction(instruction),), seed, reasoning
        )
        (adapter,) = self._adapters([job], allow_out_of_scope, 1, {})
        return adapter

    def adapter_key(self, job: EditJob, *, allow_out_of_scope: bool = False) -> str:
        """Hash what the adapter of a job with one instruction depends on, and nothing else: its cache key."""
        device = self.generator.hidden_in.weight.device.type
        # Autocast computes with the same weights in another dtype.
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        own = self.encoder is self.backbone
        pictures, text = self.backbone.as_read(job) if own else (job.pixels, job.instructions[0])
        return request_key(
            self.identity.digest,
            pictures,
            text,
            how=f"{self.fast.described} autocast {autocast}",
            seed=job.seed if self.encoder.reads_seed or self.backbone.reads_seed else None,
            reasoning=job.reasoning,
            in_scope=not allow_out_of_scope,
        )

    @cached_property
    def identity(self) -> GeneratorIdentity:
        """Generator, condition encoder and base as far as adapters depend on them, for cache keys."""
        writers: dict[str, nn.Module] = {"generator": self.generator}
        for owner, encoder in {"base": self.backbone, "encoder": self.encoder}.items():
            writers |= {f"{owner}.{name}": module for name, module in encoder.weights().items()}
        described = {"generator": self.generator.config.to_dict(), "base": self.backbone.identity}
        code = [type(self.backbone).__module__, type(self.encoder).__module__, *map(module_of, OPERATORS.values())]
        ours = [name for name in code if name.startswith("openwu.")]
        return GeneratorIdentity(writers, {**described, "encoder": self.encoder.identity}, ours)

    @property
    def dtype(self) -> torch.dtype:
        """Of the generator's weights, and of the adapters that it writes."""
        return self.generator.hidden_in.weight.dtype

    @torch.no_grad()
    def _edited(
        self,
        requests: Sequence[EditRequest],
        given: Adapter | None,
        allow_out_of_scope: bool,
        sampling: SamplingOptions | None,
        progress: Progress | None,
    ) -> list[EditResult]:
        sampling = sampling or self.sampling
        self._check(requests, allow_out_of_scope, sampling)
        timings: dict[str, float] = {}
        with timed(timings, "read"):
            photos = [self._photos(request) for request in requests]
        check = self.backbone.check_instruction
        jobs = [
            self.backbone.read(each, checked_instructions(request, given, check), request.seed, request.reasoning)
            for each, request in zip(photos, requests, strict=True)
        ]
        if given is None:
            # One entry per instruction: a request that asks for two things stands here twice.
            flat = [job.only(index) for job in jobs for index in range(len(job.instructions))]
            each = iter(self._adapters(flat, allow_out_of_scope, sampling.batch, timings))
            adapters = [Adapter.sum([next(each) for _ in job.instructions]) for job in jobs]
        else:
            timings |= {"condition": 0.0, "generate": 0.0}
            adapters = [given.to(self.generator.hidden_in.weight)]
        with timed(timings, "edit"):
            scaled = [adapter.scaled(request.strength) for adapter, request in zip(adapters, requests, strict=True)]
            edited = self._apply(jobs, scaled, sampling, progress)
        return [EditResult(photo, adapter, timings) for photo, adapter in zip(edited, adapters, strict=True)]

    def _check(
        self, requests: Sequence[EditRequest], allow_out_of_scope: bool, sampling: SamplingOptions | None
    ) -> None:
        """Refuse by name what this base cannot serve."""
        if any(each.reasoning is not None for each in requests) and not self.backbone.reasons:
            raise InstructionError(f"reasoning: expected none for {self.name}, which does not reason; leave it out")
        if allow_out_of_scope and not self.backbone.refuses_out_of_scope:
            raise InstructionError(
                f"allow_out_of_scope: expected False for {self.name}, which refuses no instruction; leave it out"
            )
        if sampling is not None:
            self.backbone.check_sampling(sampling)

    def _photos(self, request: EditRequest) -> tuple[Photo, ...]:
        most, count = self.backbone.max_pictures, len(request.images)
        if not count:
            raise PictureError("images: expected the picture to edit, and references after it, got none")
        if most is not None and count > most:
            raise PictureError(
                f"images: {self.name} reads one picture and at most {most - 1} reference after it, got {count} pictures"
            )
        return tuple(read_picture(image) for image in request.images)

    def _turn(self) -> AbstractContextManager[object]:
        """Threads wait for one another where the base, or a condition that runs the base's denoiser, asks for it."""
        alone = not self.backbone.concurrent or self.encoder.asks_denoiser
        return self._turns if alone else nullcontext()

    def _adapters(
        self, jobs: Sequence[EditJob], allow_out_of_scope: bool, batch: int, timings: dict[str, float]
    ) -> list[Adapter]:
        """One adapter (b = 1) per job of one instruction, from the cache where it has them, before their strengths."""
        with timed(timings, "condition"), self._turn():
            keys = [str(place) for place in range(len(jobs))]
            found: dict[str, Adapter] = {}
            missing = keys
            if self.cache is not None:
                keys = [self.adapter_key(job, allow_out_of_scope=allow_out_of_scope) for job in jobs]
                found, missing = self.cache.lookup(keys)
            new = [jobs[keys.index(key)] for key in missing]
            if not allow_out_of_scope:
                self.backbone.check_scope(new)
            size = min(batch, self.backbone.max_batch or batch)
            parts = [new[start : start + size] for start in range(0, len(new), size)]
            conditions = [self._condition(part) for part in parts]
        with timed(timings, "generate"):
            home = self.generator.hidden_in.weight.device
            found = {key: adapter.to(home) for key, adapter in found.items()}
            generated = (
                adapter
                for part, condition in zip(parts, conditions, strict=True)
                for adapter in self._generate(condition, [job.instructions[0] for job in part])
            )
            for key, adapter in zip(missing, generated, strict=True):
                found[key] = adapter
                if self.cache is not None:
                    self.cache.put(key, adapter)
        # Another spelling may have been the first: a result names the one that was asked for.
        return [with_instruction(found[key], job.instructions[0]) for key, job in zip(keys, jobs, strict=True)]

    def _condition(self, jobs: Sequence[EditJob]) -> Condition:
        if self.encoder is self.backbone:
            return self.backbone.condition_of(jobs)
        return self.encoder.condition([job.request for job in jobs])

    def _generate(self, condition: Condition, instructions: Sequence[str]) -> list[Adapter]:
        """One adapter (b = 1) per sample of a condition."""
        adapter = self.fast(condition.to(self.generator.hidden_in.weight))
        adapter = replace(
            with_kernels(adapter, self.backbone.denoiser), instructions=tuple((text,) for text in instructions)
        )
        return [adapter] if adapter.batch == 1 else [adapter.select([i]) for i in range(adapter.batch)]

    def _apply(
        self,
        jobs: Sequence[EditJob],
        adapters: Sequence[Adapter],
        sampling: SamplingOptions,
        progress: Progress | None,
    ) -> list[Photo]:
        """Adapters of one rank can be applied together: requests with sums of several go in calls of their own."""
        ranks = list(dict.fromkeys(adapter.rank for adapter in adapters))
        edited: dict[int, Photo] = {}
        for number, rank in enumerate(ranks):
            members = [i for i, adapter in enumerate(adapters) if adapter.rank == rank]
            scope = AdapterScope(self.backbone, self.handle, [adapters[i] for i in members], self._turns)
            with self._turn():
                report = part_of(progress, number, len(ranks))
                photos = self.backbone.edit([jobs[i] for i in members], sampling, scope, report)
            edited |= dict(zip(members, photos, strict=True))
        return [edited[i] for i in range(len(jobs))]
