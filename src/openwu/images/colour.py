"""Turn colour that a file declares without an ICC profile into such a profile or sRGB; apply profiles that cannot stay.

Shapes: h, w the sides of a picture; pixels `[h, w, 3]` of 8 or 16 bits.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from openwu.errors import PictureError

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Chromaticities = tuple[float, float, float, float, float, float, float, float]
"""x and y of white, red, green and blue."""

D65 = (0.3127, 0.3290)
SRGB: Chromaticities = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE_RGB: Chromaticities = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)

PRIMARIES: dict[int, tuple[str, Chromaticities]] = {
    4: ("BT.470 M", (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08)),
    5: ("BT.470 BG", (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06)),
    6: ("SMPTE 170M", (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070)),
    7: ("SMPTE 240M", (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070)),
    8: ("film", (0.310, 0.316, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049)),
    9: ("BT.2020", (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)),
    11: ("DCI-P3", (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)),
    12: ("Display P3", (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)),
    22: ("EBU 3213", (*D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077)),
}
"""ColourPrimaries of ITU-T H.273 beside sRGB's own (1) and "unspecified" (2)."""

GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
"""TransferCharacteristics of H.273 that are a power."""

DISPLAY_CURVES = frozenset((0, 1, 2, 3, 6, 7, 11, 12, 13, 14, 15))
"""TransferCharacteristics that displays show with the sRGB curve: sRGB, unspecified, and BT.709 with its relatives."""

ORDINARY_GAMMA = (1.7, 2.9)
"""Exponents that stay as they are, in an ICC profile; pixels of others (linear light) get the sRGB curve."""


@dataclass(frozen=True)
class Colour:
    """A declared colour space: chromaticities and the exponent of its curve (None: the sRGB curve)."""

    origin: str
    """What declared it, in words for the user: "its cICP chunk"."""
    name: str = "own"
    primaries: Chromaticities = SRGB
    gamma: float | None = None

    @property
    def plain(self) -> bool:
        """Whether this is sRGB, or differs from it by less than anyone sees."""
        return self._plain_primaries and (self.gamma is None or abs(self.gamma - 2.2) < 0.05)

    @property
    def _plain_primaries(self) -> bool:
        return max(abs(mine - srgb) for mine, srgb in zip(self.primaries, SRGB, strict=True)) < 0.002

    def applied(self, pixels: Pixels, *, grey: bool) -> tuple[Pixels, bytes | None, str | None]:
        """(pixels, the ICC profile that they are in or None for sRGB, a note or None)."""
        plain = self._plain_primaries or grey
        gamma, note = self.gamma, None
        low, high = ORDINARY_GAMMA
        if gamma is not None and not self.plain and (plain or not low <= gamma <= high):
            pixels, note = _to_srgb_curve(pixels, gamma), f"gamma {gamma:.3g}"
            gamma = None
        if not plain:
            kept = f"{self.origin} ({self.name} colours) is kept as an ICC profile"
            note = kept if note is None else f"{kept}; converted from {note} to the sRGB curve"
            return pixels, matrix_profile(self.name, self.primaries, gamma), note
        return pixels, None, None if note is None else f"converted from {note} to sRGB by {self.origin}"


def from_h273(primaries: int, transfer: int, origin: str, name: str) -> Colour:
    """The colour space that code points of ITU-T H.273 name. PictureError for HDR; `name` is the picture's."""
    if transfer in (16, 18):
        kind = "PQ" if transfer == 16 else "HLG"
        raise PictureError(
            f"{name}: expected a standard-range picture, got HDR ({kind}, by {origin}); "
            "convert it to SDR (tone mapping) and save that"
        )
    if transfer not in GAMMAS and transfer not in DISPLAY_CURVES:
        raise PictureError(
            f"{name}: {origin} declares the transfer characteristics {transfer}, which are not supported; "
            "convert it to sRGB first"
        )
    label, points = PRIMARIES.get(primaries, ("sRGB", SRGB))
    if primaries not in PRIMARIES and primaries > 2:
        raise PictureError(
            f"{name}: {origin} declares the primaries {primaries}, which are not supported; convert it to sRGB first"
        )
    return Colour(origin, label, points, GAMMAS.get(transfer))


def named(points: Chromaticities) -> str:
    """The name of known chromaticities."""
    for name, known in (*PRIMARIES.values(), ("Adobe RGB", ADOBE_RGB)):
        if max(abs(a - b) for a, b in zip(points, known, strict=True)) < 0.002:
            return name
    return "own"


def valid_chromaticities(points: tuple[float, ...]) -> bool:
    """Whether four points can span a colour space: none is off the plane, and the triangle has an inside."""
    if len(points) != 8 or not all(0 < value <= 1 for value in points[1::2]) or not all(0 <= v <= 1 for v in points):
        return False
    (ax, ay), (bx, by), (cx, cy) = points[2:4], points[4:6], points[6:8]
    return abs((bx - ax) * (cy - ay) - (cx - ax) * (by - ay)) > 0.01


def colour_of_info(info: dict[Any, Any]) -> Colour | None:
    """Colour without a profile, as far as Pillow and pillow-heif report it of an image that the caller opened."""
    if info.get("icc_profile") or "srgb" in info:
        return None
    nclx, points, gamma = info.get("nclx_profile"), info.get("chromaticity"), info.get("gamma")
    if isinstance(nclx, dict):
        return from_h273(nclx["color_primaries"], nclx["transfer_characteristics"], "its nclx box", "picture")
    exponent = 1 / gamma if isinstance(gamma, float) and 0.1 <= gamma <= 10 else None
    if isinstance(points, tuple) and valid_chromaticities(points):
        x, y, rx, ry, gx, gy, bx, by = points
        chosen = (x, y, rx, ry, gx, gy, bx, by)
        return Colour("its chromaticities", named(chosen), chosen, exponent)
    return Colour("its gamma", gamma=exponent) if exponent else None


def profile_space(icc: bytes) -> str:
    """The colour space that an ICC profile's header names: "RGB", "GRAY", "CMYK", ...; empty for a broken profile."""
    return icc[16:20].decode("ascii", "replace").strip() if len(icc) >= 128 else ""


def matrix_profile(name: str, primaries: Chromaticities, gamma: float | None) -> bytes:
    """An ICC profile (version 4, matrix and curve) of an RGB space."""
    adapt = _bradford(_xyz(primaries[0], primaries[1]))
    columns = adapt @ _rgb_to_xyz(primaries)
    curve = (
        b"para" + struct.pack(">IHHi", 0, 0, 0, _fixed(gamma))
        if gamma is not None
        else b"para" + struct.pack(">IHH5i", 0, 3, 0, *map(_fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    )
    blocks = {
        b"desc": _text(name),
        b"cprt": _text("No copyright"),
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", *map(_fixed, _D50)),
        b"chad": b"sf32" + bytes(4) + struct.pack(">9i", *map(_fixed, adapt.ravel())),
    }
    for channel, column in zip((b"r", b"g", b"b"), columns.T, strict=True):
        blocks[channel + b"XYZ"] = b"XYZ " + bytes(4) + struct.pack(">3i", *map(_fixed, column))
        blocks[channel + b"TRC"] = curve
    start, table, body = 132 + 12 * len(blocks), struct.pack(">I", len(blocks)), b""
    for tag, block in blocks.items():
        table += tag + struct.pack(">II", start + len(body), len(block))
        body += block + bytes(-len(block) % 4)
    head = struct.pack(">I4sI", start + len(body), bytes(4), 0x04200000) + b"mntrRGB XYZ "
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", *map(_fixed, _D50))
    return head + bytes(128 - len(head)) + table + body


_D50 = (0.9642, 1.0, 0.8249)
_CONE = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
"""Bradford's matrix, XYZ -> cone responses."""


def _xyz(x: float, y: float) -> NDArray[np.float64]:
    return np.array([x / y, 1, (1 - x - y) / y])


def _rgb_to_xyz(primaries: Chromaticities) -> NDArray[np.float64]:
    columns = np.stack([_xyz(*primaries[position : position + 2]) for position in (2, 4, 6)], axis=1)
    scaled: NDArray[np.float64] = columns * np.linalg.solve(columns, _xyz(primaries[0], primaries[1]))
    return scaled


def _bradford(white: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adapts XYZ from this white to D50."""
    gains = np.diag((_CONE @ np.array(_D50)) / (_CONE @ white))
    adapted: NDArray[np.float64] = np.linalg.inv(_CONE) @ gains @ _CONE
    return adapted


def _fixed(value: float) -> int:
    """s15Fixed16Number"""
    return round(float(value) * 65536)


def _text(text: str) -> bytes:
    """multiLocalizedUnicodeType"""
    encoded = text.encode("utf-16-be")
    return b"mluc" + struct.pack(">III2s2sII", 0, 1, 12, b"en", b"US", len(encoded), 28) + encoded


def _to_srgb_curve(pixels: Pixels, gamma: float) -> Pixels:
    top = np.iinfo(pixels.dtype).max
    light = np.linspace(0, 1, top + 1) ** gamma
    curve = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    whole: Pixels = np.rint(curve * top).astype(pixels.dtype)[pixels]
    return whole


def grey_profile_to_srgb(pixels: Pixels, icc: bytes) -> Pixels:
    """Pixels whose three channels each follow a greyscale profile's tone curve -> sRGB."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        image = ImageCms.profileToProfile(ramp, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return pixels
    curve, top = np.asarray(image)[0, :, 0], np.iinfo(pixels.dtype).max
    table = np.interp(np.linspace(0, 255, top + 1), np.arange(256), curve) * (top / 255)
    whole: Pixels = np.rint(table).astype(pixels.dtype)[pixels]
    return whole


def print_to_srgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    """CMYK or Lab -> sRGB through its own profile, or by Pillow's plain formula where there is none."""
    if image.mode == "CMYK" and icc:
        try:
            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(icc)),
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError):
            notes.append("its CMYK profile is damaged; converted without it")
    return image.convert("RGB")


def fitting_profile(icc: Any, mode: str, notes: list[str]) -> bytes | None:
    """Return the ICC profile, or None with a note where it does not describe pixels of this Pillow mode."""
    if not isinstance(icc, bytes) or not icc:
        return None
    space = profile_space(icc)
    if mode == "CMYK" or space == "RGB" or not space:
        return icc
    if space == "GRAY" and mode in ("1", "L", "LA", "La", "I", "I;16", "I;16B"):
        return icc
    notes.append(f"its {space} profile does not fit its pixels and was left out")
    return None
