"""Anchor boxes of a feature pyramid, as torchvision lays them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

Sizes = tuple[tuple[float, ...], ...]


class AnchorGenerator(nn.Module):
    """A drop-in for ``torchvision.models.detection.anchor_utils.AnchorGenerator``.

    Args:
        sizes: for each pyramid level, the anchors' scales: the square roots of their areas, in pixels.
        aspect_ratios: for each pyramid level, height / width.

    At every position of a feature map lie ``len(aspect_ratios) * len(sizes)`` anchors, ratio outer, scale inner, rounded
    to whole pixels (half to even) around a centre at ``(column * stride, row * stride)``. A stride is
    ``image size // feature map size`` for each axis, so that for sizes that do not divide it is not a power of two.
    Anchors are float32 whatever the dtype of the feature maps: half precision loses whole pixels above 256.

    >>> anchors = AnchorGenerator(((32, 64), (128, 256)), ((0.5, 1, 2),) * 2)
    >>> anchors.grid((800, 1344), [(100, 168), (50, 84)])  # (100 * 168 * 6 + 50 * 84 * 6, 4)
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]] = ((128, 256, 512),),
        aspect_ratios: Sequence[Sequence[float]] = ((0.5, 1.0, 2.0),),
    ) -> None:
        super().__init__()
        self.sizes = _one_tuple_a_level(sizes)
        self.aspect_ratios = _one_tuple_a_level(aspect_ratios)
        if len(self.aspect_ratios) == 1:
            self.aspect_ratios *= len(self.sizes)
        if len(self.sizes) != len(self.aspect_ratios):
            raise ValueError(
                "aspect_ratios must have an entry for each level of sizes, "
                f"{len(self.sizes)}, got {len(self.aspect_ratios)}"
            )
        for i, level in enumerate(zip(self.sizes, self.aspect_ratios, strict=True)):
            self.register_buffer(f"_cell_{i}", _cell_anchors(*level), persistent=False)

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
        image_height, image_width = image_size
        levels = []
        for (height, width), cell in zip(feature_sizes, self.cell_anchors, strict=True):
            y = torch.arange(height, device=device, dtype=torch.int32) * (image_height // height)
            x = torch.arange(width, device=device, dtype=torch.int32) * (image_width // width)
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


def _cell_anchors(scales: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Anchors around (0, 0): (len(aspect_ratios) * len(scales), 4)."""
    scale = torch.as_tensor(scales, dtype=torch.float32)
    height_ratio = torch.sqrt(torch.as_tensor(aspect_ratios, dtype=torch.float32))
    width = ((1 / height_ratio)[:, None] * scale).reshape(-1)
    height = (height_ratio[:, None] * scale).reshape(-1)
    return (torch.stack((-width, -height, width, height), dim=1) / 2).round()
