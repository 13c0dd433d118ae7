"""Anchor boxes of a feature pyramid, as torchvision lays them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

Sizes = tuple[tuple[float, ...], ...]


class AnchorGenerator(nn.Module):
    """A drop-in for ``torchvision.models.detection.anchor_utils.AnchorGenerator``, with the conventions of other detectors.

    Args:
        sizes: for each pyramid level, the anchors' scales: the square roots of their areas, in pixels.
        aspect_ratios: for each pyramid level (one entry serves all), height / width.
        convention: whose anchors these are, to the bit:

            - ``"torchvision"``: ratio outer, scale inner; rounded to whole pixels (half to even); a level's stride is
              ``image size // feature map size`` for each axis, which for sizes that do not divide is not a power of two.
            - ``"detectron2"``: scale outer, ratio inner; not rounded; ``strides`` as given.
            - ``"mmdet"``: ratio outer, scale inner; not rounded; ``strides`` as given.
        strides: for each pyramid level, the pixels from one position to the next; None with ``"torchvision"``, which
            derives them.

    At every position of a feature map lie ``len(aspect_ratios) * len(sizes)`` anchors around a centre at
    ``(column * stride, row * stride)``. Anchors are float32 whatever the dtype of the feature maps: half precision loses
    whole pixels above 256.

    >>> anchors = AnchorGenerator(((32, 64), (128, 256)), ((0.5, 1, 2),))
    >>> anchors.grid((800, 1344), [(100, 168), (50, 84)])  # (100 * 168 * 6 + 50 * 84 * 6, 4)
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]] = ((128, 256, 512),),
        aspect_ratios: Sequence[Sequence[float]] = ((0.5, 1.0, 2.0),),
        convention: str = "torchvision",
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if convention not in CELL_ANCHORS:
            names = ", ".join(repr(name) for name in CELL_ANCHORS)
            raise ValueError(f"convention must be one of {names}, got {convention!r}")
        self.sizes = _one_tuple_a_level(sizes)
        self.aspect_ratios = _one_tuple_a_level(aspect_ratios)
        if len(self.aspect_ratios) == 1:
            self.aspect_ratios *= len(self.sizes)
        if len(self.sizes) != len(self.aspect_ratios):
            raise ValueError(
                "aspect_ratios must have an entry for each level of sizes, "
                f"{len(self.sizes)}, got {len(self.aspect_ratios)}"
            )
        self.convention = convention
        self.strides = None if strides is None else tuple(strides)
        if convention == "torchvision" and strides is not None:
            raise ValueError(f"strides must be None for torchvision's convention, got {strides}")
        if convention != "torchvision" and len(strides or ()) != len(self.sizes):
            raise ValueError(
                f"strides must have an entry for each level of sizes, {len(self.sizes)}, got {strides}"
            )
        for i in range(len(self.sizes)):
            stride = self.strides[i] if self.strides else None
            cell = CELL_ANCHORS[convention](self.sizes[i], self.aspect_ratios[i], stride)
            self.register_buffer(f"_cell_{i}", cell, persistent=False)

    @property
    def cell_anchors(self) -> list[Tensor]:
        """For each level, the anchors around (0, 0): (A, 4)."""
        return [getattr(self, f"_cell_{i}") for i in range(len(self.sizes))]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnchorGenerator:
        # Anchors follow their model to its device, but stay float32 when it becomes half.
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
            if self.strides is None:
                stride_y, stride_x = image_size[0] // height, image_size[1] // width
            else:
                stride_y = stride_x = self.strides[i]
            y = torch.arange(height, device=device, dtype=torch.int32) * stride_y
            x = torch.arange(width, device=device, dtype=torch.int32) * stride_x
            y, x = torch.meshgrid(y, x, indexing="ij")
            centers = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            levels.append((centers + cell.to(device)).reshape(-1, 4))
        return torch.cat(levels)

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of each image of a padded batch: a list of one (N, 4) tensor, repeated for each image, because the
        batch is padded to one size."""
        image_size = image_list.tensors.shape[-2:]
        feature_sizes = [feature_map.shape[-2:] for feature_map in feature_maps]
        anchors = self.grid(image_size, feature_sizes, feature_maps[0].device)
        return [anchors] * len(image_list.image_sizes)


def _one_tuple_a_level(values: Sequence[Sequence[float]]) -> Sizes:
    return tuple(tuple(level) if isinstance(level, Sequence) else (level,) for level in values)


# ---- anchors around (0, 0): float32 (A, 4) -------------------------------------------------------
# Each in the very operations of its origin, because their roundings are what "to the bit" means.


def _torchvision_cell(
    sizes: Sequence[float], aspect_ratios: Sequence[float], stride: int | None
) -> Tensor:
    scale = torch.as_tensor(sizes, dtype=torch.float32)
    height_ratio = torch.sqrt(torch.as_tensor(aspect_ratios, dtype=torch.float32))
    width = ((1 / height_ratio)[:, None] * scale).reshape(-1)
    height = (height_ratio[:, None] * scale).reshape(-1)
    return (torch.stack((-width, -height, width, height), dim=1) / 2).round()


def _detectron2_cell(
    sizes: Sequence[float], aspect_ratios: Sequence[float], stride: int | None
) -> Tensor:
    cell = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2.0 / ratio)
            height = ratio * width
            cell.append((-width / 2, -height / 2, width / 2, height / 2))
    return torch.tensor(cell, dtype=torch.float32)


def _mmdet_cell(
    sizes: Sequence[float], aspect_ratios: Sequence[float], stride: int | None
) -> Tensor:
    # mmdet knows scales, multiples of the stride
    assert stride is not None
    scale = torch.tensor([size / stride for size in sizes], dtype=torch.float32)
    height_ratio = torch.sqrt(torch.as_tensor(aspect_ratios, dtype=torch.float32))
    width = (stride * (1 / height_ratio)[:, None] * scale).reshape(-1)
    height = (stride * height_ratio[:, None] * scale).reshape(-1)
    return torch.stack((-width, -height, width, height), dim=1) / 2


CELL_ANCHORS = {
    "torchvision": _torchvision_cell,
    "detectron2": _detectron2_cell,
    "mmdet": _mmdet_cell,
}
