"""AnchorGenerator: torchvision's anchors to the bit."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

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


@pytest.mark.parametrize(
    "arguments",
    [
        (((32, 64), (128,)), (0.5, 1, 2)),
        ((32, 64, 128), (0.5, 1, 2)),
        ((32, 64), ((0.5, 1.0), (2.0,))),
        ([[16]], [1.0]),
    ],
)
def test_plain_numbers_are_what_torchvision_takes_them_for(arguments):
    """Ratios are every level's, sizes one for each level."""
    ours, theirs = AnchorGenerator(*arguments), TorchvisionAnchorGenerator(*arguments)
    assert ours.num_anchors_per_location() == theirs.num_anchors_per_location()
    for a, b in zip(ours.cell_anchors, theirs.cell_anchors, strict=True):
        assert torch.equal(a, b)


def test_plain_sizes_are_every_levels_in_detectron2():
    anchors = AnchorGenerator((32, 64), (1.0,), "detectron2", (8, 16))
    assert anchors.sizes == ((32, 64), (32, 64))


def test_each_image_has_anchors_of_its_own():
    images = ImageList(torch.zeros(2, 3, 64, 64), [(64, 64), (64, 60)])
    first, second = AnchorGenerator(((32,),), ((1.0,),))(images, [torch.zeros(2, 1, 8, 8)])
    assert torch.equal(first, second)
    first.zero_()
    assert second.any()


class Backbone(nn.Module):
    """One level for RetinaNet, FCOS and Faster R-CNN, two for SSD."""

    def __init__(self, levels: int = 1) -> None:
        super().__init__()
        self.out_channels = 32 if levels == 1 else [32] * levels
        self.convs = nn.ModuleList(nn.Conv2d(3, 32, 3, 16 * 2**i, 1) for i in range(levels))

    def forward(self, x):
        return {str(i): conv(x) for i, conv in enumerate(self.convs)}


@pytest.mark.parametrize("make", [RetinaNet, FCOS, FasterRCNN, SSD])
def test_torchvisions_detectors_take_it(make):
    """And compute what they compute with their own."""
    sizes, ratios = ((16,),), ((1.0,),) if make is FCOS else ((0.5, 1.0, 2.0),)
    if make is SSD:
        sizes, ratios = ((16,), (32,)), ((0.5, 1.0),) * 2
    name = "rpn_anchor_generator" if make is FasterRCNN else "anchor_generator"
    found = []
    for generator in (AnchorGenerator(sizes, ratios), TorchvisionAnchorGenerator(sizes, ratios)):
        torch.manual_seed(1)
        options: dict = {"num_classes": 3, name: generator}
        if make is SSD:
            options["size"] = (96, 96)
        else:
            options |= {"min_size": 96, "max_size": 96}
        if make is FasterRCNN:
            options |= {"box_roi_pool": None, "rpn_pre_nms_top_n_test": 50}
        model = make(Backbone(len(sizes)), **options)
        image = torch.rand(3, 96, 96)
        target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
        torch.manual_seed(2)
        found.append((model.train()([image], [target]), model.eval()([image])))
    (losses, detections), (their_losses, their_detections) = found
    for key, loss in their_losses.items():
        assert torch.equal(losses[key], loss)
    assert torch.equal(detections[0]["boxes"], their_detections[0]["boxes"])


def test_is_copied_and_pickled():
    anchors = AnchorGenerator(((16,),), ((0.5, 1.0),))
    assert isinstance(anchors, AnchorGenerator) and isinstance(anchors, TorchvisionAnchorGenerator)
    for twin in (copy.deepcopy(anchors), copy.copy(anchors), pickle.loads(pickle.dumps(anchors))):
        assert type(twin) is type(anchors)
        assert torch.equal(twin.grid((64, 64), [(8, 8)]), anchors.grid((64, 64), [(8, 8)]))
    assert repr(anchors) == "AnchorGenerator()"
    anchors.set_cell_anchors(torch.float16, torch.device("cpu"))
    assert anchors.cell_anchors[0].dtype == torch.float32


def test_without_torchvision():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import focalops\n"
        "anchors = focalops.AnchorGenerator(((16,),), ((1.0,),))\n"
        "print(anchors.grid((32, 32), [(2, 2)])[0].tolist())"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == "[-8.0, -8.0, 8.0, 8.0]", run.stderr


GOLDEN = json.loads((Path(__file__).parent / "golden" / "anchor_conventions.json").read_text())


@pytest.mark.parametrize("call", GOLDEN["mmdet"]["calls"])
def test_offsets_pairs_of_strides_and_order_are_mmdets(call, device):
    options = dict(call["options"])
    offset = options.pop("center_offset", 0)
    generator = AnchorGenerator(
        call["sizes"], (0.5, 1.0, 2.0), "mmdet", call["strides"], offset=offset, **options
    ).to(device)
    anchors = generator.grid((32, 64), GOLDEN["feature_sizes"], device)
    assert torch.equal(anchors.cpu(), torch.tensor(call["anchors"]))


def test_offset_is_detectron2s(device):
    golden = GOLDEN["detectron2"]
    generator = AnchorGenerator(
        golden["sizes"], (0.5, 1.0, 2.0), "detectron2", golden["strides"], offset=0.5
    ).to(device)
    anchors = generator.grid((64, 64), GOLDEN["feature_sizes"], device)
    assert torch.equal(anchors.cpu(), torch.tensor(golden["anchors"]))


@pytest.mark.parametrize("call", GOLDEN["efficientdet"]["calls"])
def test_is_effdets(call, device):
    golden = GOLDEN["efficientdet"]
    generator = AnchorGenerator(
        golden["sizes"], call["aspect_ratios"], "efficientdet", golden["strides"]
    ).to(device)
    anchors = generator.grid(call["image_size"], call["feature_sizes"], device)
    assert anchors.dtype == torch.float32
    assert torch.equal(anchors.cpu(), torch.tensor(call["anchors"]))
    halved = generator.half().grid(call["image_size"], call["feature_sizes"], device)
    assert torch.equal(halved, anchors)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (((0,), (1.0,)), {}, "sizes must be numbers > 0, got 0"),
        (((16,), (1.0, -1)), {}, "aspect_ratios must be numbers > 0, got -1"),
        (((16, (32,)), (1.0,)), {}, "sizes must be numbers or a list for each level"),
        (((16,), (1.0,)), {"offset": 0.5}, "offset must be 0 for torchvision's convention, got 0.5"),
        (((16,), (1.0,), "mmdet", (8,)), {"offset": 1}, r"offset must lie in \[0, 1\), got 1"),
        (((16,), (1.0,)), {"scale_major": False}, "scale_major must be True unless convention is 'mmdet'"),
        (((16,), (1.0,), "mmdet", (0,)), {}, "strides must be numbers > 0 or pairs of them"),
        (((16,), (1.0,), "mmdet"), {}, "strides must have an entry for each level of sizes, got None"),
        (((16,), ((1.0, 2, 3),), "efficientdet", (8,)), {}, "aspect_ratios must be numbers > 0 or pairs of them"),
        (((16,), ("1",), "efficientdet", (8,)), {}, "aspect_ratios must be numbers > 0 or pairs of them, got 1"),
        (((16,), (1.0,), "mmdet", ((8, "8"),)), {}, "strides must be numbers > 0 or pairs of them"),
        ((None,), {}, "sizes must be numbers or a list for each level, got NoneType"),
        (("16",), {}, "sizes must be numbers or a list for each level, got str"),
        (((16,), ("1.0",)), {}, "aspect_ratios must be numbers or a list for each level, got str"),
        (((16,), (1.0,), "mmdet", 8), {}, "strides must be numbers or a list for each level, got int"),
        (((16,), (1.0,), "mmdet", (8,)), {"offset": "0.5"}, "offset must be a number, got str"),
        (((16,), (1.0,), "mmdet", (8,)), {"scale_major": 1}, "scale_major must be True or False, got int"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(arguments, options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        AnchorGenerator(*arguments, **options)


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
