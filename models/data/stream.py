"""The stream of training samples."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..data.coco import CocoDataset, Target
from ..data.errors import DataError
from ..data.jitter import ScaleJitter


class TrainingStream(Dataset):
    """A whole training run as a sequence of samples, the same however it is cut or loaded.

    Every pass over the data is a new permutation. Each sample is augmented with random numbers of
    its own, so that neither the number of workers nor an interruption changes it. Crowd regions
    stand among the boxes, with the label 0, and "iscrowd" (M,) tells them.
    """

    def __init__(
        self,
        data: CocoDataset,
        num_samples: int,
        seed: int,
        crop: int | None = None,
        crop_zoom: tuple[float, float] = (1.0, 1.0),
        dihedral: bool = False,
        photometric: bool = False,
        jitter: ScaleJitter | None = None,
    ) -> None:
        if len(data) == 0:
            raise DataError(f"{data.annotation_file} has no images")
        if not data.has_annotations:
            raise DataError(f"{data.annotation_file} has no annotations to train on, only images")
        if not data.categories:
            raise DataError(f"{data.annotation_file} has no categories to train on")
        self.data, self.num_samples, self.seed = data, num_samples, seed
        self.crop, self.crop_zoom, self.jitter = crop, crop_zoom, jitter
        transforms: list[v2.Transform] = [v2.RandomHorizontalFlip()]
        if dihedral:
            quarter_turn = v2.RandomRotation((90, 90), expand=True)
            transforms += [v2.RandomVerticalFlip(), v2.RandomApply([quarter_turn], p=0.5)]
        if photometric:
            transforms.append(
                v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.5, hue=0.05)
            )
        transforms += [v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose(transforms)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # an epoch and its permutation

    def __len__(self) -> int:
        return self.num_samples

    def _index(self, n: int) -> int:
        epoch, position = divmod(n, len(self.data))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, 0, epoch))
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        return int(self._order[1][position])

    def image_path(self, n: int) -> Path:
        """The file that sample n is made of."""
        return self.data.image_path(self._index(n))

    def __getitem__(self, n: int) -> tuple[Tensor, Target]:
        image, target = self.data[self._index(n)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, 1, n))
            boxes = torch.cat([target["boxes"], target["crowd_boxes"]])
            labels = torch.cat([target["labels"], torch.full((len(target["crowd_boxes"]),), CROWD)])
            if self.crop is not None:
                image, boxes, labels = random_crop(image, boxes, labels, self.crop, self.crop_zoom)
            if self.jitter is not None:
                image, boxes, labels = self.jitter(image, boxes, labels)
            size = (image.shape[-2], image.shape[-1])
            wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)  # type: ignore[call-arg]
            image, wrapped = self.transform(tv_tensors.Image(image), wrapped)
        image = image.as_subclass(Tensor)
        return image if self.jitter is None else self.jitter.pad(image), {
            "boxes": wrapped.as_subclass(Tensor),
            "labels": labels.clamp(min=0),
            "iscrowd": labels == CROWD,
        }


CROWD = -1  # the label of crowd regions while samples are made


def mix(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def random_crop(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    size: int,
    zoom: tuple[float, float],
    around_box: float = 0.8,
    min_visible: float = 0.4,
) -> tuple[Tensor, Tensor, Tensor]:
    """A square of size / zoom pixels, resized to size x size; zoom is drawn log-uniformly.

    The square lies around the centre of a random box with probability around_box, else anywhere:
    large photographs are mostly empty. An object's box stays if at least min_visible of its area
    does, a crowd region if anything does.
    """
    low, high = (math.log(z) for z in zoom)
    side = round(size / math.exp(low + (high - low) * torch.rand(()).item()))
    height, width = min(side, image.shape[-2]), min(side, image.shape[-1])
    free = torch.tensor([image.shape[-1] - width, image.shape[-2] - height])  # of left, top
    corner = torch.rand(2) * (free + 1)
    objects = boxes[labels != CROWD]
    if len(objects) and torch.rand(()) < around_box:
        box = objects[torch.randint(len(objects), ())]
        corner = (box[:2] + box[2:]) / 2 - torch.rand(2) * torch.tensor([width, height])
    left, top = torch.minimum(corner.clamp(min=0).long(), free).tolist()
    clipped = (boxes - boxes.new_tensor([left, top, left, top])).clamp(min=0)
    clipped = torch.minimum(clipped, boxes.new_tensor([width, height, width, height]))
    needed = torch.where(labels == CROWD, 1.0, min_visible * area(boxes))  # 1: a pixel
    keep = area(clipped) >= needed
    out_height, out_width = round(height * size / side), round(width * size / side)
    image = F.resized_crop(image, top, left, height, width, [out_height, out_width])
    scale = boxes.new_tensor([out_width / width, out_height / height] * 2)
    limit = boxes.new_tensor([out_width, out_height] * 2)  # where rounding would lead out
    return image, torch.minimum(clipped[keep] * scale, limit), labels[keep]


def area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in samples], [target for _, target in samples]
