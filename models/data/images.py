"""Image files as tensors: upright, three channels, 8 bits."""

from __future__ import annotations

import os
import stat
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..data.errors import DataError

# Pillow warns above its limit and refuses above twice the limit; here only the second counts.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# How EXIF's orientations are turned upright, and where a point (x, y) of an image of width w and height h
# then lies. The orientations from 5 on swap width and height.
UPRIGHT = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, lambda x, y, w, h: (w - x, y)),
    3: (Image.Transpose.ROTATE_180, lambda x, y, w, h: (w - x, h - y)),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, lambda x, y, w, h: (x, h - y)),
    5: (Image.Transpose.TRANSPOSE, lambda x, y, w, h: (y, x)),
    6: (Image.Transpose.ROTATE_270, lambda x, y, w, h: (h - y, x)),
    7: (Image.Transpose.TRANSVERSE, lambda x, y, w, h: (h - y, w - x)),
    8: (Image.Transpose.ROTATE_90, lambda x, y, w, h: (y, w - x)),
}

CACHED_IMAGES, CACHED_BYTES = 8, 2**28  # of a process; large tiles are cropped again and again


@dataclass(frozen=True)
class Header:
    """What a file says about its image before it is decoded."""

    size: tuple[int, int]  # width and height, upright
    raw_size: tuple[int, int]  # as the pixels are stored
    orientation: int  # EXIF's: 1 is upright
    value_range: tuple[float, float] | None  # black and white of more than 8 bits

    def turn(self, bbox: list[float]) -> list[float]:
        """A box x, y, w, h of the stored pixels as one of the upright image."""
        x, y, w, h = bbox
        turn = UPRIGHT[self.orientation][1]
        (xa, ya), (xb, yb) = turn(x, y, *self.raw_size), turn(x + w, y + h, *self.raw_size)
        return [min(xa, xb), min(ya, yb), abs(xb - xa), abs(yb - ya)]


def read_image(path: str | Path, large: bool = False) -> Tensor:
    """uint8 (3, H, W), upright as EXIF says, shared by all who read the same file: not to be written to.

    Transparency is dropped. More than 8 bits are scaled by the range of their type, floating-point numbers
    from 0..1. Of several frames it is the first. `large`: above Pillow's limit too.
    """
    status = _stat(path)
    stamp = (status.st_mtime_ns, status.st_size)
    found = _cache.pop(str(path), None)
    if found is None or found[0] != stamp:
        found = stamp, decode(path, large)
    _cache[str(path)] = found
    while len(_cache) > CACHED_IMAGES or (len(_cache) > 1 and _cached_bytes() > CACHED_BYTES):
        _cache.popitem(last=False)
    return found[1]


def decode(path: str | Path, large: bool = False) -> Tensor:
    """read_image without its cache."""
    with _open(path, large) as image:
        try:
            value_range = _value_range(image)
            image.load()
            image = _upright(image)
            pixels = _rgb(image) if value_range is None else _scaled(image, *value_range)
        except MemoryError:
            raise
        except Exception as error:  # what decoders raise over a damaged file has no common class
            raise DataError(f"the image {path} cannot be read ({_reason(error)})") from None
    return F.pil_to_tensor(pixels) if isinstance(pixels, Image.Image) else pixels


def read_header(path: str | Path, large: bool = False) -> Header:
    with _open(path, large) as image:
        try:
            orientation = _orientation(image)
            tags = getattr(
                image, "tag_v2", None
            )  # Pillow gives a TIFF's size upright, others' as stored
            width, height = image.size if tags is None else (int(tags[256]), int(tags[257]))
            size = (height, width) if orientation >= 5 else (width, height)
            return Header(size, (width, height), orientation, _value_range(image))
        except Exception as error:
            raise DataError(f"the image {path} cannot be read ({_reason(error)})") from None


_cache: OrderedDict[str, tuple[tuple[int, int], Tensor]] = OrderedDict()


def _cached_bytes() -> int:
    return sum(image.nbytes for _, image in _cache.values())


def _stat(path: str | Path) -> os.stat_result:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"the image {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"the image {path} cannot be read ({_reason(error)})") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"the image {path} is not a file")
    if status.st_size == 0:
        raise DataError(f"the image {path} is empty")
    return status


def _open(path: str | Path, large: bool) -> Image.Image:
    _stat(path)
    if large:
        Image.MAX_IMAGE_PIXELS = None
    try:
        return Image.open(path)
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(
            f"the image {path} has more than {limit:,} pixels; --large-images reads it nevertheless"
        ) from None
    except UnidentifiedImageError:
        raise DataError(f"the image {path} cannot be read (no format that Pillow knows)") from None
    except Exception as error:
        raise DataError(f"the image {path} cannot be read ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block, which viewers pass over too
        return 1
    return value if value in UPRIGHT else 1


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)  # none in a TIFF, which Pillow has turned while loading
    return image if orientation == 1 else image.transpose(UPRIGHT[orientation][0])


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("P", "PA", "La", "RGBa"):  # by way of what Pillow converts to RGB in silence
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


def _value_range(image: Image.Image) -> tuple[float, float] | None:
    """The values of black and white where they are not 0 and 255.

    TIFF's MaxSampleValue is no such value: it is a statistic of each image.
    """
    if image.mode == "F":
        return 0.0, 1.0
    if not image.mode.startswith("I"):
        return None
    tags: Any = getattr(image, "tag_v2", None)
    if tags is None:  # PNG, PGM, JPEG 2000
        return 0.0, 65535.0
    bits, sample_format = (_first(tags.get(tag, 1)) for tag in (258, 339))
    if bits > 16:
        raise ValueError(f"{bits}-bit integers have no known black and white: save 8 or 16 bits")
    low, high = (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if sample_format == 2 else (0, 2**bits - 1)
    )
    return (high, low) if tags.get(262) == 0 else (low, high)  # 0: white is zero


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)


def _scaled(image: Image.Image, low: float, high: float) -> Tensor:
    values = np.asarray(image).astype(np.float32)
    if image.mode == "F" and not (values.min() >= low and values.max() <= high):
        raise ValueError(
            f"floating-point values must be from 0 to 1, and are {values.min():g} to {values.max():g}"
        )
    pixels = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
    return torch.from_numpy(pixels).expand(3, *pixels.shape).contiguous()
