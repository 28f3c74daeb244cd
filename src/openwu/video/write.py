"""Encode edited frames in segments, and join segments with the clip's sound and metadata into one file.

A segment is a whole file of its own, so that work goes on where it stopped. Joining copies pictures and sound; only
sound that the new container cannot hold is encoded again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from openwu.errors import PictureError
from openwu.files.writing import atomic_file, write_text
from openwu.images.colour import Pixels
from openwu.video.frames import SCALING, matrix_name
from openwu.video.probe import Clip, Survey
from openwu.video.program import Finished, reason_in, run, running, source

Metadata = Literal["keep", "no_location", "strip"]
"""What of a clip's metadata its result has: all, all but places, or none."""

MUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""Suffixes of results, with ffmpeg's names of their containers."""
QUALITY = ("-c:v", "libx264", "-preset", "medium", "-crf", "17", "-pix_fmt", "yuv420p")
"""H.264 that every player shows, at a quality where the loss is hard to see."""
SEGMENT_SUFFIX = ".mp4"

_PLACES = re.compile(r"location|gps|latitude|longitude|geo[:_.-]", re.IGNORECASE)
_TECHNICAL = re.compile(
    r"major_brand|minor_version|compatible_brands|encoder|duration|handler_name|vendor_id|language", re.IGNORECASE
)


def clip_suffix(path: Path) -> str:
    """Return the suffix for an edit of this clip: its own where that can be written, .mp4 otherwise."""
    return path.suffix if path.suffix.lower() in MUXERS else ".mp4"


def check_clip_output(path: Path, *, overwrite: bool) -> None:
    """Raise PictureError for a result that could not be written: its suffix, its folder, or a file that is there."""
    if path.suffix.lower() not in MUXERS:
        raise PictureError(f"{path}: expected the result of a clip to end in {', '.join(MUXERS)}; choose one of these")
    if not path.parent.is_dir():
        raise PictureError(f"{path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise PictureError(f"{path}: is a folder; name a file")
    if os.path.lexists(path) and not overwrite:
        raise PictureError(f"{path}: already exists; choose another name or allow overwriting (--overwrite)")
    if not os.access(path.parent, os.W_OK):
        raise PictureError(f"{path}: no permission to write to {path.parent}; choose another folder")


def write_segment(path: Path, pictures: Iterable[Pixels], clip: Clip, found: Survey, start: int, stop: int) -> None:
    """Encode frames `[h, w, 3]` from number `start` until before `stop`, at their times.

    The file appears when it is whole. Raises PictureError where the encoder fails, as on a full disk.
    """
    draft = path.with_name(f"draft{SEGMENT_SUFFIX}")
    try:
        with running(_encoder(draft, clip, found, start, stop), feed=True) as process:
            try:
                for picture in pictures:
                    process.stdin.write(_even(picture).tobytes())
                code = process.wait()
            except BrokenPipeError:
                code = process.wait() or 1
            if code:
                why = reason_in(process.messages) or f"ffmpeg ended with code {code}"
                raise PictureError(f"{path}: encoding failed: {why}; check the disk")
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def stamps_expression(stamps: Sequence[int]) -> str:
    """Return ffmpeg's expression for the time of frame N, counted from the first: a balanced tree of comparisons."""
    times = [stamp - stamps[0] for stamp in stamps]

    def tree(start: int, stop: int) -> str:
        step = times[start + 1] - times[start] if stop - start > 1 else 0
        if all(times[i] - times[start] == (i - start) * step for i in range(start, stop)):
            return f"{times[start]}+(N-{start})*{step}"
        middle = (start + stop) // 2
        return f"if(lt(N,{middle}),{tree(start, middle)},{tree(middle, stop)})"

    return tree(0, len(times))


def join(
    output: Path, segments: Sequence[tuple[Path, int]], clip: Clip, found: Survey, metadata: Metadata
) -> tuple[str, ...]:
    """Join segments (file, number of its first frame) into `output`, which appears when it is whole.

    Returns notes on what the result does not have. Raises PictureError where it cannot be written.
    """
    folder = segments[0][0].parent
    ends = [*(start for _, start in segments[1:]), len(found)]
    lines = ["ffconcat version 1.0"]
    for (file, start), end in zip(segments, ends, strict=True):
        lines += [f"file '{file.name}'", f"duration {float(found.seconds(start, end)):.6f}"]
    listing = folder / "segments.ffconcat"
    write_text(listing, "\n".join(lines) + "\n")
    before = metadata_of(clip.path)
    places = sorted(name for name, value in before.items() if _PLACES.search(f"{name} {value}"))
    notes: list[str] = []
    with atomic_file(output) as part:
        for codec in ("copy", "aac"):
            arguments = _joining(listing, clip, found, metadata, places, MUXERS[output.suffix.lower()], codec)
            finished: Finished = run([*arguments, "-y", f"file:{part}"])
            if not finished.code:
                break
        if finished.code:
            why = finished.reason or f"ffmpeg ended with code {finished.code}"
            raise PictureError(f"{output}: cannot be written: {why}; check the disk, or choose another suffix")
        if codec == "aac":
            notes.append(f"{output.suffix} cannot hold this sound as it is: encoded again as AAC")
        after = {name.lower() for name in metadata_of(part)}
    if metadata == "strip":
        return tuple(notes)
    if metadata == "no_location" and places:
        notes.append(f"where it was taken is left out ({', '.join(places)})")
    kept = [name for name in before if (metadata == "keep" or name not in places) and not _TECHNICAL.match(name)]
    if lost := sorted(name for name in kept if name.lower() not in after):
        notes.append(f"{output.suffix} cannot hold its {', '.join(lost)}")
    return tuple(notes)


def metadata_of(path: Path) -> Mapping[str, str]:
    """Return a file's metadata, those of its streams included: name -> value."""
    output = run([*source(path), "-map", "0", "-c", "copy", "-f", "ffmetadata", "-"]).output
    text = re.sub(r"\\\r?\n", " ", output.decode(errors="replace"))
    parts = text.split("[CHAPTER]")[0].splitlines()
    pairs = (re.split(r"(?<!\\)=", line, maxsplit=1) for line in parts if not line.startswith((";", "[")))
    return {re.sub(r"\\(.)", r"\1", pair[0]): pair[1] for pair in pairs if len(pair) == 2}


def _encoder(path: Path, clip: Clip, found: Survey, start: int, stop: int) -> list[str]:
    width, height = found.width + found.width % 2, found.height + found.height % 2
    filters = [
        f"settb={found.base}",
        f"setpts='{stamps_expression(found.stamps[start:stop])}'",
        f"scale=out_color_matrix={matrix_name(clip)}:in_range=full:"
        f"out_range={'full' if clip.full_range else 'limited'}:{SCALING}",
        "format=yuv420p",
        *([f"setparams={':'.join(f'{name}={value}' for name, value in clip.tags.items())}"] if clip.tags else []),
        f"setsar={found.shape}",
    ]
    return [
        *(
            "-f",
            "rawvideo",
            "-pixel_format",
            "rgb24",
            "-video_size",
            f"{width}x{height}",
            "-framerate",
            str(1 / (found.last * found.base)),
        ),
        *("-i", "pipe:0", "-vf", ",".join(filters), "-fps_mode", "passthrough", "-enc_time_base", str(found.base)),
        *(*QUALITY, "-color_range", "pc" if clip.full_range else "tv"),
        *(*_timescale(found), "-fflags", "+bitexact", "-y", f"file:{path.absolute()}"),
    ]


def _joining(
    listing: Path, clip: Clip, found: Survey, metadata: Metadata, places: Sequence[str], muxer: str, codec: str
) -> list[str]:
    first = float(found.stamps[0] * found.base)
    arguments = [
        *("-itsoffset", f"{first:.6f}", "-f", "concat", "-protocol_whitelist", "file"),
        *("-i", f"file:{listing.absolute()}", *source(clip.path)),
        *("-map", "0:v", "-map", "1:a?", "-c:v", "copy", "-c:a", codec),
    ]
    if metadata == "strip":
        arguments += ["-map_metadata", "-1", "-map_metadata:s", "-1", "-map_chapters", "-1"]
    else:
        arguments += ["-map_metadata", "1", "-map_chapters", "1"]
    if metadata == "no_location":
        for name in places:
            arguments += ["-metadata", f"{name}=", "-metadata:s:a", f"{name}="]
    quick = ["-movflags", "+faststart"] if muxer != "matroska" else []
    return [*arguments, *_timescale(found), *quick, "-fflags", "+bitexact", "-f", muxer]


def _timescale(found: Survey) -> list[str]:
    """Time stamps of MP4 files in the clip's own units."""
    return ["-video_track_timescale", str(found.base.denominator)] if found.base.denominator <= 1_000_000 else []


def _even(picture: Pixels) -> Pixels:
    """Repeat the last row or column of a side that is odd: common H.264 has none."""
    height, width = picture.shape[:2]
    if height % 2 or width % 2:
        rows, columns = (np.minimum(np.arange(side + side % 2), side - 1) for side in (height, width))
        picture = picture[rows][:, columns]
    return picture
