"""A dense detector around a network: images to a batch, anchors, the loss step, detections.

A Detector takes and returns what torchvision's detection models take and return. A model of its own is a subclass that says
what the network computes, and nothing else. Shapes and their letters are those of structures.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from focalops import AnchorGenerator, batched_nms, detect

from .config import DetectorConfig
from .losses import LossStep
from .structures import Detections, HeadOutputs, PaddedDetections, Target
from .transform import transform


class Detector(nn.Module):
    # What the names of those parameters begin with whose rows, A * K, are of the classes.
    class_layers: ClassVar[tuple[str, ...]] = ()
    delta_clip: ClassVar[float] = math.log(1000 / 16)  # the clip of focalops.decode_boxes

    def __init__(self, config: DetectorConfig, anchor_generator: AnchorGenerator) -> None:
        super().__init__()
        self.config = config
        self.transform = transform(config)
        self.anchor_generator = anchor_generator
        self.loss_step = LossStep(config, config, config.finest_stride)

    def network(self, images: Tensor) -> HeadOutputs:
        """Of normalised images (B, 3, H, W), whose H and W are multiples of config.batch_divisor."""
        raise NotImplementedError(f"{type(self).__name__} has no network")

    def forward(
        self,
        images: list[Tensor],  # B of (3, H_i, W_i) in 0..1; in evaluation also uint8
        targets: list[Target] | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """The losses in training mode, the detections of each image in evaluation mode."""
        if self.training:
            check_targets(images, targets, self.config.num_classes)
        original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        outputs, anchors = self.outputs(batch.tensors)
        if self.training:
            assert targets is not None
            return self.loss_step(outputs, anchors, targets)
        detections = self.detections(outputs, anchors, batch.image_sizes)
        return self.transform.postprocess(detections, batch.image_sizes, original_sizes)

    def outputs(self, images: Tensor) -> tuple[HeadOutputs, Tensor]:
        """The network's outputs, and the anchors (N, 4): those of every image, as the batch is padded to one size."""
        outputs = self.network(images)
        sizes = [level.shape[-2:] for level in outputs.cls_logits]
        return outputs, self.anchor_generator.grid(images.shape[-2:], sizes, images.device)

    def padded_detections(
        self,
        outputs: HeadOutputs,
        anchors: Tensor,  # (N, 4)
        image_sizes: Tensor
        | Sequence[tuple[int, int]]
        | None,  # B of (height, width) before padding; None: boxes are not clipped
    ) -> PaddedDetections:
        """Score threshold and top-k, boxes of the survivors, NMS per class."""
        config = self.config
        return detect(
            outputs.cls_logits,
            outputs.box_deltas,
            anchors,
            score_threshold=config.score_threshold,
            topk_per_level=config.topk_candidates,
            iou_threshold=config.nms_threshold,
            max_detections=config.detections_per_image,
            image_sizes=image_sizes,
            clip=self.delta_clip,
            topk=config.topk,
            method=config.nms_method,
            sigma=config.nms_sigma,
        )

    def kept(self, found: Detections) -> Tensor:
        """Of detections from several looks at one image, its windows or symmetries, the indices of those that no better one
        of their class overlaps too much, by descending score."""
        return batched_nms(
            found["boxes"], found["scores"], found["labels"], self.config.nms_threshold
        )

    def detections(
        self, outputs: HeadOutputs, anchors: Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        *padded, counts = self.padded_detections(outputs, anchors, image_sizes)
        return [
            {"boxes": boxes[:count], "scores": scores[:count], "labels": labels[:count]}
            for boxes, scores, labels, count in zip(*padded, counts.tolist(), strict=True)
        ]


def check_targets(images: list[Tensor], targets: list[Target] | None, num_classes: int) -> None:
    """Labels on a GPU are not looked at: where one is no class the loss is NaN."""
    if targets is None or len(targets) != len(images):
        got = "none" if targets is None else f"{len(targets)}"
        raise ValueError(
            f"training needs one target for each of the {len(images)} images, got {got}"
        )
    for index, target in enumerate(targets):
        for name in ("boxes", "labels"):
            value = target.get(name)
            if not isinstance(value, Tensor):
                got = type(value).__name__
                raise TypeError(f"targets[{index}][{name!r}] must be a Tensor, got {got}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"targets[{index}]['boxes'] must have shape (M, 4), got {tuple(boxes.shape)}"
            )
        degenerate = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
        if degenerate.any():
            raise ValueError(
                f"targets[{index}]['boxes'] must have positive width and height, "
                f"got {boxes[degenerate][0].tolist()}"
            )
        is_integer = not (labels.is_floating_point() or labels.is_complex())
        if labels.shape != boxes.shape[:1] or not is_integer or labels.dtype == torch.bool:
            raise ValueError(
                f"targets[{index}]['labels'] must be integers of shape ({len(boxes)},), one for each "
                f"box, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.device.type == "cpu":
            wrong = labels[(labels < 0) | (labels >= num_classes)]
            if len(wrong):
                raise ValueError(
                    f"targets[{index}]['labels'] must lie in [0, {num_classes - 1}], "
                    f"got {wrong[0].item()}"
                )
