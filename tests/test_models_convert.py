"""RetinaNet.from_torchvision: losses, gradients and detections are torchvision's."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detections import assert_same_detections
from torch import nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models.retinanet import RetinaNet

SMALL = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 96}


def resnet18_fpn(**changes: object) -> TorchvisionRetinaNet:
    """Three levels, three classes, frozen batch norms as pretrained models have them."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        trainable_layers=2,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    sizes = ((16, 20), (32, 40), (64, 80), (128, 160), (256, 320))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0),) * 5)
    settings: dict = {"min_size": (64, 80), "max_size": 96, "anchor_generator": anchors} | changes
    return TorchvisionRetinaNet(backbone, 3, **settings)


def with_many_detections(model: TorchvisionRetinaNet) -> TorchvisionRetinaNet:
    """A fresh head finds nothing; this one finds hundreds of boxes, of all classes and sizes."""
    head = model.head
    with torch.no_grad():
        features = list(model.eval().backbone(torch.randn(1, 3, 64, 64)).values())
        for conv, output, std in (
            (head.classification_head.cls_logits, "cls_logits", 1.0),
            (head.regression_head.bbox_reg, "bbox_regression", 0.3),
        ):
            conv.bias.zero_()
            conv.weight *= std / head(features)[output].std()
        head.classification_head.cls_logits.bias.fill_(-3.0)
    return model


MODELS = {
    "v1": lambda: retinanet_resnet50_fpn(**SMALL, num_classes=7),
    "v2": lambda: retinanet_resnet50_fpn_v2(**SMALL, num_classes=7),
    "resnet18": resnet18_fpn,
}


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    images = [torch.rand(3, 96, 130), torch.rand(3, 110, 100), torch.rand(3, 64, 64)]
    boxes = [
        torch.tensor([[5.0, 8, 60, 70], [40, 20, 90, 90], [10, 50, 40, 90]]),
        torch.tensor([[20.0, 20, 80, 95]]),
        torch.zeros(0, 4),
    ]
    labels = [torch.tensor([0, 2, 1]), torch.tensor([2]), torch.zeros(0, dtype=torch.int64)]
    return images, [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_equals_torchvision(name: str) -> None:
    theirs = with_many_detections(MODELS[name]()).train()
    ours = RetinaNet.from_torchvision(theirs)
    assert ours.training
    images, targets = batch()
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(5)  # for the size that is drawn
        losses.append(model(images, targets))
        sum(losses[-1].values()).backward()
    assert losses[0].keys() == losses[1].keys()
    for key in losses[0]:
        torch.testing.assert_close(losses[1][key], losses[0][key], rtol=1e-5, atol=0)
        assert losses[0][key] > 0
    gradients = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        assert parameter.requires_grad == gradients[key].requires_grad
        if parameter.grad is not None:
            got, expected = gradients[key].grad, parameter.grad
            # Of the largest gradient of the tensor: sums of thousands of terms of either sign.
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-12, key

    with torch.no_grad():
        found, expected_all = ours.eval()(images), theirs.eval()(images)
    assert sum(len(e["boxes"]) for e in expected_all) > 300
    for got, expected in zip(found, expected_all, strict=True):
        # The convolutions of a batch in another memory format, or on other threads, round otherwise.
        assert_same_detections(got, expected, scores=(1e-5, 1e-6), boxes=(1e-5, 1e-3))


def test_the_epsilon_of_frozen_norms_is_kept() -> None:
    """torchvision's trained v1 has 0 where others have 1e-5."""
    theirs = resnet18_fpn()
    for module in theirs.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.eps = 0.0
    assert RetinaNet.from_torchvision(theirs).config.batch_norm_eps == 0.0


class Subclass(TorchvisionRetinaNet):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "__class__", Subclass), "model must be torchvision's RetinaNet"),
        (lambda m: setattr(m.transform, "size_divisible", 64), "size_divisible must be 32, got 64"),
        (lambda m: setattr(m.box_coder, "weights", (10.0, 10.0, 5.0, 5.0)), "box_coder.weights"),
        (lambda m: setattr(m.head, "regression_head", nn.Identity()), "regression_head must be"),
        (lambda m: setattr(m.backbone, "body", nn.Identity()), "backbone.body must be"),
    ],
)
def test_what_no_configuration_means_is_refused(change, message: str) -> None:
    theirs = resnet18_fpn()
    change(theirs)
    with pytest.raises(ValueError, match=message):
        RetinaNet.from_torchvision(theirs)
