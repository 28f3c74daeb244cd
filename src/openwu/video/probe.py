"""Read what a clip holds: its pictures, sound and metadata; refuse what cannot be edited, in words.

There is no ffprobe beside imageio-ffmpeg's program: what this says about a file is parsed. A survey decodes every frame
once, for the time stamps of those that really decode.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from openwu.errors import PictureError
from openwu.images.source import opened
from openwu.video.program import reason_in, run, running, source

CLIP_SUFFIXES = frozenset(
    f".{name}"
    for name in ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mts", "m2ts", "mpg", "mpeg", "3gp", "wmv", "flv")
)
"""What is taken for a clip by its name."""

HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
"""Transfer functions of high dynamic range."""

STREAM = re.compile(r"^  Stream #0:(\d+)(?:\[[^\]]*\])?(?:\((\w+)\))?: (\w+): (.*)$")
VIDEO = re.compile(r", (?P<format>[a-z]\w*)(?:\((?P<colour>(?:[^()]|\([^()]*\))*)\))?, (?P<width>\d+)x(?P<height>\d+)")
DAMAGED = re.compile(
    r"ended prematurely|partial file|corrupt|error while decoding|concealing|timescale not set", re.IGNORECASE
)


@dataclass(frozen=True)
class Clip:
    """A clip that can be edited."""

    path: Path
    stream: int
    """Number of the stream of its pictures."""
    pixel_format: str
    """As ffmpeg names it: "yuv420p"."""
    matrix: str
    """Of its colours, as ffmpeg's scale filter names it: "bt709"."""
    full_range: bool
    tags: Mapping[str, str]
    """What the file says of its colours, as options of ffmpeg's setparams filter."""
    rotation: int
    """Degrees by which frames are turned to be upright."""
    interlaced: bool
    rate: str
    """Frames per second, as shown: "29.97"."""
    sounds: int
    notes: tuple[str, ...]
    """What is converted or left out, in words."""

    @property
    def grey(self) -> bool:
        """Whether the file has no colours at all."""
        return self.pixel_format.startswith("gray")


@dataclass(frozen=True)
class Survey:
    """The frames of a clip that decode."""

    width: int
    """Of upright frames."""
    height: int
    shape: Fraction
    """Width of a pixel by its height."""
    base: Fraction
    """Seconds per unit of the time stamps."""
    stamps: array[int]
    """When each frame is shown: strictly increasing, 8 bytes a frame."""
    last: int
    """How long the last frame is shown."""
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.stamps)

    def seconds(self, start: int, stop: int) -> Fraction:
        """How long the frames from `start` until before `stop` are shown."""
        end = self.stamps[stop] if stop < len(self) else self.stamps[-1] + self.last
        return (end - self.stamps[start]) * self.base


def is_clip(path: str | Path) -> bool:
    """Whether a file is a clip by its name."""
    return Path(path).suffix.lower() in CLIP_SUFFIXES


def probe(path: str | Path) -> Clip:
    """Read the header of a clip. Raises PictureError for no video file, no pictures, HDR, and what does not open."""
    path = Path(path)
    with opened(path):  # missing, empty, a folder, not to be read: said as for photographs
        pass
    found = run(source(path), level="level+info")
    lines = [line.removeprefix("[info] ") for line in found.messages.splitlines()]
    if not any(line.startswith("Input #0") for line in lines):
        raise PictureError(
            f"{path}: expected a video file, got one that cannot be read as such "
            f"({_last(found.reason) or 'no known format'}); get an intact copy"
        )
    streams = [match.groups() for match in map(STREAM.match, lines) if match is not None]
    pictures = [each for each in streams if each[2] == "Video" and "(attached pic)" not in each[3]]
    if not pictures:
        kinds = ", ".join(sorted({kind.lower() for _, _, kind, _ in streams})) or "nothing"
        raise PictureError(f"{path}: expected a clip with pictures, got one with {kinds} alone; name another file")
    number, _, _, described = pictures[0]
    video = VIDEO.search(described)
    if video is None or "0" in (video["width"], video["height"]):
        raise PictureError(f"{path}: its pictures cannot be decoded ({described[:60]}); convert it to H.264 first")
    _refuse_hdr(path, video["colour"] or "", "\n".join(lines))
    return _clip(path, int(number), video, described, lines, streams)


def _clip(
    path: Path,
    number: int,
    video: re.Match[str],
    described: str,
    lines: list[str],
    streams: list[tuple[str | None, ...]],
) -> Clip:
    parts = (video["colour"] or "").split(", ")
    space, primaries, transfer = _colours(parts)
    full = "pc" in parts and bool(re.match(r"yuv|gray|nv", video["format"]))
    large = int(video["width"]) >= 1280 or int(video["height"]) > 576
    unknown = "bt709" if large else "smpte170m"
    matrix = space if space in ("bt709", "smpte170m", "bt470bg", "fcc", "smpte240m", "bt2020nc") else unknown
    tags = {"colorspace": matrix, "color_primaries": primaries, "color_trc": transfer}
    rotation = next((float(found[1]) for found in map(_rotation, lines) if found), 0.0)
    interlaced = any("first" in part for part in parts)
    rate = re.search(r", ([\d.]+k?) fps", described)
    clip = Clip(
        path=path,
        stream=number,
        pixel_format=video["format"],
        matrix=matrix,
        full_range=full,
        tags={} if space == "unknown" else {name: value for name, value in tags.items() if value != "unknown"},
        rotation=round(rotation) % 360,
        interlaced=interlaced,
        rate=rate[1] if rate else "?",
        sounds=sum(kind == "Audio" for _, _, kind, _ in streams),
        notes=(),
    )
    return replace(clip, notes=tuple(_notes(clip, streams)))


def _notes(clip: Clip, streams: list[tuple[str | None, ...]]) -> list[str]:
    """What will be converted or left out."""
    notes = []
    if clip.rotation:
        notes.append("turned upright: the result needs no rotation")
    if (bits := _bits(clip.pixel_format)) > 8:
        notes.append(f"converted from {bits} to 8 bits per channel")
    if clip.interlaced:
        notes.append("deinterlaced")
    if re.search(r"^(yuva|ya\d|rgba|bgra|argb|abgr|gbrap)", clip.pixel_format):
        notes.append("transparency is left out")
    left = [kind or "" for number, _, kind, text in streams if int(number or 0) != clip.stream and kind != "Audio"]
    words = {"Video": "further pictures", "Subtitle": "subtitles", "Data": "data", "Attachment": "attachments"}
    return notes + [f"left out: {words.get(kind, kind)} ({left.count(kind)})" for kind in dict.fromkeys(left)]


def survey(clip: Clip) -> Survey:
    """Decode every frame once. Raises PictureError where none decodes.

    Frames whose times do not increase are spread evenly; a damaged or truncated file is said, and what decodes counts.
    """
    arguments = [*source(clip.path), "-map", f"0:{clip.stream}", "-fps_mode", "passthrough", "-enc_time_base", "demux"]
    head: dict[str, str] = {}
    stamps: array[int] = array("q")
    last = 0
    with running([*arguments, "-f", "framecrc", "-"]) as process:
        for line in process.stdout:
            text = line.decode("ascii", "replace")
            if text.startswith("#"):
                name, _, value = text[1:].partition(" 0: ")
                head.setdefault(name, value.strip())
            else:
                _, _, shown, duration, *_ = text.split(",")
                stamps.append(int(shown))
                last = int(duration)
        code, messages = process.wait(), process.messages
    if not stamps:
        why = _last(reason_in(messages)) or f"ffmpeg ended with code {code}"
        raise PictureError(f"{clip.path}: none of its frames can be decoded ({why}); get an intact copy")
    notes = []
    if code or DAMAGED.search(messages):
        notes.append(f"damaged or cut off: the {len(stamps)} frames that decode are edited")
    width, height = map(int, head["dimensions"].split("x"))
    shape = Fraction(*map(int, head.get("sar", "1/1").split("/"))) if not head.get("sar", "").startswith("0") else 1
    base = Fraction(head["tb"])
    if any(later <= earlier for earlier, later in pairwise(stamps)):
        notes.append("its time stamps do not increase: the frames are shown at a constant rate")
        stamps, base = array("q", range(len(stamps))), _even(clip.rate)
        last = 1
    typical = stamps[-1] - stamps[-2] if len(stamps) > 1 else max(1, last)
    return Survey(
        width, height, Fraction(shape), base, stamps, last if 0 < last <= 2 * typical else typical, tuple(notes)
    )


def _even(rate: str) -> Fraction:
    try:
        return 1 / Fraction(rate)
    except (ValueError, ZeroDivisionError):
        return Fraction(1, 25)


def _refuse_hdr(path: Path, colour: str, everything: str) -> None:
    names = [name for transfer, name in HDR.items() if transfer in colour]
    if not names and "DOVI configuration record" in everything:
        names = ["Dolby Vision"]
    if names:
        raise PictureError(
            f"{path}: expected a clip of standard dynamic range, got HDR ({names[0]}), whose light would come out "
            "wrong; convert it to SDR (BT.709) in a video editor first"
        )


def _colours(parts: list[str]) -> tuple[str, str, str]:
    """Matrix, primaries and transfer function as ffmpeg prints them: all three, one for all, or none."""
    for part in parts:
        if part.count("/") == 2:
            space, primaries, transfer = part.split("/")
            return space, primaries, transfer
        if part not in ("tv", "pc", "progressive", "") and "first" not in part:
            return part, part, part
    return "unknown", "unknown", "unknown"


def _bits(pixel_format: str) -> int:
    if re.match(r"(rgb|bgr)(a?)(48|64)|rgba64|bgra64|ayuv64", pixel_format):
        return 16
    found = re.search(r"(?:p0?|gray|ya|y2|rgb|xyz)(\d\d?)(?:le|be)$", pixel_format)
    return int(found[1]) if found else 8


def _rotation(line: str) -> re.Match[str] | None:
    return re.search(r"display ?matrix: rotation of (-?[\d.]+)", line, re.IGNORECASE)


def _last(reason: str) -> str:
    """The words of a message, without the part of the program that they came from."""
    return reason.rpartition("] ")[2]
