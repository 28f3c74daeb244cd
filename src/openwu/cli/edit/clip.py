"""Edit one clip of a command, with the model and the words that its photographs get."""

from __future__ import annotations

from collections.abc import Callable

from openwu.cli.edit.photo import Done, PhotoEditor
from openwu.cli.edit.plan import Job, make_folder
from openwu.cli.edit.report import Report


def edit_clip(photos: PhotoEditor, job: Job, progress: Callable[[int, int], None], report: Report) -> Done:
    """Edit a clip and write all of its job; an interrupt leaves its finished frames for the same command."""
    arguments = photos.arguments
    assert job.output is not None
    make_folder(job.output.parent)
    try:
        result = photos.editor.edit_clip(
            job.photo.path,
            job.output,
            photos.words[0],
            edit=arguments.edit,
            example=arguments.example if photos.adapter is None else (),
            references=arguments.reference,
            then=photos.words[1:],
            strength=arguments.strength,
            seed=arguments.seed,
            adapter=photos.adapter,
            allow_out_of_scope=arguments.allow_out_of_scope,
            noise_per_frame=arguments.noise_per_frame,
            metadata=arguments.metadata or "no_location",
            overwrite=arguments.overwrite,
            mask=arguments.mask,
            progress=progress,
        )
    except KeyboardInterrupt:
        report.note(f"{job.name}: its finished frames are kept; the same command goes on after them")
        raise
    if job.adapter_folder is not None:
        make_folder(job.adapter_folder.parent)
        result.adapters[0].save_pretrained(job.adapter_folder)
    resumed = (f"{result.resumed} of {result.frames} frames were done already",) if result.resumed else ()
    return Done(result.timings, result.understood, (*resumed, *result.notes), (), photos.reproduced)
