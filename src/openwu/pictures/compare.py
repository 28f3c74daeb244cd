"""Before / after: two Photos of one size enter, one labelled picture to look at leaves."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from openwu.pictures.photo import Photo, profile_space

MAX_SIDE = 1600
"""Longest side of either half: a comparison is for the eye, the full size is in the output itself."""

LABEL_HEIGHT, GAP, MARGIN = 32, 8, 8


def side_by_side(before: Photo, after: Photo, labels: tuple[str, str] = ("before", "after")) -> Image.Image:
    """The two pictures next to each other under their labels, on white; scaled down where they are large."""
    halves = [_half(before), _half(after)]
    width = sum(half.width for half in halves) + GAP
    sheet = Image.new("RGB", (width, LABEL_HEIGHT + max(half.height for half in halves)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL_HEIGHT // 2)
    left = 0
    for half, label in zip(halves, labels, strict=True):
        sheet.paste(half, (left, LABEL_HEIGHT))
        draw.text((left + MARGIN, LABEL_HEIGHT // 4), label, fill="black", font=font)
        left += half.width + GAP
    if after.icc and profile_space(after.icc) == "RGB":
        sheet.info["icc_profile"] = after.icc
    return sheet


def _half(photo: Photo) -> Image.Image:
    image = photo.eight_bit().to_image()
    if photo.alpha is not None:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image
