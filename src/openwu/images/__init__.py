"""Pictures as people have them: a path or PIL image enters as a `Photo`, a `Photo` with new pixels leaves as a file.

read.py: file -> Photo. photo.py: what a Photo keeps. write.py: Photo -> file, whole or not at all. formats.py: HEIC and
16-bit colour, with the extra `formats`. compare.py: two Photos -> one before / after picture.
"""

from __future__ import annotations

from openwu.images.photo import Photo
from openwu.images.read import MAX_PIXELS, PictureHeader, check_picture, read_picture
from openwu.images.write import check_fits, check_output, default_suffix, is_picture_suffix, side_by_side, write_picture

__all__ = [
    "MAX_PIXELS",
    "Photo",
    "PictureHeader",
    "check_fits",
    "check_output",
    "check_picture",
    "default_suffix",
    "is_picture_suffix",
    "read_picture",
    "side_by_side",
    "write_picture",
]
