"""Pictures as people have them: any readable picture becomes a `Photo`, a `Photo` with new pixels becomes a file.

read.py: file, bytes, array, tensor or PIL image -> Photo. photo.py: what a Photo keeps. write.py: Photo -> file, whole
or not at all. Between them: source.py (bytes), containers.py and tiff.py (what files declare), decode.py (pixels),
colour.py, metadata.py, formats.py (HEIC, 16-bit PNG). mask.py: where an edit shows. instruction.py checks instructions.
"""

from __future__ import annotations

from openwu.images.mask import kept_share, masked
from openwu.images.photo import Photo
from openwu.images.read import MAX_PIXELS, PictureHeader, Readable, check_picture, read_picture
from openwu.images.write import (
    check_fits,
    check_output,
    default_suffix,
    encode_picture,
    is_picture_suffix,
    side_by_side,
    write_picture,
)

__all__ = [
    "MAX_PIXELS",
    "Photo",
    "PictureHeader",
    "Readable",
    "check_fits",
    "check_output",
    "check_picture",
    "default_suffix",
    "encode_picture",
    "is_picture_suffix",
    "kept_share",
    "masked",
    "read_picture",
    "side_by_side",
    "write_picture",
]
