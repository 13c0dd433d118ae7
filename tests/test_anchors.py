"""AnchorGenerator: torchvision's anchors to the bit."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchorGenerator
from torchvision.models.detection.image_list import ImageList

from focalops import AnchorGenerator

RETINANET = tuple(
    (s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512)
)


@pytest.mark.parametrize("image_size", [(800, 1344), (800, 1333), (33, 470), (512, 512)])
def test_is_torchvisions(image_size, device):
    height, width = image_size
    feature_maps = [
        torch.zeros(2, 1, -(-height // stride), -(-width // stride), device=device)
        for stride in (8, 16, 32, 64, 128)
    ]
    images = ImageList(torch.zeros(2, 3, *image_size, device=device), [image_size, image_size])
    arguments = RETINANET, ((0.5, 1.0, 2.0),) * 5
    ours = AnchorGenerator(*arguments).to(device)
    theirs = TorchvisionAnchorGenerator(*arguments)
    assert ours.num_anchors_per_location() == theirs.num_anchors_per_location()
    for a, b in zip(ours(images, feature_maps), theirs(images, feature_maps), strict=True):
        assert torch.equal(a, b)
    grid = ours.grid(image_size, [f.shape[-2:] for f in feature_maps], device)
    assert torch.equal(grid, ours(images, feature_maps)[0])


def test_one_size_a_level_and_uneven_levels():
    sizes, ratios = ((16, 24), (100,)), ((1.0,), (0.3, 1.7, 2.9))
    ours, theirs = AnchorGenerator(sizes, ratios), TorchvisionAnchorGenerator(sizes, ratios)
    for a, b in zip(ours.cell_anchors, theirs.cell_anchors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("convention", ["detectron2", "mmdet"])
def test_is_the_peers(convention, device):
    golden = json.loads((Path(__file__).parent / "golden" / "anchors.json").read_text())
    generator = AnchorGenerator(
        golden["sizes"], [golden["aspect_ratios"]], convention, golden["strides"]
    ).to(device)
    anchors = generator.grid(golden["image_size"], golden["feature_sizes"], device)
    assert torch.equal(anchors.cpu(), torch.tensor(golden[convention]["anchors"]))


def test_stays_float32():
    anchors = AnchorGenerator().half()
    assert anchors.grid((512, 512), [(16, 16)]).dtype == torch.float32
    assert not anchors.state_dict()


def test_level_counts_must_agree():
    with pytest.raises(ValueError, match="aspect_ratios must have an entry for each level"):
        AnchorGenerator(((32,), (64,), (128,)), ((1.0,), (2.0,)))
    with pytest.raises(
        ValueError, match="feature_sizes must have an entry for each level, 1, got 2"
    ):
        AnchorGenerator().grid((64, 64), [(8, 8), (4, 4)])
    with pytest.raises(ValueError, match="strides must have an entry for each level of sizes, 2"):
        AnchorGenerator(((32,), (64,)), ((1.0,),), "mmdet", (8,))
    with pytest.raises(ValueError, match="strides must be None for torchvision's"):
        AnchorGenerator(((32,),), ((1.0,),), strides=(8,))
    with pytest.raises(ValueError, match="convention must be one of 'torchvision', 'detectron2'"):
        AnchorGenerator(convention="keras")
