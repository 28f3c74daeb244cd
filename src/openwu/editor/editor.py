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

import numpy as np
import torch
from torch import nn

from openwu.backbones.protocol import Backbone, EditJob, RequestScope
from openwu.editor.cache import AdapterCache, GeneratorIdentity, request_key
from openwu.editor.clip import ClipOptions, ClipResult, edit_clip
from openwu.editor.compatibility import AdapterScope, attach_generator, check_targets, encoder_for
from openwu.editor.generate import adapters_of, try_example
from openwu.editor.loading import load_pair
from openwu.editor.progress import JointProgress, halves
from openwu.editor.requests import (
    EditRequest,
    EditResult,
    Picture,
    Progress,
    Task,
    check_options,
    check_served,
    checked_pairs,
    checked_request,
    timed,
)
from openwu.editor.shown.reproduction import Reproduction
from openwu.editor.shown.solve import solved_on
from openwu.editor.tasks import make_task, pass_of, read_photos
from openwu.errors import InstructionError, OpenwuError, PictureError, TargetError
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.model import ParameterGenerator
from openwu.images import Photo
from openwu.registry import OPERATORS, module_of
from openwu.types import Adapter, LoadingOptions, SamplingOptions, Understood
from openwu.video.write import Metadata


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
        edit: str | None = None,
        example: Sequence[tuple[Picture, Picture]] = (),
        per_photo: bool = False,
        refine: int = 0,
        then: str | Sequence[str] = (),
        strength: float = 1.0,
        seed: int | None = None,
        reasoning: str | None = None,
        image_size: str | None = None,
        adapter: Adapter | None = None,
        allow_out_of_scope: bool = False,
        sampling: SamplingOptions | None = None,
        progress: Progress | None = None,
    ) -> EditResult:
        """Edit one picture as an instruction says.

        `images`: the picture to edit: a path, the bytes of a file, a file object, a PIL image, an array `[h, w]` or
        `[h, w, 3]`, a tensor `[3, h, w]`, or a `Photo`; in a list, further ones are references of instructions such as
        "take its colours". `instruction`: what to do. `edit`: in its place, the name of a known edit ("brighten").

        `example`: pairs of pictures before and after an edit that is shown rather than said, with or without an
        instruction. The base sees the picture alone; what the example shows reaches it through the adapter. It is the
        same for every picture of a series, unless with `per_photo`. It is tried on the example's own picture before:
        `reproduced` of the result says how much of the change it makes, and too little is refused. `refine`: steps in
        which the adapter is first trained on the example, 30 as a rule; the same adapter serves a series (`adapt`).

        `then`: one more instruction or several. Each has a pass of its own, on the result of the one before, and the
        result's adapter is the last one's. A base that tells edits apart runs an instruction that itself asks for two
        edits ("brighter and add grain") that way, too.

        `strength`: with the embedded base the share of the edit's change, -1 to 2 (0: the pixels as they are, -1: the
        same the other way; docs/editing.md), with others the factor on the adapter. `seed`: of everything random (None:
        the base's default, which the result tells). `reasoning`: what a base that reasons first shall have thought
        (None: it writes that itself, "": nothing).

        `adapter` (b = 1) reuses an adapter instead of generating one; without an instruction the base then reads the
        one that the adapter was generated for. `allow_out_of_scope` takes the instruction as it is, and tries what the
        base would refuse. `sampling`: this call's options of the base, in place of the editor's. `progress` is called
        with (parts done, parts in all); the latter stay as many, and in the end all are done.

        Returns an EditResult: `photo` and `image`, `understood`, `reproduced`, `adapter`, `timings`; `save(path)`
        writes it.

        Raises OpenwuError that names the argument for one that is wrong or that this base cannot serve:
        InstructionError for words, ExampleError for an example that is not understood, PictureError for pictures,
        TargetError for adapters.
        """
        check_options(adapter, sampling, progress, allow_out_of_scope=allow_out_of_scope)
        if adapter is not None and adapter.batch != 1:
            raise TargetError(f"adapter: expected one sample, got {adapter.batch}; pick one with adapter.select([i])")
        if adapter is not None and (then or edit is not None or example):
            name = "then" if then else "edit" if edit is not None else "example"
            raise InstructionError(f"{name}: expected nothing beside a given adapter; edit the result once more")
        request = EditRequest(
            images, instruction, strength, seed, then, reasoning, edit, image_size, example, per_photo, refine
        )
        return self._edited([request], adapter, allow_out_of_scope, sampling, progress)[0]

    def edit_batch(
        self,
        requests: Sequence[EditRequest],
        *,
        allow_out_of_scope: bool = False,
        sampling: SamplingOptions | None = None,
        progress: Progress | None = None,
    ) -> list[EditResult]:
        """Edit many pictures, each with its own adapter.

        Up to `sampling.batch` requests share a call of the generator, and of the base where it can take them together;
        so do the second passes of those with `then`. All are checked before the first is edited. Raises OpenwuError as
        `edit` does.
        """
        check_options(None, sampling, progress, allow_out_of_scope=allow_out_of_scope)
        came: object = requests
        if not isinstance(came, Sequence) or isinstance(came, str | bytes):
            raise OpenwuError(f"requests: expected a list of EditRequest, got {type(came).__name__}")
        return self._edited(list(requests), None, allow_out_of_scope, sampling, progress) if requests else []

    def edit_clip(
        self,
        clip: str | Path,
        output: str | Path,
        instruction: str = "",
        *,
        edit: str | None = None,
        example: Sequence[tuple[Picture, Picture]] = (),
        refine: int = 0,
        references: Sequence[Picture] = (),
        then: str | Sequence[str] = (),
        strength: float = 1.0,
        seed: int | None = None,
        adapter: Adapter | None = None,
        allow_out_of_scope: bool = False,
        noise_per_frame: bool = False,
        metadata: Metadata = "no_location",
        overwrite: bool = False,
        mask: Picture | None = None,
        progress: Progress | None = None,
    ) -> ClipResult:
        """Edit a video clip and write it to a file, with one adapter for all of its frames, merged into the base once.

        The adapter is generated on one frame, of five evenly spread ones that most like their median. Arguments not
        named here are those of `edit`; `references` are the pictures after the first there. Memory does not depend on
        the clip's length. Needs `pip install 'openwu[video]'`.

        `output`: an .mp4, .m4v, .mov or .mkv file, which appears when it is whole: H.264 at the clip's size and time
        stamps, with its sound. The same call goes on where one was stopped, from a folder `.openwu-*.part` beside it.
        `noise_per_frame`: new noise for every frame, so that grain moves as in a film; otherwise it stands still.
        `metadata`: "keep", "no_location" or "strip". `mask`: a picture of the upright frames' size with alpha, for all
        frames; where it is opaque, they stay as they are until they are encoded. `progress` is called with (frames
        done, frames in all).

        Raises OpenwuError as `edit` does, and PictureError for a clip that cannot be read or is HDR.
        """
        request = EditRequest(
            list(references), instruction, strength, seed, then, edit=edit, example=example, refine=refine
        )
        options = ClipOptions(adapter, allow_out_of_scope, noise_per_frame, metadata, overwrite, mask)
        return edit_clip(self, clip, output, request, options, progress)

    @torch.no_grad()  # not inference mode: a caller may train on what comes back
    def adapt(
        self,
        images: Picture | Sequence[Picture] | None = None,
        instruction: str = "",
        *,
        example: Sequence[tuple[Picture, Picture]] = (),
        refine: int = 0,
        seed: int | None = None,
        reasoning: str | None = None,
        image_size: str | None = None,
        allow_out_of_scope: bool = False,
        progress: Progress | None = None,
    ) -> Adapter:
        """Generate the adapter (b = 1) of a request, or take it from the cache.

        `example`, `refine`: see `edit`; without `images` the adapter serves a whole series, with them this picture.
        `seed`, `reasoning`, `image_size`: as for `edit`, of a base that reads its request with them; others give the
        same adapter for every seed. `progress` is called with (steps done, steps in all) of `refine`, and not at all
        where the adapter comes from the cache.

        Raises OpenwuError as `edit` does, and for an instruction that asks for several edits.
        """
        check_options(None, None, progress, allow_out_of_scope=allow_out_of_scope)
        series = images is None and bool(example)
        request = EditRequest(
            _BLANK if series else [] if images is None else images,
            instruction,
            seed=seed,
            reasoning=reasoning,
            image_size=image_size,
            example=example,
            per_photo=bool(example) and not series,
            refine=refine,
        )
        (request,) = self._checked([request], allow_out_of_scope, None)
        task = self._task(request, read_photos(request, self.backbone, self.name), None, not allow_out_of_scope)
        if len(task.job.instructions) > 1:
            raise InstructionError(
                f"instruction: {instruction!r} asks for several edits ({task.summary}), which have an adapter each; "
                "adapt to one at a time"
            )
        (adapter,) = adapters_of(self, [task.job], allow_out_of_scope, 1, {}, progress)
        try_example(self, task, adapter, allow_out_of_scope, {})
        return adapter

    @torch.no_grad()
    def reproduction(
        self, adapter: Adapter, example: Sequence[tuple[Picture, Picture]], instruction: str = ""
    ) -> Reproduction:
        """Measure how much of the change that pairs show an adapter (b = 1) makes of their pictures before.

        `instruction`: the words beside the example, if any. Raises PictureError or ExampleError for wrong pairs.
        """
        if not checked_pairs(example):
            raise PictureError("example: expected at least one pair of pictures, got none")
        (request,) = self._checked([EditRequest(_BLANK, instruction, example=example)], True, None)
        task = self._task(request, (_BLANK,), None, False)
        home = adapter.to(self.generator.hidden_in.weight)
        found = try_example(self, task, home, True, {})
        assert found is not None
        return found

    @torch.no_grad()
    def understand(
        self,
        instruction: str = "",
        *,
        edit: str | None = None,
        then: str | Sequence[str] = (),
        references: int = 0,
        strength: float = 1.0,
    ) -> Understood | None:
        """Return what an instruction would be taken for, without any picture; None where the base cannot tell.

        `references`: how many reference pictures would come with it. Raises what `edit` does for words and strength.
        """
        asked = EditRequest([_BLANK] * (1 + references), instruction, strength, then=then, edit=edit)
        (request,) = self._checked([asked], False, None)
        return self._task(request, read_photos(request, self.backbone, self.name), None, True).summary

    def adapter_key(self, job: EditJob, *, allow_out_of_scope: bool = False) -> str:
        """Hash what the adapter of a job with one instruction depends on, and nothing else: its cache key."""
        device = self.generator.hidden_in.weight.device.type
        # Autocast computes with the same weights in another dtype.
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        own = self.encoder is self.backbone
        pictures, text = self.backbone.as_read(job) if own else (job.pixels, job.instructions[0])
        return request_key(
            self.identity.digest,
            [*pictures, *solved_on(self.backbone, job)],
            text,
            how=f"{self.fast.described} autocast {autocast}",
            seed=job.seed if self.encoder.reads_seed or self.backbone.reads_seed else None,
            reasoning=job.reasoning,
            image_size=job.image_size,
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
        requests = self._checked(requests, allow_out_of_scope, sampling)
        timings: dict[str, float] = {}
        with timed(timings, "read"):
            photos = [read_photos(request, self.backbone, self.name) for request in requests]
        checked = not allow_out_of_scope and given is None
        tasks = [self._task(request, each, given, checked) for each, request in zip(photos, requests, strict=True)]
        passes = [1 if given is not None else len(task.job.instructions) for task in tasks]
        joint = JointProgress(progress, max(passes), uneven=any(task.job.refine for task in tasks))
        results: dict[int, EditResult] = {}
        for number in range(max(passes)):
            members = [index for index, count in enumerate(passes) if count > number]
            before = {index: results[index].photo if number else photos[index][0] for index in members}
            part = [
                tasks[index] if passes[index] == 1 else pass_of(tasks[index], number, before[index], self.backbone)
                for index in members
            ]
            found = self._together(part, given, allow_out_of_scope, sampling, joint.of(number), timings)
            results |= dict(zip(members, found, strict=True))
        joint.end()
        return [replace(results[index], understood=task.summary) for index, task in enumerate(tasks)]

    def _together(
        self,
        tasks: Sequence[Task],
        given: Adapter | None,
        allow_out_of_scope: bool,
        sampling: SamplingOptions,
        progress: Progress | None,
        timings: dict[str, float],
    ) -> list[EditResult]:
        """Edit in one pass each, sharing calls of generator and base. Adds to `timings`."""
        if given is None:
            jobs = [task.job for task in tasks]
            steps, progress = halves(progress)
            adapters = adapters_of(self, jobs, allow_out_of_scope, sampling.batch, timings, steps)
        else:
            timings |= {"condition": 0.0, "generate": 0.0}
            adapters = [given.to(self.generator.hidden_in.weight)]
        found = [
            try_example(self, task, adapter, allow_out_of_scope, timings)
            for task, adapter in zip(tasks, adapters, strict=True)
        ]
        with timed(timings, "edit"):
            edited = self._apply(tasks, adapters, sampling, progress)
        return [
            EditResult(photo, adapter, timings, task.job.seed, task.summary, reproduced)
            for photo, adapter, task, reproduced in zip(edited, adapters, tasks, found, strict=True)
        ]

    def _task(self, request: EditRequest, photos: tuple[Photo, ...], given: Adapter | None, checked: bool) -> Task:
        return make_task(request, photos, given, self.backbone, self.name, checked=checked, turn=self._turn())

    def _checked(
        self, requests: Sequence[EditRequest], allow_out_of_scope: bool, sampling: SamplingOptions | None
    ) -> list[EditRequest]:
        """Refuse wrong values, and by name what this base cannot serve; fill in the base's seed."""
        checked = [checked_request(request, self.backbone.default_seed) for request in requests]
        check_served(checked, self.backbone, self.name, allow_out_of_scope, sampling)
        return checked

    def _turn(self) -> AbstractContextManager[object]:
        """Threads wait for one another where the base, or a condition that runs the base's denoiser, asks for it."""
        alone = not self.backbone.concurrent or self.encoder.asks_denoiser
        return self._turns if alone else nullcontext()

    def _apply(
        self,
        tasks: Sequence[Task],
        adapters: Sequence[Adapter],
        sampling: SamplingOptions,
        progress: Progress | None,
        scope: RequestScope | None = None,
    ) -> list[Photo]:
        """Edit in one pass. `scope`: in place of one with these adapters at the tasks' strengths."""
        fades, strengths = self.backbone.identity_at_zero, [task.request.strength for task in tasks]
        edited = {i: tasks[i].job.photos[0] for i, strength in enumerate(strengths) if fades and strength == 0}
        members = [i for i in range(len(tasks)) if i not in edited]
        if members:
            if scope is None:
                scaled = [adapters[i].scaled(self._scale(strengths[i])) for i in members]
                scope = AdapterScope(self.backbone, self.handle, scaled, self._turns)
            with self._turn():
                photos = self.backbone.edit([tasks[i].job for i in members], sampling, scope, progress)
            for i, photo in zip(members, photos, strict=True):
                task = tasks[i]
                edited[i] = self.backbone.finish(photo, task.job, task.understood or (), task.request.strength)
        return [edited[i] for i in range(len(tasks))]

    def _scale(self, strength: float) -> float:
        """The factor on the adapter: where strength is a share of the change, the base makes it of the full edit."""
        return 1.0 if self.backbone.identity_at_zero else strength


_BLANK = Photo(np.zeros((1, 1, 3), np.uint8))
"""In place of a picture, where only words are read."""
