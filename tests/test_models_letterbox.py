"""Images that are resized to fit one square, and padded to it: a choice of the configuration, whatever the detector."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_models_deploy import RESIZING
from toy_detector import ToyConfig

from models import deploy
from models.commands.train import with_options
from models.config import ImageConfig
from models.detectors import from_json, to_json
from models.efficientdet import EfficientDetConfig
from models.recipes import Recipe
from models.retinanet import RetinaNet, RetinaNetConfig
from models.transform import transform

LETTERBOX = dataclasses.replace(RESIZING, min_size=96, max_size=96, letterbox=True)


def test_who_has_it() -> None:
    assert not RetinaNetConfig().letterbox
    assert not ToyConfig().letterbox
    assert EfficientDetConfig().letterbox
    assert LETTERBOX.batch_divisor == 96
    assert dataclasses.replace(LETTERBOX, max_size=100).batch_divisor == 128
    assert dataclasses.replace(LETTERBOX, letterbox=False).batch_divisor == 32
    assert ToyConfig(max_size=1000, letterbox=True).batch_divisor == 1008  # its own is 16
    lite0 = EfficientDetConfig.named("lite0")
    assert lite0.batch_divisor == 320  # whose levels are 40, 20, 10, 5 and 3
    assert dataclasses.replace(lite0, letterbox=False).batch_divisor == 128


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "resized"), [((60, 90), (64, 96)), ((300, 200), (96, 64)), ((33, 20), (96, 58))]
)
def test_an_image_lies_in_the_upper_left_of_the_square(
    training: bool, shape: tuple[int, int], resized: tuple[int, int]
) -> None:
    image = torch.rand(3, *shape)
    height, width = shape
    target = {"boxes": torch.tensor([[0.0, 0.0, width, height]]), "labels": torch.tensor([0])}
    batch, targets = transform(LETTERBOX).train(training)([image], [target])
    assert batch.tensors.shape == (1, 3, 96, 96)
    assert batch.image_sizes == [resized]
    assert targets[0]["boxes"][0].tolist() == pytest.approx([0, 0, resized[1], resized[0]])
    seen = batch.tensors[0].abs().sum(dim=0) > 0
    assert seen[: resized[0], : resized[1]].all() and seen.sum() == resized[0] * resized[1]


def test_without_it_a_batch_is_as_small_as_it_can_be() -> None:
    config = dataclasses.replace(LETTERBOX, letterbox=False)
    batch, _ = transform(config).eval()([torch.rand(3, 30, 90)])
    assert batch.tensors.shape == (1, 3, 32, 96)


@torch.no_grad()
def test_detections_are_in_pixels_of_the_images() -> None:
    """Of the eager and the exported model, for images of several shapes in one batch; none in the padding."""
    torch.manual_seed(0)
    model = RetinaNet(LETTERBOX).eval()
    images = [torch.rand(3, 60, 180), torch.rand(3, 128, 64)]
    detector = deploy.StaticDetector(model)
    batch = detector.to_batch(images)
    boxes, scores, labels, counts = detector(*batch)
    for i, expected in enumerate(model(images)):
        assert counts[i] == len(expected["scores"]) > 5
        height, width = images[i].shape[1:]
        limits = torch.tensor([width, height] * 2)
        assert (expected["boxes"] >= 0).all() and (expected["boxes"] <= limits + 1e-3).all()
        assert expected["boxes"].amax() > max(height, width) / 2
        torch.testing.assert_close(boxes[i, : counts[i]], expected["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[i, : counts[i]], expected["scores"], rtol=0, atol=1e-5)
        assert torch.equal(labels[i, : counts[i]], expected["labels"])
    assert detector.metadata == {"size_divisor": "96", "min_size": "96", "max_size": "96"}
    exported = deploy.export(detector, *batch).module()
    others = detector.to_batch([torch.rand(3, 40, 77)] * 3)
    found = exported(*detector.prepare(*others))
    assert deploy.disagreement(found, detector(*others)) is None


def test_there_is_a_square() -> None:
    with pytest.raises(ValueError, match=r"^min_size must be a size where letterbox is, got None$"):
        ImageConfig(letterbox=True, min_size=None)


@pytest.mark.parametrize(
    ("sizes", "letterbox"),
    [({}, True), ({"min_size": 96, "max_size": 128}, False), ({"min_size": None}, False)],
)
def test_files_of_before_say_it_by_their_sizes(sizes: dict[str, Any], letterbox: bool) -> None:
    values = to_json(EfficientDetConfig()) | sizes
    assert values.pop("letterbox") is True
    assert from_json(values).letterbox is letterbox
    retinanet = to_json(RetinaNetConfig(min_size=640, max_size=640))
    del retinanet["letterbox"]
    assert not from_json(retinanet).letterbox


def test_crops_are_not_enlarged_to_the_square() -> None:
    recipe = with_options(Recipe(model=EfficientDetConfig()), {"crop": 128})
    assert (recipe.model.min_size, recipe.model.letterbox) == (None, False)
    given = {"crop": 128, "letterbox": True, "min_size": 256}
    assert with_options(Recipe(model=EfficientDetConfig()), given).model.letterbox


def test_the_square_is_one_option() -> None:
    recipe = Recipe(model=EfficientDetConfig())
    model = with_options(recipe, {"max_size": 384}).model
    assert (model.min_size, model.max_size, model.batch_divisor) == (384, 384, 384)
    model = with_options(recipe, {"max_size": 640, "min_size": (320, 640)}).model
    assert (model.min_size, model.max_size) == ((320, 640), 640)
    assert with_options(Recipe(), {"max_size": 1500}).model.min_size == 800
    assert with_options(recipe, {"max_size": 640, "letterbox": False}).model.min_size == 512
    for wrong in (0, "x"):
        with pytest.raises(ValueError, match=rf"^--max-size must be .* got {wrong!r}$"):
            with_options(recipe, {"max_size": wrong})
