"""Decode a clip's frames as upright photos, one at a time.

Shapes: n frames, h and w their sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from openwu.errors import PictureError
from openwu.images import Photo
from openwu.images.colour import Pixels
from openwu.video.probe import Clip, Survey
from openwu.video.program import reason_in, running, source

SCALING = "flags=bicubic+accurate_rnd+full_chroma_int"
"""How chroma is resampled, both ways."""
CANDIDATES = 5
"""Evenly spread frames of which one is chosen to stand for a clip."""
THUMBNAIL = 32
"""Samples per side in which candidates are compared."""


def frames(clip: Clip, found: Survey, *, start: int = 0) -> Iterator[Photo]:
    """Yield the frames from number `start` on; each is decoded when it is asked for.

    Raises PictureError where fewer decode than the survey found: the file was changed in between.
    """
    with running(_decoder(clip, found)) as process:
        for number in range(len(found)):
            data = process.stdout.read(3 * found.width * found.height)
            if len(data) < 3 * found.width * found.height:
                process.wait()
                why = reason_in(process.messages) or f"it ends after {number} of {len(found)} frames"
                raise PictureError(f"{clip.path}: {why}; it was changed while it was edited, begin again")
            if number >= start:
                yield _photo(data, clip, found)


def key_frame(clip: Clip, found: Survey) -> tuple[int, Photo]:
    """Return the number and the photo of the frame that stands for the clip.

    Of `CANDIDATES` evenly spread frames it is the one most like their median: no black one of a fade, and no flash.
    """
    places = sorted({(2 * i + 1) * len(found) // (2 * CANDIDATES) for i in range(CANDIDATES)})
    chosen = "+".join(f"eq(n,{place})" for place in places)
    with running(_decoder(clip, found, f"select='{chosen}'", "-frames:v", str(len(places)))) as process:
        photos = list(_rest(process.stdout, clip, found))
    if len(photos) != len(places):  # a change of size within the clip restarts the count of frames
        photos = [photo for number, photo in enumerate(frames(clip, found)) if number in places]
    best = median_like([photo.pixels for photo in photos])
    return places[best], photos[best]


def median_like(pictures: Sequence[Pixels]) -> int:
    """Return which picture `[h, w, 3]` is most like the median of all, on a few samples of each."""
    height, width = pictures[0].shape[:2]
    y, x = (np.linspace(0, side - 1, min(side, THUMBNAIL)).astype(int) for side in (height, width))
    small = np.stack([picture[y][:, x].astype(np.float32) for picture in pictures])
    distances = np.abs(small - np.median(small, axis=0)).mean((1, 2, 3))
    middle = np.abs(np.arange(len(pictures)) - (len(pictures) - 1) / 2)  # of equals, the one in the middle
    return int(np.lexsort((middle, distances))[0])


def _rest(stream: IO[bytes], clip: Clip, found: Survey) -> Iterator[Photo]:
    while len(data := stream.read(3 * found.width * found.height)) == 3 * found.width * found.height:
        yield _photo(data, clip, found)


def _photo(data: bytes, clip: Clip, found: Survey) -> Photo:
    return Photo(np.frombuffer(data, np.uint8).reshape(found.height, found.width, 3), grey=clip.grey)


def _decoder(clip: Clip, found: Survey, *more: str) -> list[str]:
    """Arguments that decode to RGB on standard output; `more`: a first filter, and options."""
    first, *options = more or ("",)
    filters = [
        *([first] if first else []),
        *(["bwdif=mode=send_frame"] if clip.interlaced else []),
        f"scale={found.width}:{found.height}:in_color_matrix={matrix_name(clip)}:"
        f"in_range={'full' if clip.full_range else 'limited'}:out_range=full:{SCALING}",
        "format=rgb24",
    ]
    return [
        *source(clip.path),
        *("-map", f"0:{clip.stream}", "-vf", ",".join(filters), "-fps_mode", "passthrough"),
        *(*options, "-f", "rawvideo", "-"),
    ]


def matrix_name(clip: Clip) -> str:
    """The name that the scale filter has for a clip's matrix."""
    return {"bt2020nc": "bt2020"}.get(clip.matrix, clip.matrix)
