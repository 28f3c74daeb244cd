"""Photographs damaged by real codecs, cameras and hands, not by our own operators.

Codecs: test photographs at a low rate of H.264 (one frame, by imageio-ffmpeg's program), JPEG, WebP, AVIF and
JPEG 2000, as their encoders make them. Sensitivity: test photographs with the noise of real cameras at ISO 1600 and at
their highest, where darktable's profiles are installed (`sensors.py`). Camera: frames of a still camera with their
median as truth. Shake and defocus: photographs without any truth; they are in the pictures of a report and in no
number. The last two are read from Debian's package opencv-doc where it is installed, or from `--data`; their licences
are unclear, so they are never copied into anything.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, features
from torch import Tensor
from torch.nn import functional as F

from openwu.data.suite.photographs import load_test_photographs
from openwu.errors import OpenwuError
from openwu.evaluation.benchmarks import sensors
from openwu.evaluation.cases import Case, image_tensor
from openwu.evaluation.pictures import to_image
from openwu.extras import library

OPENCV_DOC = Path("/usr/share/doc/opencv-doc/examples/data")
SIDE = 256
"""Longest side of a photograph in pixels: the opponents are slow."""
ARTEFACTS, NOISE, BLUR = "remove the compression artefacts", "remove the noise", "make the blurred photo sharp"
PILLOW_CODECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("JPEG", "jpg", {"quality": 15}),
    "webp": ("WEBP", "webp", {"quality": 5}),
    "avif": ("AVIF", "avif", {"quality": 25, "speed": 6}),
    "jpeg2000": ("JPEG2000", "jpg_2000", {"quality_mode": "rates", "quality_layers": [60]}),
}
"""Task -> Pillow's format, its feature, and settings of a low rate."""
H264_QUANTISER = 38
FROM_CAMERA = 95
"""Quality of a camera's JPEG files; their colours are as fine as their brightness here, since pictures are small."""
FRAMES = 40
"""Frames whose median is the truth."""
STEADY = 0.12
"""Difference from the median from which on something moved: there the frame is replaced by the median."""


def load(folder: Path | None, _work: Path, *, partial: bool = False, side: int = SIDE) -> list[Case]:
    """Make the codecs' cases, and read the camera's where its package is. `partial`: two photographs only."""
    photographs = load_test_photographs(side)
    chosen = sorted(photographs)[:2] if partial else sorted(photographs)
    cases = [case for name in chosen for case in _codecs(name, photographs[name])]
    if sensors.PROFILES.is_file():
        cases += _sensitivity({name: photographs[name] for name in chosen})
    where = folder or OPENCV_DOC
    if folder is not None and not (folder / "vtest.avi").exists():
        raise OpenwuError(f"real: expected the pictures of opencv-doc in {folder}, found no vtest.avi")
    return [*cases, *camera_cases(where, side)] if where.is_dir() else cases


def _codecs(name: str, source: Tensor) -> list[Case]:
    clean = to_image(source)
    damaged = {"h264": h264(clean)}
    for task, (kind, feature, settings) in PILLOW_CODECS.items():
        if features.check(feature):
            buffer = io.BytesIO()
            clean.save(buffer, kind, **settings)
            with Image.open(buffer) as image:
                damaged[task] = image.convert("RGB")
    return [
        Case(task, ARTEFACTS, (image_tensor(image),), source, photograph=name, language="en", key=f"{task}-{name}")
        for task, image in damaged.items()
    ]


def _sensitivity(photographs: dict[str, Tensor]) -> list[Case]:
    """The middle of each photograph by a camera of its own, at about ISO 1600 and at the camera's highest.

    As sharp as a camera's pictures are where one looks at single pixels: reduced ones are sharper than any sensor sees.
    """
    cameras = list(sensors.read_profiles().values())
    cases = []
    for i, (name, source) in enumerate(photographs.items()):
        profiles = cameras[i % len(cameras)]
        source = _enlarged_middle(source)
        middle = min(profiles, key=lambda each: abs(each.iso - 1600))
        for task, profile in (("iso1600", middle), ("iso-highest", profiles[-1])):
            buffer = io.BytesIO()
            to_image(sensors.taken(source, profile, seed=i)).save(buffer, "JPEG", quality=FROM_CAMERA, subsampling=0)
            with Image.open(buffer) as image:
                picture = image_tensor(image.convert("RGB"))
            truth = sensors.taken(source, None)
            cases.append(Case(task, NOISE, (picture,), truth, photograph=name, language="en", key=f"{task}-{name}"))
    return cases


def _enlarged_middle(source: Tensor) -> Tensor:
    """`[3, h, w]` at twice its size, and of that a part of the size that it had."""
    height, width = source.shape[-2:]
    large = F.interpolate(source[None], scale_factor=2, mode="bicubic", align_corners=False)[0].clamp(0, 1)
    top, left = height // 2, width // 2
    return large[:, top : top + height, left : left + width]


def ffmpeg(*arguments: str, folder: Path) -> None:
    """Run imageio-ffmpeg's program in a folder. Raises OpenwuError with its last words."""
    program = library("imageio_ffmpeg", "measures").get_ffmpeg_exe()
    command = [program, "-hide_banner", "-loglevel", "error", "-y", "-nostdin", "-threads", "1", *arguments]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        said = (
            error.stderr.decode("utf-8", "replace")[-300:] if isinstance(error, subprocess.CalledProcessError) else ""
        )
        raise OpenwuError(f"ffmpeg: {said or error}") from error


def h264(image: Image.Image, quantiser: int = H264_QUANTISER) -> Image.Image:
    """Encode a picture as one frame of H.264, and decode it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2)).save(folder / "in.png")
        code = ("-c:v", "libx264", "-qp", str(quantiser), "-pix_fmt", "yuv420p")
        ffmpeg("-i", "in.png", *code, "code.mp4", folder=folder)
        ffmpeg("-i", "code.mp4", "-frames:v", "1", "out.png", folder=folder)
        with Image.open(folder / "out.png") as found:
            whole = image.copy()  # an odd last row or column, which 4:2:0 cannot hold, stays as it was
            whole.paste(found.convert("RGB"), (0, 0))
    return whole


def camera_cases(folder: Path, side: int = SIDE) -> list[Case]:
    """Read frames of a still camera against their median, and blurred photographs without truth."""
    found = []
    video = folder / "vtest.avi"
    if video.exists():
        frames = read_frames(video, FRAMES)
        truth = frames.median(0).values
        for i in range(0, FRAMES, 8):
            moved = (frames[i] - truth).abs().amax(0, keepdim=True) > STEADY
            picture = torch.where(moved, truth, frames[i])
            top, left = (frames.shape[2] - side) // 2, 24 + i * 8
            window = (slice(None), slice(top, top + side), slice(left, left + side))
            found.append(
                Case(
                    "camera",
                    NOISE,
                    (picture[window],),
                    truth[window],
                    photograph="vtest",
                    language="en",
                    key=f"camera-{i}",
                )
            )
    for name, task in (("licenseplate_motion", "shake"), ("text_motion", "shake"), ("text_defocus", "defocus")):
        file = folder / f"{name}.jpg"
        if file.exists():
            with Image.open(file) as image:
                small = image.convert("RGB")
                small.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
            found.append(Case(task, BLUR, (image_tensor(small),), photograph=name, language="en", key=f"{task}-{name}"))
    return found


def read_frames(video: Path, count: int) -> Tensor:
    """Read the first frames of a video: `[count, 3, h, w]` in 0..1. Raises OpenwuError for fewer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ffmpeg("-i", str(video.resolve()), "-frames:v", str(count), "%04d.bmp", folder=folder)
        files = sorted(folder.iterdir())
        if len(files) < count:
            raise OpenwuError(f"{video}: expected a video of at least {count} frames, got {len(files)}")
        frames = []
        for file in files:
            with Image.open(file) as image:
                frames.append(image_tensor(image))
    return torch.stack(frames)
