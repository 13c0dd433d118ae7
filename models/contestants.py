"""What `bench` times: a detector of ours, a RetinaNet of torchvision's and an EfficientDet of effdet's, phase by phase.

A contestant keeps what a phase leaves for the next ones. Its outputs are a flat list of the network's, so that the loss
and what is behind it can be had apart from the network.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Protocol, runtime_checkable

import torch
import torchvision
from torch import Tensor, nn

from .detector import Detector
from .detectors import create, named
from .efficientdet import EfficientDet
from .retinanet import RetinaNet
from .structures import Detections, HeadOutputs, Target

TORCHVISIONS = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")


class Contestant(Protocol):
    @property
    def model(self) -> nn.Module: ...

    def forward(self, images: list[Tensor], targets: list[Target]) -> list[Tensor]:
        """The images' transform and the network."""

    def loss(self, outputs: list[Tensor]) -> Tensor:
        """Anchors, matching and losses of the images of the last forward."""

    def detections(self, outputs: list[Tensor], soft: bool = False) -> list[Detections]:
        """Of the same images; with `soft` by gaussian soft NMS, where it is the model's own."""

    def inference(self, images: list[Tensor]) -> list[Detections]: ...


@runtime_checkable
class WithPyramid(Contestant, Protocol):
    """A contestant with a BiFPN."""

    def features(self) -> list[Tensor]:
        """What its backbone makes of the images of the last forward."""

    def pyramid(self, features: list[Tensor]) -> list[Tensor]: ...


def contestants(
    name: str, images: list[Tensor], num_classes: int, size: tuple[int, int]
) -> dict[str, Contestant]:
    """Ours, and before it whose model it is a copy of, if that is installed, with the same weights.

    The images show what fresh heads give; the weights are then such that they find something.
    """
    if name in TORCHVISIONS:
        return with_torchvision(name, images[0], num_classes, size)
    config = named(name)
    least = max(size) if config.letterbox else min(size)
    config = dataclasses.replace(
        config, num_classes=num_classes, min_size=least, max_size=max(size)
    )
    effdets = effdet_config(name, num_classes, max(size))
    if effdets is not None:
        return with_effdet(effdets, images)
    ours = Ours(create(config).to(images[0].device))
    last = [n for n, _ in ours.model.named_parameters() if n.startswith(ours.model.class_layers)]
    let_be_chosen(ours, images, *(ours.model.get_parameter(name) for name in last[-2:]))
    return {"focalops": ours}


class Ours:
    def __init__(self, model: Detector) -> None:
        self.model = model

    def forward(self, images: list[Tensor], targets: list[Target]) -> list[Tensor]:
        self.batch, self.targets = self.model.transform(images, targets)
        outputs = self.model.network(self.batch.tensors)
        return [*outputs.cls_logits, *outputs.box_deltas]

    def parts(self, outputs: list[Tensor]) -> tuple[HeadOutputs, Tensor]:
        half = len(outputs) // 2
        levels, images = HeadOutputs(outputs[:half], outputs[half:]), self.batch.tensors
        sizes = [level.shape[-2:] for level in levels.cls_logits]
        anchors = self.model.anchor_generator.grid(images.shape[-2:], sizes, images.device)
        return levels, anchors

    def loss(self, outputs: list[Tensor]) -> Tensor:
        losses = self.model.loss_step(*self.parts(outputs), self.targets)
        return torch.stack([*losses.values()]).sum()

    def detections(self, outputs: list[Tensor], soft: bool = False) -> list[Detections]:
        model = self.model
        if soft:  # effdet's settings
            model = copy.copy(model)
            model.config = dataclasses.replace(
                model.config, nms_method="gaussian", nms_sigma=0.5, score_threshold=0.001
            )
        return model.detections(*self.parts(outputs), self.batch.image_sizes)

    def inference(self, images: list[Tensor]) -> list[Detections]:
        found: list[Detections] = self.model(images)
        return found


class OurEfficientDet(Ours):
    model: EfficientDet

    def features(self) -> list[Tensor]:
        return [*self.model.backbone(self.batch.tensors).values()]

    def pyramid(self, features: list[Tensor]) -> list[Tensor]:
        return self.model.fpn(features)  # type: ignore[no-any-return]


# ---- torchvision's --------------------------------------------------------------------------------


class Torchvisions:
    def __init__(self, model: Any) -> None:
        self.model = model

    def forward(self, images: list[Tensor], targets: list[Target]) -> list[Tensor]:
        self.batch, self.targets = self.model.transform(images, targets)
        self.maps = list(self.model.backbone(self.batch.tensors).values())
        outputs = self.model.head(self.maps)
        self.names = list(outputs)
        return list(outputs.values())

    def loss(self, outputs: list[Tensor]) -> Tensor:
        anchors = self.model.anchor_generator(self.batch, self.maps)
        named_outputs = dict(zip(self.names, outputs, strict=True))
        losses = self.model.compute_loss(self.targets, named_outputs, anchors)
        return torch.stack([*losses.values()]).sum()

    def detections(self, outputs: list[Tensor], soft: bool = False) -> list[Detections]:
        anchors = self.model.anchor_generator(self.batch, self.maps)
        sizes = [f.shape[-2] * f.shape[-1] * 9 for f in self.maps]
        split = {
            name: list(value.split(sizes, dim=1))
            for name, value in zip(self.names, outputs, strict=True)
        }
        levels = [list(of_image.split(sizes)) for of_image in anchors]
        found: list[Detections] = self.model.postprocess_detections(
            split, levels, self.batch.image_sizes
        )
        return found

    def inference(self, images: list[Tensor]) -> list[Detections]:
        found: list[Detections] = self.model(images)
        return found


def with_torchvision(
    name: str, image: Tensor, num_classes: int, size: tuple[int, int]
) -> dict[str, Contestant]:
    theirs = torchvision.models.get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        min_size=min(size),
        max_size=max(size),
    ).to(image.device)
    let_detect(theirs, image)
    return {
        "torchvision": Torchvisions(theirs),
        "focalops": Ours(RetinaNet.from_torchvision(theirs)),
    }


@torch.no_grad()
def let_detect(model: Any, image: Tensor) -> None:
    """A fresh head finds nothing; with this one some thousand scores pass the threshold, as trained."""
    head = model.eval().head
    features = list(model.backbone(model.transform([image])[0].tensors).values())
    for conv, output, std in (
        (head.classification_head.cls_logits, "cls_logits", 1.0),
        (head.regression_head.bbox_reg, "bbox_regression", 0.3),
    ):
        conv.bias.zero_()
        conv.weight *= std / head(features)[output].std()
    head.classification_head.cls_logits.bias.fill_(-6.5)


# ---- effdet's -------------------------------------------------------------------------------------


class Effdets:
    """With its own anchors, labels, losses and detections, and our images: effdet leaves those to its loader."""

    def __init__(self, model: Any, transform: nn.Module) -> None:
        from effdet import DetBenchTrain
        from effdet.bench import _batch_detection, _post_process

        self.model, self.transform = model, transform
        self.bench = DetBenchTrain(model).to(next(model.parameters()).device)
        self.candidates, self.best = _post_process, _batch_detection

    def forward(self, images: list[Tensor], targets: list[Target]) -> list[Tensor]:
        self.batch, self.targets = self.transform(images, targets)
        return self.network()

    def network(self) -> list[Tensor]:
        classes, boxes = self.model(self.batch.tensors)
        return [*classes, *boxes]

    def loss(self, outputs: list[Tensor]) -> Tensor:
        half = len(outputs) // 2
        labels = self.bench.anchor_labeler.batch_label_anchors(
            [target["boxes"][:, [1, 0, 3, 2]] for target in self.targets],
            [target["labels"] + 1 for target in self.targets],
        )
        total: Tensor = self.bench.loss_fn(outputs[:half], outputs[half:], *labels)[0]
        return total

    def detections(self, outputs: list[Tensor], soft: bool = False) -> list[Detections]:
        half, config = len(outputs) // 2, self.model.config
        classes, boxes, indices, labels = self.candidates(
            outputs[:half],
            outputs[half:],
            config.num_levels,
            config.num_classes,
            config.max_detection_points,
        )
        sizes = boxes.new_tensor(self.batch.image_sizes).flip(1)
        scales = boxes.new_ones(len(sizes))
        found = self.best(
            len(sizes),
            classes,
            boxes,
            self.bench.anchors.boxes,
            indices,
            labels,
            scales,
            sizes,
            config.max_det_per_image,
            soft,
        )
        kept = [of_image[of_image[:, 4] > 0] for of_image in found]  # the rest is padding
        return [{"boxes": k[:, :4], "scores": k[:, 4], "labels": k[:, 5].long() - 1} for k in kept]

    def inference(self, images: list[Tensor]) -> list[Detections]:
        self.batch, _ = self.transform(images, None)
        return self.detections(self.network())

    def features(self) -> list[Tensor]:
        return list(self.model.backbone(self.batch.tensors))

    def pyramid(self, features: list[Tensor]) -> list[Tensor]:
        return list(self.model.fpn(list(features)))  # effdet appends to what it is given


def effdet_config(name: str, num_classes: int, size: int) -> Any:
    """effdet's of a published EfficientDet; None where effdet is not installed, or knows none of that name."""
    try:
        import effdet
        from effdet.config.model_config import efficientdet_model_param_dict
    except ImportError:
        return None
    if f"tf_{name}" not in efficientdet_model_param_dict:
        return None
    config = effdet.get_efficientdet_config(f"tf_{name}")
    config.num_classes, config.image_size = num_classes, (size, size)
    config.backbone_args.drop_path_rate = 0  # it would drop other blocks than ours
    return config


def with_effdet(config: Any, images: list[Tensor]) -> dict[str, Contestant]:
    import effdet

    model = effdet.EfficientDet(config, pretrained_backbone=False).to(images[0].device)
    transform = EfficientDet.from_effdet(model).transform
    theirs = Effdets(model, transform)
    let_be_chosen(theirs, images, *model.class_net.predict.conv_pw.parameters())
    return {"effdet": theirs, "focalops": OurEfficientDet(EfficientDet.from_effdet(model))}


@torch.no_grad()
def let_be_chosen(
    contestant: Contestant, images: list[Tensor], weight: Tensor, bias: Tensor
) -> None:
    """A fresh head's scores are one; with this one they spread as trained ones."""
    contestant.model.train()
    outputs = contestant.forward(images, [NO_BOXES] * len(images))
    logits = torch.cat([x.flatten() for x in outputs[: len(outputs) // 2]])
    weight.div_(logits.std())
    bias.fill_(-6.5)


NO_BOXES = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
