"""From the bytes of a picture to a square of RGB bytes, with nothing trusted.

Owns: which formats are read, the bound on what is decoded, orientation, resize and crop. Does not own: colour modes
(`models.vqgan.to_rgb`) and the network's range of values (`VQGAN.bytes_to_pixels`).
"""

import io
import struct
import warnings
from typing import Final

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dalle_torch.models.vqgan import to_rgb

EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp")
FORMATS: Final = ("JPEG", "PNG", "WEBP")
MAX_PIXELS: Final = 1 << 26
"""Pixels of the largest picture that is decoded: 8,192 x 8,192, 256 MB in memory at the worst."""
PILLOW_MAX_PIXELS: Final = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 26)
"""Beyond this Pillow itself refuses a picture."""
MAX_BYTES: Final = 1 << 26
"""Bytes of the largest file that is looked at."""

DAMAGED: Final = "image_damaged"
TOO_LARGE: Final = "image_too_large"

# The bound is our own and lower; Pillow would print its warning on the way there.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(ValueError):
    """A picture that cannot be used; `reason` is `DAMAGED` or `TOO_LARGE`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode_square(data: bytes, resolution: int, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a JPEG, PNG or WebP file into the centre square, resized (Lanczos, which does not alias).

    EXIF rotation is applied, transparency is laid over white, 16 bits become 8; of an animation the first picture is
    taken.

    Returns:
        uint8 [resolution, resolution, 3], and (width, height) of the picture as it is meant to be seen.

    Raises:
        BadImage: no picture in a known format, cut off, or larger than `max_pixels`, which is known from its header
            before anything is decoded.
    """
    try:
        _check_webp(data, max_pixels)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            _check_size(width, height, max_pixels)
            # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice what is needed leaves the resize its work.
            image.draft(None, (2 * resolution, 2 * resolution))
            image.load()
            upright, on_its_side = _upright(image)
            square = ImageOps.fit(to_rgb(upright), (resolution, resolution), method=Image.Resampling.LANCZOS)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(DAMAGED, "no JPEG, PNG or WebP") from error
    except Image.DecompressionBombError as error:
        raise BadImage(TOO_LARGE, str(error)) from error
    except MemoryError as error:
        raise BadImage(TOO_LARGE, "no memory to decode it") from error
    except Exception as error:
        # Pillow's readers raise whatever their parsing runs into.
        raise BadImage(DAMAGED, f"{type(error).__name__}: {error}") from error
    return np.asarray(square), (height, width) if on_its_side else (width, height)


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture as its EXIF data want it shown, and whether that lets width and height change places."""
    try:
        on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return ImageOps.exif_transpose(image), on_its_side
    except Exception:
        # Broken metadata; the picture itself has been decoded.
        return image, False


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(TOO_LARGE, f"{width} x {height} pixels are more than {max_pixels:,}")
    if not width or not height:
        raise BadImage(DAMAGED, f"a picture of {width} x {height} pixels")


def _check_webp(data: bytes, max_pixels: int) -> None:
    """Pillow takes the memory for a WebP picture when it opens it, so its size is read here first."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        return
    _check_size(width, height, max_pixels)
