"""Anchor boxes of a feature pyramid, as torchvision lays them out."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from focalops._arguments import choice, flag, number

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

Sizes = tuple[tuple[float, ...], ...]
Stride = tuple[float, float]  # x, y


class AnchorGenerator(nn.Module):
    """A drop-in for ``torchvision.models.detection.anchor_utils.AnchorGenerator``, with the conventions of other detectors.

    Where torchvision is installed, an instance is one of torchvision's class too: its detectors ask for that.

    Args:
        sizes: for each pyramid level, the anchors' scales: the square roots of their areas, in pixels. Plain numbers are one
            for each level; with ``"detectron2"``, as there, all of them are every level's.
        aspect_ratios: for each pyramid level (one entry serves all), height / width; plain numbers are every level's. With
            ``"efficientdet"`` they are width / height, or pairs of factors of the width and the height, and every level's.
        convention: whose anchors these are, to the bit:

            - ``"torchvision"``: ratio outer, scale inner; rounded to whole pixels (half to even); a level's stride is
              ``image size // feature map size`` for each axis, which for sizes that do not divide is not a power of two.
            - ``"detectron2"``: scale outer, ratio inner; not rounded; ``strides`` as given.
            - ``"mmdet"``: ratio outer, scale inner, or the reverse without ``scale_major``; not rounded; ``strides`` as given.
            - ``"efficientdet"``: scale outer, ratio inner; not rounded; centres half a stride off. A level's stride is
              ``image size / feature map size``, and ``sizes`` are those at the nominal ``strides``: where a feature map's
              size was rounded up the anchors shrink with its stride. Computed in float64, rounded once.
        strides: for each pyramid level, the pixels from one position to the next, or those of x and y; None with
            ``"torchvision"``, which derives them.
        offset: how far the first centre is from the image's corner, as a share of the stride, in [0, 1): ``offset`` of
            detectron2, ``center_offset`` of mmdet (there of the lesser of the strides of x and y). Of these conventions.
        scale_major: of the convention ``"mmdet"``.

    At every position of a feature map lie ``len(aspect_ratios) * len(sizes)`` anchors around a centre at
    ``((column + offset) * stride, (row + offset) * stride)``. Anchors are float32 whatever the dtype of the feature maps:
    half precision loses whole pixels above 256.

    >>> anchors = AnchorGenerator(((32, 64), (128, 256)), (0.5, 1, 2))
    >>> anchors.grid((800, 1344), [(100, 168), (50, 84)])  # (100 * 168 * 6 + 50 * 84 * 6, 4)
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> AnchorGenerator:
        return super().__new__(_class_of_torchvision() if cls is AnchorGenerator else cls)

    def __init__(
        self,
        sizes: Sequence[float] | Sequence[Sequence[float]] = ((128, 256, 512),),
        aspect_ratios: Sequence[float] | Sequence[Sequence[Any]] = ((0.5, 1.0, 2.0),),
        convention: str = "torchvision",
        strides: Sequence[float | Sequence[float]] | None = None,
        *,
        offset: float = 0.0,
        scale_major: bool = True,
    ) -> None:
        nn.Module.__init__(self)  # not torchvision's, which would make anchors of its own
        self.convention = choice("convention", convention, tuple(CELL_ANCHORS))
        offset, scale_major = number("offset", offset), flag("scale_major", scale_major)
        self.strides = _check_strides(strides, convention)
        levels = None if self.strides is None else len(self.strides)
        self.sizes, self.aspect_ratios = _levels(sizes, aspect_ratios, convention, levels)
        if levels not in (None, len(self.sizes)):
            raise ValueError(
                f"strides must have an entry for each level of sizes, {len(self.sizes)}, got {strides}"
            )
        takes_offset = convention in ("detectron2", "mmdet")
        if not 0 <= offset < 1 or (offset != 0 and not takes_offset):
            range_ = "lie in [0, 1)" if takes_offset else f"be 0 for {convention}'s convention"
            raise ValueError(f"offset must {range_}, got {offset}")
        if not scale_major and convention != "mmdet":
            raise ValueError(
                f"scale_major must be True unless convention is 'mmdet', got {convention!r}"
            )
        self.offset, self.scale_major = offset, scale_major
        for i, (scales, ratios) in enumerate(zip(self.sizes, self.aspect_ratios, strict=True)):
            cell = self._cell(scales, ratios, self.strides[i] if self.strides else None)
            self.register_buffer(f"_cell_{i}", cell, persistent=False)

    def _cell(self, sizes: Sequence[float], ratios: Sequence[Any], stride: Stride | None) -> Tensor:
        if self.convention != "mmdet":
            return CELL_ANCHORS[self.convention](sizes, ratios)
        assert stride is not None
        return _mmdet_cell(sizes, ratios, min(stride), self.offset, self.scale_major)

    @property
    def cell_anchors(self) -> list[Tensor]:
        """For each level, the anchors around (0, 0): (A, 4)."""
        return [getattr(self, f"_cell_{i}") for i in range(len(self.sizes))]

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """As torchvision's, but that the dtype stays."""
        self.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnchorGenerator:
        # Anchors follow their model to its device, but keep their precision when it becomes half.
        cells = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, cell in cells.items():
            moved = self._buffers[name]
            if moved is not None and cell is not None:
                self._buffers[name] = cell.to(moved.device)
        return self

    def num_anchors_per_location(self) -> list[int]:
        """For each level, the number of anchors at a position of its feature map."""
        return [len(cell) for cell in self.cell_anchors]

    def grid(
        self,
        image_size: Sequence[int],
        feature_sizes: Sequence[Sequence[int]],
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The anchors of an image of ``(height, width)`` whose feature maps have these ``(height, width)``: float32
        (N, 4), xyxy in pixels, in the order level, row, column, anchor."""
        if len(feature_sizes) != len(self.cell_anchors):
            raise ValueError(
                f"feature_sizes must have an entry for each level, {len(self.cell_anchors)}, "
                f"got {len(feature_sizes)}"
            )
        levels = []
        for i, ((height, width), cell) in enumerate(
            zip(feature_sizes, self.cell_anchors, strict=True)
        ):
            cell = cell.to(device)
            along_x, along_y = cell[:, 0::2], cell[:, 1::2]  # (A, 2)
            dtype = torch.float32
            stride_x: float
            stride_y: float
            if self.strides is None:
                stride_x, stride_y = image_size[1] // width, image_size[0] // height
                dtype = torch.int32
            elif self.convention == "efficientdet":
                stride_x, stride_y = image_size[1] / width, image_size[0] / height
                nominal_x, nominal_y = self.strides[i]
                dtype = torch.float64
                along_x = along_x * (stride_x / nominal_x)
                along_y = along_y * (stride_y / nominal_y)
            else:
                stride_x, stride_y = self.strides[i]
            x = torch.arange(width, device=device, dtype=dtype) * stride_x
            y = torch.arange(height, device=device, dtype=dtype) * stride_y
            if self.convention == "efficientdet":
                x, y = x + stride_x / 2, y + stride_y / 2
            elif self.convention == "detectron2":
                x, y = x + self.offset * stride_x, y + self.offset * stride_y
            # Rounded along each axis alone; what is added to it then is 0.
            columns = cell.new_zeros((width, len(cell), 4), dtype=torch.float32)
            rows = cell.new_zeros((height, 1, len(cell), 4), dtype=torch.float32)
            columns[..., 0::2] = x[:, None, None] + along_x
            rows[..., 1::2] = y[:, None, None, None] + along_y
            levels.append((columns + rows).reshape(-1, 4))
        return torch.cat(levels)

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of each image of a padded batch, (N, 4): the same values, because the batch is padded to one size, in a
        tensor of its own, as torchvision's. :meth:`grid` makes one."""
        image_size = image_list.tensors.shape[-2:]
        feature_sizes = [feature_map.shape[-2:] for feature_map in feature_maps]
        anchors = self.grid(image_size, feature_sizes, feature_maps[0].device)
        copies = len(image_list.image_sizes) - 1
        return [anchors, *(anchors.clone() for _ in range(copies))][: copies + 1]


@functools.cache
def _class_of_torchvision() -> type[AnchorGenerator]:
    """AnchorGenerator as a subclass of torchvision's, too, where there is one. Not at import: torchvision takes a second."""
    try:
        from torchvision.models.detection.anchor_utils import AnchorGenerator as Peer
    except Exception:  # not installed, or for another torch
        return AnchorGenerator
    members = {
        "__module__": __name__,
        "__qualname__": "TorchvisionAnchorGenerator",  # as pickle finds it
        "__doc__": AnchorGenerator.__doc__,
    }
    return type("AnchorGenerator", (AnchorGenerator, Peer), members)


def __getattr__(name: str) -> Any:
    if name == "TorchvisionAnchorGenerator":
        return _class_of_torchvision()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- arguments ----------------------------------------------------------------------------------


def _levels(
    sizes: Any, aspect_ratios: Any, convention: str, levels: int | None
) -> tuple[Sizes, Sizes]:
    """Both with a tuple for each level."""
    sizes, aspect_ratios = _as_tuple("sizes", sizes), _as_tuple("aspect_ratios", aspect_ratios)
    if convention == "detectron2":
        sizes = (sizes,) if _are_numbers(sizes) else sizes
        sizes *= levels if len(sizes) == 1 and levels else 1
    elif _are_numbers(sizes):
        sizes = tuple((size,) for size in sizes)
    if convention == "efficientdet" or _are_numbers(aspect_ratios):
        aspect_ratios = (aspect_ratios,)
    if len(aspect_ratios) == 1:
        aspect_ratios *= len(sizes)
    if len(sizes) != len(aspect_ratios):
        raise ValueError(
            "aspect_ratios must have an entry for each level of sizes, "
            f"{len(sizes)}, got {len(aspect_ratios)}"
        )
    _check_are_positive("sizes", sizes)
    _check_are_positive("aspect_ratios", aspect_ratios, pairs=convention == "efficientdet")
    return tuple(map(tuple, sizes)), tuple(map(tuple, aspect_ratios))


def _check_are_positive(name: str, levels: tuple[Any, ...], pairs: bool = False) -> None:
    for level in levels:
        if isinstance(level, numbers.Real):
            raise ValueError(f"{name} must be numbers or a list for each level, got {levels}")
        for value in _as_tuple(name, level):
            is_pair = pairs and isinstance(value, (tuple, list)) and len(value) == 2
            if not all(map(_is_positive, value if is_pair else (value,))):
                kind = "numbers > 0 or pairs of them" if pairs else "numbers > 0"
                raise ValueError(f"{name} must be {kind}, got {value}")


def _as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        kind = type(values).__name__
        raise TypeError(f"{name} must be numbers or a list for each level, got {kind}")
    return tuple(values)


def _is_positive(value: Any) -> bool:
    return isinstance(value, numbers.Real) and float(value) > 0


def _are_numbers(values: tuple[Any, ...]) -> bool:
    return bool(values) and all(isinstance(value, numbers.Real) for value in values)


def _check_strides(strides: Any, convention: str) -> tuple[Stride, ...] | None:
    if convention == "torchvision":
        if strides is not None:
            raise ValueError(f"strides must be None for torchvision's convention, got {strides}")
        return None
    if strides is None:
        raise ValueError("strides must have an entry for each level of sizes, got None")
    pairs = tuple(
        (stride, stride) if isinstance(stride, numbers.Real) else _as_tuple("strides", stride)
        for stride in _as_tuple("strides", strides)
    )
    if not all(len(pair) == 2 and all(map(_is_positive, pair)) for pair in pairs):
        raise ValueError(f"strides must be numbers > 0 or pairs of them, x and y, got {strides}")
    return pairs


# ---- anchors around (0, 0): (A, 4), float32 but for the last -------------------------------------
# Each in the very operations of its origin, because their roundings are what "to the bit" means.


def _torchvision_cell(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    scale = torch.as_tensor(sizes, dtype=torch.float32)
    height_ratio = torch.sqrt(torch.as_tensor(aspect_ratios, dtype=torch.float32))
    width = ((1 / height_ratio)[:, None] * scale).reshape(-1)
    height = (height_ratio[:, None] * scale).reshape(-1)
    return (torch.stack((-width, -height, width, height), dim=1) / 2).round()


def _detectron2_cell(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    cell = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2.0 / ratio)
            height = ratio * width
            cell.append((-width / 2, -height / 2, width / 2, height / 2))
    return torch.tensor(cell, dtype=torch.float32).reshape(-1, 4)


def _mmdet_cell(
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    stride: float = 1,
    offset: float = 0,
    scale_major: bool = True,
) -> Tensor:
    # mmdet knows scales, multiples of the stride
    scale = torch.tensor([size / stride for size in sizes], dtype=torch.float32)
    height_ratio = torch.sqrt(torch.as_tensor(aspect_ratios, dtype=torch.float32))
    if scale_major:
        width = (stride * (1 / height_ratio)[:, None] * scale).reshape(-1)
        height = (stride * height_ratio[:, None] * scale).reshape(-1)
    else:
        width = (stride * scale[:, None] * (1 / height_ratio)).reshape(-1)
        height = (stride * scale[:, None] * height_ratio).reshape(-1)
    center = offset * stride
    half_width, half_height = 0.5 * width, 0.5 * height
    corners = (center - half_width, center - half_height, center + half_width, center + half_height)
    return torch.stack(corners, dim=1)


def _efficientdet_cell(sizes: Sequence[float], aspect_ratios: Sequence[Any]) -> Tensor:
    cell = []
    for size in sizes:
        for ratio in aspect_ratios:
            is_number = isinstance(ratio, numbers.Real)
            x, y = (math.sqrt(ratio), 1 / math.sqrt(ratio)) if is_number else ratio
            width, height = size * x, size * y
            cell.append((-width / 2, -height / 2, width / 2, height / 2))
    return torch.tensor(cell, dtype=torch.float64).reshape(-1, 4)


CELL_ANCHORS: dict[str, Callable[..., Tensor]] = {
    "torchvision": _torchvision_cell,
    "detectron2": _detectron2_cell,
    "mmdet": _mmdet_cell,
    "efficientdet": _efficientdet_cell,
}
