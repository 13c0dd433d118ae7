"""Image files as tensors."""

from __future__ import annotations

import functools
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from models.data.errors import DataError


@functools.lru_cache(maxsize=8)  # large tiles are cropped again and again
def read_image(path: str | Path) -> Tensor:
    """uint8 (3, H, W), shared by all who read the same file: not to be written to."""
    try:
        with Image.open(path) as image:
            return F.pil_to_tensor(image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"the image {path} does not exist") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the image {path} cannot be read ({error})") from None
