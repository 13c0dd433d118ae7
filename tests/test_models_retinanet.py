from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torchvision
from models_fixtures import SQUARE, draw_image

from models.detectors import from_json, to_json
from models.losses.matching import match
from models.retinanet import RetinaNet, RetinaNetConfig
from models.structures import HeadOutputs

TINY = RetinaNetConfig(
    num_classes=2,
    backbone="resnet18",
    trainable_stages=5,
    frozen_batch_norm=False,
    max_level=5,
    pyramid_channels=32,
    head_depth=1,
    anchor_sizes=((16, 20, 25), (32, 40, 51), (64, 81, 102)),
    aspect_ratios=(1.0,),
    head_std=None,
    nms_threshold=0.3,
    min_size=96,
    max_size=160,
)


def target(boxes: list[list[float]], labels: list[int]) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def test_overfits_a_few_images() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, targets = [], []
    for _ in range(3):
        image, annotations = draw_image(rng, 96, 4)
        images.append(torch.from_numpy(image).permute(2, 0, 1).float() / 255)
        corners = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in annotations)]
        targets.append(target(corners, [int(a["category_id"] == SQUARE) for a in annotations]))
    model = RetinaNet(TINY).train()
    steps = 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        losses = model(images, targets)
        assert set(losses) == {"classification", "bbox_regression"}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()

    # The best detections of each image are its objects, one each.
    for found, truth in zip(model.eval()(images), targets, strict=True):
        count = len(truth["boxes"])
        assert (found["scores"][:count] > 0.5).all()
        iou = torchvision.ops.box_iou(truth["boxes"], found["boxes"][:count])
        assert (iou.max(dim=1).values > 0.7).all()
        assert torch.equal(found["labels"][iou.argmax(dim=1)], truth["labels"])


def test_images_without_boxes_train() -> None:
    torch.manual_seed(0)
    model = RetinaNet(TINY).train()
    images = [torch.rand(3, 96, 96), torch.rand(3, 80, 120)]
    losses = model(images, [target([], []), target([[10, 10, 40, 50]], [1])])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    alone = model(images[:1], [target([], [])])
    assert alone["bbox_regression"] == 0


def test_crowd_regions_are_no_objects() -> None:
    """Nor is what lies in them background."""
    torch.manual_seed(0)
    model = RetinaNet(TINY).train()
    images = [torch.rand(3, 96, 96)] * 2
    one = target([[4, 4, 34, 34]], [1])
    two = target([[4, 4, 34, 34], [40, 40, 92, 92]], [1, 0])
    crowd = {**two, "iscrowd": torch.tensor([False, True])}
    alone, with_crowd, both = (model(images, [one, labelled]) for labelled in (one, crowd, two))
    assert with_crowd["bbox_regression"] == alone["bbox_regression"] != both["bbox_regression"]
    assert with_crowd["classification"] < alone["classification"]


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_the_loss_compiles_to_one_graph(normalizer: str) -> None:
    torch.manual_seed(0)
    model = RetinaNet(dataclasses.replace(TINY, normalizer=normalizer)).train()
    head = [torch.randn(2, 6, *size) for size in ((12, 12), (6, 6), (3, 3))]
    deltas = [torch.randn(2, 12, *size) for size in ((12, 12), (6, 6), (3, 3))]
    sizes = [level.shape[-2:] for level in head]
    anchors = model.anchor_generator.grid((96, 96), sizes)
    targets = [target([[4, 4, 34, 34]], [1]), target([[4, 4, 34, 34], [40, 40, 92, 92]], [1, 0])]
    outcomes = []
    for compute in (model.loss_step, torch.compile(model.loss_step, fullgraph=True)):
        leaves = [level.clone().requires_grad_() for level in (*head, *deltas)]
        losses = compute(HeadOutputs(leaves[:3], leaves[3:]), anchors, targets)
        sum(losses.values()).backward()
        outcomes.append([*losses.values(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_heads_start_at_the_prior() -> None:
    model = RetinaNet(TINY)
    assert torch.allclose(
        model.head.classification_head.cls_logits.bias.sigmoid(), torch.tensor(0.01)
    )


@torch.no_grad()
def test_outputs_are_torchvisions() -> None:
    """Detections come best first, inside the image, with the dtypes that torchvision returns."""
    torch.manual_seed(0)
    model = RetinaNet(dataclasses.replace(TINY, score_threshold=0.0, detections_per_image=7)).eval()
    images = [torch.rand(3, 90, 130), torch.rand(3, 200, 64)]
    for image, found in zip(images, model(images), strict=True):
        assert set(found) == {"boxes", "scores", "labels"}
        assert found["boxes"].shape == (7, 4)
        assert found["boxes"].dtype == found["scores"].dtype == torch.float32
        assert found["labels"].dtype == torch.int64
        assert (found["scores"].diff() <= 0).all()
        assert (found["boxes"] >= 0).all()
        height, width = image.shape[-2:]
        assert (found["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"])
@pytest.mark.parametrize("max_level", [4, 5, 7])
def test_pyramid_strides(backbone: str, max_level: int) -> None:
    config = dataclasses.replace(
        TINY, backbone=backbone, max_level=max_level, anchor_sizes=((16,),) * (max_level - 2)
    )
    features = RetinaNet(config).backbone(torch.zeros(2, 3, 256, 128))
    assert [tuple(f.shape) for f in features] == [
        (2, 32, 256 >> level, 128 >> level) for level in range(3, max_level + 1)
    ]


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "convnext_atto"])
def test_timm_backbones(name: str) -> None:
    pytest.importorskip("timm")
    config = dataclasses.replace(TINY, backbone=f"timm:{name}", frozen_batch_norm=True)
    model = RetinaNet(config)
    features = model.backbone(torch.zeros(2, 3, 128, 64))
    assert [tuple(f.shape) for f in features] == [(2, 32, 128 >> n, 64 >> n) for n in (3, 4, 5)]
    trained = []
    for stages in range(6):
        body = RetinaNet(dataclasses.replace(config, trainable_stages=stages)).backbone.body
        flags = [p.requires_grad for p in body.parameters()]
        assert flags == sorted(flags)  # the rest, from the input on, is frozen
        trained.append(sum(flags))
    assert trained[0] == 0 and trained == sorted(trained) and trained[5] == len(flags)
    losses = model.train()([torch.rand(3, 96, 96)], [target([[10, 10, 40, 50]], [1])])
    sum(losses.values()).backward()


def test_timm_errors() -> None:
    pytest.importorskip("timm")
    for name, message in (("nothing", "timm:nothing"), ("vit_tiny_patch16_224", "strides")):
        with pytest.raises(ValueError, match=message):
            RetinaNet(dataclasses.replace(TINY, backbone=f"timm:{name}"))


def test_default_config_has_torchvisions_parameters() -> None:
    ours = RetinaNet(RetinaNetConfig(), pretrained_backbone=False)
    theirs = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None
    )
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    # torchvision without pretrained weights has trained batch norms; frozen ones count no batches.
    shapes = {name: s for name, s in shapes.items() if not name.endswith("num_batches_tracked")}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


def test_trainable_stages() -> None:
    model = RetinaNet(dataclasses.replace(TINY, trainable_stages=2))
    by_training: dict[bool, set[str]] = {True: set(), False: set()}
    for name, parameter in model.backbone.body.named_parameters():
        by_training[parameter.requires_grad].add(name.split(".")[0])
    assert by_training[False] == {"conv1", "bn1", "layer1", "layer2"}
    assert by_training[True] == {"layer3", "layer4"}


def test_config_survives_json() -> None:
    config = dataclasses.replace(TINY, gamma=1.5)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config  # without a kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vgg16"}, "backbone must be one of resnet18, .*, got 'vgg16'"),
        ({"max_level": 6}, "max_level must be one of 2, 3, 4, 5, 7, got 6"),
        ({"anchor_sizes": ((8,),)}, "one entry for each of the 3 levels, got 1"),
    ],
)
def test_config_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetinaNet(dataclasses.replace(TINY, **changes))


def test_target_errors() -> None:
    model = RetinaNet(TINY).train()
    image = torch.rand(3, 64, 64)
    with pytest.raises(ValueError, match="one target for each of the 1 images, got none"):
        model([image])
    with pytest.raises(ValueError, match=r"must have shape \(M, 4\), got \(4,\)"):
        model([image], [{"boxes": torch.zeros(4), "labels": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"positive width and height, got .5.0, 5.0, 5.0, 9.0"):
        model([image], [target([[5, 5, 5, 9]], [0])])


IN_0_1 = r"targets\[1\]\['labels'\] must lie in \[0, 1\], got "


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.tensor([0, 2]), IN_0_1 + "2"),
        (torch.tensor([-100, 0]), IN_0_1 + "-100"),
        (torch.tensor([0]), r"targets\[1\]\['labels'\] must be integers of shape \(2,\)"),
        (torch.tensor([0.0, 1]), "must be integers of shape .* got torch.float32 of shape"),
        (torch.tensor([[0], [1]]), r"must be integers of shape \(2,\).* of shape \(2, 1\)"),
        ([0, 1], r"targets\[1\]\['labels'\] must be a Tensor, got list"),
        (None, r"targets\[1\]\['labels'\] must be a Tensor, got NoneType"),
    ],
)
def test_labels_that_are_no_classes(labels, sentence: str) -> None:
    model = RetinaNet(TINY).train()
    images = [torch.rand(3, 64, 64)] * 2
    wrong = target([[1, 1, 9, 9], [5, 5, 30, 30]], [0, 1]) | {"labels": labels}
    with pytest.raises((ValueError, TypeError), match=sentence):
        model(images, [target([[1, 1, 9, 9]], [0]), wrong])


def test_crowds_may_be_integers() -> None:
    """As torchvision's own references and tutorials have them."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    truth = target([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1])
    for dtype in (torch.bool, torch.int64, torch.uint8):
        truth["iscrowd"] = torch.tensor([0, 1]).to(dtype)
        assert match(HeadOutputs([], []), anchors, [truth], TINY, 8)[0].tolist() == [[0, -2]]
