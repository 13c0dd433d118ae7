"""EfficientDet: the published family, and names and numbers that the package effdet 0.4.1 gave (tests/golden).

Where that package is installed its models are compared in whole, too.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from focalops import decode_boxes
from models import deploy
from models.__main__ import main
from models.backbones import SameConv2d
from models.checkpoint import load_checkpoint, load_model
from models.commands import convert
from models.data import DataError
from models.detectors import PUBLISHED, create, from_json, to_json
from models.efficientdet import (
    SCALES,
    EfficientDet,
    EfficientDetConfig,
    anchor_sizes,
    cell_nodes,
    compound,
)
from models.from_effdet import from_effdet_file, xywh
from models.recipes import Recipe
from models.structures import HeadOutputs

pytest.importorskip("timm")
pytest_plugins = ["models_runs"]

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("efficientdet.json").read_text())


def fill(state: dict[str, torch.Tensor]) -> None:
    """Weights that are the same everywhere, and let no part of the network be without effect."""
    for k, (name, value) in enumerate(sorted(state.items())):
        if not value.is_floating_point():
            continue
        wave = np.sin(0.37 * np.arange(value.numel()) * (1 + k % 7) + k)
        if name.endswith("weights"):  # of a fusion: some below 0
            wave = 0.6 + 0.8 * wave
        elif name.endswith((".weight", "running_var")) and value.dim() == 1:  # of a batch norm
            wave = 1 + 0.3 * wave
        elif value.dim() == 4:
            wave *= 2.4 / math.sqrt(value[0].numel())
        else:
            wave *= 0.3
        value.copy_(torch.from_numpy(wave.reshape(value.shape)).to(value.dtype))


def make_images(batch: int, size: int) -> torch.Tensor:
    index = np.arange(batch * 3 * size * size)
    pixels = np.sin(0.011 * index + index % 17)
    return torch.from_numpy(pixels.reshape(batch, 3, size, size))


def make_targets() -> list[dict[str, torch.Tensor]]:
    """Small boxes that share best anchors, large ones, one in a corner; none has a delta of exactly 0, which has no loss there."""
    boxes = [
        [[10.0, 12, 17, 19], [11, 12, 18, 20.5], [40.3, 30, 120, 110.5], [0, 0, 31, 15]],
        [[60.25, 70, 90, 127], [61.5, 70, 91, 127]],
    ]
    labels = [[3, 89, 0, 17], [5, 6]]
    return [
        {"boxes": torch.tensor(b), "labels": torch.tensor(k)}
        for b, k in zip(boxes, labels, strict=True)
    ]


def of_golden(name: str) -> EfficientDet:
    fields = GOLDEN[name]["fields"]
    model = create(EfficientDetConfig.named(GOLDEN[name]["published"], **from_lists(fields)))
    assert isinstance(model, EfficientDet)
    with torch.no_grad():
        fill(model.state_dict())
    return model.eval()


def from_lists(value):
    if isinstance(value, list):
        return tuple(from_lists(item) for item in value)
    return {k: from_lists(v) for k, v in value.items()} if isinstance(value, dict) else value


# ---- The family -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tf_d0", 3_880_067),
        ("tf_d1", 6_625_898),
        ("tf_d2", 8_097_039),
        ("tf_d3", 12_032_296),
        ("tf_d4", 20_723_675),
        ("tf_d5", 33_653_315),
        ("tf_d6", 51_871_782),
        ("tf_d7", 51_871_782),
        ("tf_d7x", 77_147_166),
        ("d0", 3_877_763),
        ("d3", 12_022_376),
        ("lite0", 3_243_470),
        ("lite1", 4_248_318),
        ("lite2", 5_252_334),
        ("lite3", 8_350_862),
        ("lite4", 15_130_894),
    ],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = create(EfficientDetConfig.named(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_cell_is_the_published_one():
    nodes = cell_nodes(3, 7)
    assert [node.level for node in nodes] == [6, 5, 4, 3, 4, 5, 6, 7]
    assert [node.inputs for node in nodes] == [
        *((3, 4), (2, 5), (1, 6), (0, 7)),
        *((1, 7, 8), (2, 6, 9), (3, 5, 10), (4, 11)),
    ]


def test_where_the_formulas_are_not_what_was_trained():
    differences = {}
    for phi in range(7):
        formula, published = compound(phi), SCALES[f"d{phi}"]
        for field in ("size", "pyramid_channels", "cells", "head_depth"):
            pair = getattr(formula, field), getattr(published, field)
            if pair[0] != pair[1]:
                differences[field, phi] = pair
    assert differences == {
        ("pyramid_channels", 2): (120, 112),
        ("pyramid_channels", 4): (216, 224),
        ("cells", 5): (8, 7),
        ("size", 5): (1152, 1280),
        ("cells", 6): (9, 8),
    }


def test_a_configuration_survives_json():
    config = EfficientDetConfig.named("tf_d7x", num_classes=3)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert config.anchor_sizes == anchor_sizes(4, 3, 8)


# ---- effdet's numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    """In float64: these weights make of a rounding of float32 as much as a tenth of a value, on another machine or with
    more threads. effdet's losses are of float32 logits."""
    golden, model = GOLDEN[name], of_golden(name).double()
    images, targets = make_images(2, golden["size"]), make_targets()
    with torch.no_grad():
        outputs, anchors = model.outputs(images)
    for image, levels, expected in (
        (0, outputs.cls_logits, golden["logits"]),
        (1, outputs.box_deltas, golden["deltas"]),
    ):
        for level, numbers in zip(levels, expected, strict=True):
            values = level[image].flatten()
            largest = values.abs().max().item()
            assert values[:: len(values) // 7][:7].tolist() == pytest.approx(
                numbers, abs=1e-7 * largest
            )
    assert anchors[:: len(anchors) // 5][:5].flatten().tolist() == golden["anchors"]
    outputs = HeadOutputs(*([x.requires_grad_() for x in levels] for levels in outputs))
    matched = model.loss_step.match(outputs, anchors, targets)
    assert int((matched.matches >= 0).sum()) == golden["positives"]
    losses = model.loss_step(outputs, anchors, targets)
    assert losses["classification"].item() == pytest.approx(golden["class_loss"], rel=1e-5)
    assert losses["bbox_regression"].item() == pytest.approx(golden["box_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("efficientdet_d0", 128, {}),
        ("tf_efficientdet_d0", 192, {}),
        ("efficientdet_d0", 256, {"max_level": 8, "num_levels": 6}),
        ("tf_efficientdet_d0", 320, {"fpn_name": "bifpn_attn"}),
        ("efficientdet_d0", 128, {"fpn_name": "bifpn_sum"}),
        ("tf_efficientdet_lite0", 320, {}),
    ],
)
def test_is_effdets(name, size, options):
    """Anchors to the bit; logits too, but where the weights of a fusion are a softmax. The rows of the last convolution of the boxes
    are in another order here: which rows share a tile of its product, and so how they are rounded, differs with the number of
    threads."""
    effdet = pytest.importorskip("effdet")
    theirs = make_effdet(effdet, name, size, options)
    randomise(theirs)
    ours = EfficientDet.from_effdet(theirs)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        cls_logits, boxes = theirs(images)
        outputs, anchors = ours.outputs(images)
    boxes = [xywh(level.transpose(0, 1)).transpose(0, 1) for level in boxes]
    # Of the largest, through 3 cells; and of a sum of 64 products.
    of_fusion = 1e-5 if options.get("fpn_name") == "bifpn_attn" else 0
    for theirs_of, ours_of, roundings in (
        (cls_logits, outputs.cls_logits, of_fusion),
        (boxes, outputs.box_deltas, of_fusion or 1e-6),
    ):
        for one, other in zip(theirs_of, ours_of, strict=True):
            largest = one.abs().max().item()
            torch.testing.assert_close(other, one, rtol=0, atol=roundings * largest)
    of_effdet = effdet.anchors.Anchors.from_config(theirs.config).boxes[:, [1, 0, 3, 2]]
    assert torch.equal(of_effdet, anchors)


def test_boxes_are_not_clipped():
    """AOTInductor does not load a package in which an argument is infinite, so that the clip is a number beyond which exp is."""
    deltas = torch.tensor([[0.0, 0.0, 88.7, 60.0], [0.0, 0.0, 89.0, 2000.0]])
    anchors = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
    assert math.isfinite(EfficientDet.delta_clip)
    unclipped = decode_boxes(deltas, anchors, clip=math.inf)
    assert torch.equal(decode_boxes(deltas, anchors, clip=EfficientDet.delta_clip), unclipped)


@pytest.mark.parametrize("soft_nms", [False, True])
def test_detections_are_effdets(soft_nms):
    effdet = pytest.importorskip("effdet")
    # Few classes: there each has coordinates of its own, which many would round.
    options = {"soft_nms": soft_nms, "num_classes": 3}
    theirs = make_effdet(effdet, "efficientdet_d0", 192, options)
    randomise(theirs)
    images = torch.randn(2, 3, 192, 192)
    with torch.no_grad():  # scores all over [0, 1], boxes near their anchors
        for levels, net in zip(theirs(images), (theirs.class_net, theirs.box_net), strict=True):
            values = torch.cat([level.flatten() for level in levels])
            for parameter in net.predict.conv_pw.parameters():
                parameter /= values.std()
            net.predict.conv_pw.bias -= values.mean() / values.std()
    ours = EfficientDet.from_effdet(theirs)
    with torch.no_grad():
        expected = effdet.DetBenchPredict(theirs)(images)
        boxes, scores, labels, counts = ours.padded_detections(*ours.outputs(images), None)
    assert counts.tolist() == [100, 100]
    torch.testing.assert_close(scores, expected[:, :, 4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(boxes, expected[:, :, :4], rtol=1e-5, atol=1e-3)
    assert torch.equal(labels + 1.0, expected[:, :, 5])


@torch.no_grad()
def randomise(model):
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5 if "var" in key else -0.2, 1.5)
            value *= 0.1 if value.dim() == 4 else 1
    model.eval()


# ---- effdet's files -------------------------------------------------------------------------------

FILE = json.loads(Path(__file__).with_name("golden").joinpath("effdet_file.json").read_text())


def state_of_a_file() -> dict[str, torch.Tensor]:
    """Under effdet's names, which are golden; those of its backbone are timm's."""
    timm = pytest.importorskip("timm")
    backbone = timm.create_model("tf_efficientnet_b0", features_only=True, out_indices=(2, 3, 4))
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    for name, shape in FILE["names"].items():
        of_steps = name.endswith("num_batches_tracked")
        state[name] = torch.zeros(shape, dtype=torch.int64 if of_steps else torch.float32)
    fill(state)
    return state


def test_a_file_of_effdets(tmp_path):
    """Its numbers, in float64. Training wraps the names in those of a bench, and adds what is not of the model; what was
    ported from elsewhere does not know how many batches its norms saw."""
    state, fields = state_of_a_file(), from_lists(FILE["fields"])
    ported = {name: value for name, value in state.items() if value.is_floating_point()}
    wrapped = {f"module.model.{name}": value for name, value in state.items()}
    contents = (
        state,
        {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": wrapped, "arch": "d0"},
        {"state_dict": {}, "state_dict_ema": {**ported, "anchors.boxes": torch.zeros(4, 4)}},
    )
    for n, (content, name) in enumerate(
        zip(contents, ("d0", "tf_d0", "tf_efficientdet_d0"), strict=True)
    ):
        torch.save(content, tmp_path / f"{n}.pth")
        model = EfficientDet.from_effdet_file(tmp_path / f"{n}.pth", name, **fields)
        assert model.config.num_classes == 3 and model.config.padding == "same"
        assert not model.training
        with torch.no_grad():
            outputs = model.double().network(make_images(2, 128))
        for image, levels, expected in (
            (0, outputs.cls_logits, FILE["logits"]),
            (1, outputs.box_deltas, FILE["deltas"]),
        ):
            for level, numbers in zip(levels, expected, strict=True):
                values = level[image].flatten()
                largest = values.abs().max().item()
                assert values[:: len(values) // 7][:7].tolist() == pytest.approx(
                    numbers, abs=1e-7 * largest
                )


@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_d1", "tf_efficientdet_lite0"])
def test_a_file_is_the_model(name, tmp_path):
    effdet = pytest.importorskip("effdet")
    theirs = make_effdet(effdet, name, 128, {"num_classes": 7})
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "effdet.pth")
    ours = EfficientDet.from_effdet_file(tmp_path / "effdet.pth", name, min_size=128, max_size=128)
    expected = EfficientDet.from_effdet(theirs)
    pixels = {
        "image_mean": (0.5,) * 3,
        "image_std": (0.5,) * 3,
    }  # effdet's of lite; the original has 127 and 128 / 255
    assert dataclasses.replace(ours.config, **pixels) == dataclasses.replace(
        expected.config, **pixels
    )
    for key, value in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


class Payload:
    def __reduce__(self):
        return print, ("a file of weights was executed",)


def test_files_that_are_none(tmp_path, capfd):
    file = tmp_path / "effdet.pth"
    fields = from_lists(FILE["fields"])
    with pytest.raises(DataError, match=r"effdet\.pth does not exist$"):
        EfficientDet.from_effdet_file(file, "d0", **fields)
    nothing = "holds no weights of an EfficientDet of the package effdet$"
    for content in ([1], {"a": 1}, {"conv.weight": torch.zeros(3)}, Payload()):
        torch.save(content, file)
        with pytest.raises(DataError, match=nothing):
            EfficientDet.from_effdet_file(file, "d0", **fields)
    file.write_bytes(b"no pickle")
    with pytest.raises(DataError, match=nothing):
        EfficientDet.from_effdet_file(file, "d0", **fields)
    assert "executed" not in capfd.readouterr().out
    state = state_of_a_file()
    torch.save(state, file)
    with pytest.raises(
        DataError, match=r"do not fit an EfficientDet d0: box_head.*is missing, and \d+ more$"
    ):
        EfficientDet.from_effdet_file(file, "d0", **{**fields, "head_depth": 2})
    with pytest.raises(ValueError, match=r"^name must be one of d0, d1, .*, got 'd9'$"):
        EfficientDet.from_effdet_file(file, "d9")


def test_a_file_is_converted(tmp_path, capsys, monkeypatch):
    """To a checkpoint that commands take; COCO's 90 classes have their names, ids and gaps."""
    published = PUBLISHED["efficientdet_d0"]
    small = dataclasses.replace(published, **from_lists(FILE["fields"]))
    assert isinstance(small, EfficientDetConfig)
    torch.save(state_of_a_file(), tmp_path / "effdet.pth")
    made = functools.partial(from_effdet_file, **from_lists(FILE["fields"]))
    monkeypatch.setattr(convert, "from_effdet_file", made)
    file = tmp_path / "out" / "checkpoint.pt"
    command = ["convert", str(tmp_path / "effdet.pth"), "--out", str(file), "--device", "cpu"]
    assert main([*command, "--model", "efficientdet_d0"]) == 0
    model, recipe, categories = load_model(file)
    assert recipe.model == model.config == dataclasses.replace(small, num_classes=3)
    assert recipe.optimizer == "sgd" and categories == {1: "class 1", 2: "class 2", 3: "class 3"}
    assert main([*command, "--model", "efficientdet_d0"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--model", "retinanet", "--overwrite"]) == 1
    assert "error: --model must be one of efficientdet_d0, " in capsys.readouterr().err
    coco = convert.categories_of(90)
    assert (coco[1], coco[12], coco[90]) == ("person", "N/A 12", "toothbrush")


def make_effdet(effdet, name, size, options):
    config = effdet.get_efficientdet_config(name)
    config.image_size = (size, size)
    for key, value in options.items():
        config[key] = value
    return effdet.EfficientDet(config, pretrained_backbone=False)


def test_from_effdet_refuses_what_it_cannot_mean():
    effdet = pytest.importorskip("effdet")
    model = make_effdet(effdet, "efficientdet_d0", 128, {})
    model.config = copy.deepcopy(model.config)
    effdet.config.set_config_writeable(model.config)
    model.config.label_smoothing = 0.1
    with pytest.raises(ValueError, match=r"model\.config\.label_smoothing must be 0, got 0\.1"):
        EfficientDet.from_effdet(model)
    with pytest.raises(
        ValueError, match="model must be an EfficientDet of the package effdet, got Linear"
    ):
        EfficientDet.from_effdet(torch.nn.Linear(1, 1))


# ---- The commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    config = EfficientDetConfig.named(
        "lite0", num_classes=2, cells=1, head_depth=1, pyramid_channels=16, min_size=96, max_size=96
    )
    return Recipe(model=config, steps=4, batch_size=2, learning_rate=1e-3, warmup_steps=1)


@pytest.fixture(scope="module")
def recipe_file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "efficientdet.json"
    path.write_text(json.dumps(recipe.to_dict()))
    return path


def test_the_commands_take_it(finished: Path, coco_folder: Path, tmp_path: Path, capsys):
    checkpoint, out = str(finished / "checkpoint.pt"), tmp_path / "out"
    assert load_checkpoint(finished / "checkpoint.pt")["recipe"].model.kind == "efficientdet"
    data = ["--data", str(coco_folder), "--out", str(out / "results.json")]
    assert main(["evaluate", checkpoint, *data, "--device", "cpu"]) == 0
    assert "Average Precision" in capsys.readouterr().out
    image = str(next((coco_folder / "val2017").iterdir()))
    options = ["--min-score", "0", "--format", "json", "--out", str(out / "pictures")]
    assert main(["predict", checkpoint, image, *options, "--device", "cpu"]) == 0
    assert (out / "pictures" / "predictions.json").exists()


def test_it_is_exported(recipe: Recipe):
    """A batch of another size than the example's; boxes in pixels of the images as they were."""
    torch.manual_seed(0)
    model = create(recipe.model).eval()
    detector = deploy.StaticDetector(model)
    batch, sizes = detector.to_batch([torch.rand(3, 80, 96), torch.rand(3, 96, 61)])
    program = deploy.export(detector, batch, sizes)
    batch, sizes = detector.to_batch([torch.rand(3, 50, 70) for _ in range(3)])
    with torch.no_grad():
        expected = detector(batch, sizes)
        found = program.module()(*detector.prepare(batch, sizes))
    assert deploy.disagreement(found, expected) is None


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(3, 2, 1), (5, 2, 1), (3, 1, 1), (1, 2, 1), (7, 4, 1), (3, 2, 2)],
)
def test_same_padding_is_timms(kernel, stride, dilation):
    from timm.layers.conv2d_same import Conv2dSame

    theirs = Conv2dSame(2, 4, kernel, stride=stride, dilation=dilation, groups=2)
    ours = SameConv2d(theirs)
    for size in range(9, 18):
        x = torch.randn(1, 2, size, size + 3)
        assert torch.equal(ours(x), theirs(x))


def test_same_padding_exports_with_sizes_that_stay_simple():
    """timm's own convolutions nest a ceiling of a quotient in each other: an export took more than ten minutes."""
    from timm.layers.conv2d_same import Conv2dSame

    layers = nn.Sequential(*(SameConv2d(Conv2dSame(1, 1, 3, stride=2)) for _ in range(5)))
    side = 32 * torch.export.Dim("side")
    program = torch.export.export(layers, (torch.zeros(1, 1, 96, 96),), dynamic_shapes=({2: side},))
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    height = str(output.args[0][0].meta["val"].shape[2])
    assert not any(part in height for part in ("ceil", "Max", "//"))
