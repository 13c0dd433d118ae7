"""A second detector: what it takes beside one row of models.detectors.DETECTORS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from focalops import AnchorGenerator
from models.config import DetectorConfig, Ranges
from models.detector import Detector
from models.ranges import whole
from models.structures import HeadOutputs


@dataclass(frozen=True)
class ToyConfig(DetectorConfig):
    kind: ClassVar[str] = "toy"
    anchor_sizes: tuple[tuple[int, ...], ...] = ((16, 24), (32, 48))
    width: int = 8

    RANGES: ClassVar[Ranges] = {"width": whole(1)}

    @property
    def size_divisor(self) -> int:
        return 16


class Toy(Detector):
    """Levels of strides 8 and 16, under one convolution for the classes and one for the boxes."""

    class_layers = ("classes.",)

    def __init__(self, config: ToyConfig, pretrained_backbone: bool = False) -> None:
        sizes, ratios = config.anchor_sizes, config.aspect_ratios
        anchors = AnchorGenerator(sizes, ratios, "detectron2", strides=(8, 16), offset=0.5)
        super().__init__(config, anchors)
        a, width = anchors.num_anchors_per_location()[0], config.width
        self.fine = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(width, width, 2, stride=2), nn.ReLU())
        self.classes = nn.Conv2d(width, a * config.num_classes, 3, padding=1)
        self.boxes = nn.Conv2d(width, a * 4, 3, padding=1)
        nn.init.constant_(self.classes.bias, -4.6)  # type: ignore[arg-type]

    def network(self, images: Tensor) -> HeadOutputs:
        fine = self.fine(images)
        levels = [fine, self.coarse(fine)]
        return HeadOutputs([self.classes(x) for x in levels], [self.boxes(x) for x in levels])
