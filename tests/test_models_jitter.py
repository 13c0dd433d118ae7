"""Scale jitter: images of a random size in the square that they are trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models_fixtures import SQUARE, make_coco_folder
from test_models_letterbox import LETTERBOX
from tiny_backbone import TINY_RECIPE

from models.checkpoint import load_checkpoint
from models.data import CocoDataset, TrainingStream
from models.data.jitter import ScaleJitter
from models.data.stream import CROWD
from models.recipes import Recipe, with_model
from models.train import train, training_stream
from models.transform import transform

MEAN = (0.4, 0.5, 0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return CocoDataset(make_coco_folder(tmp_path_factory.mktemp("data") / "coco"), "train")


def stream(data: CocoDataset, low: float, high: float, side: int = 64) -> TrainingStream:
    return TrainingStream(data, 200, seed=0, jitter=ScaleJitter((low, high), side, MEAN))


def extent(image: torch.Tensor) -> tuple[int, int]:
    """Of what is no padding."""
    seen = (image != torch.tensor(MEAN)[:, None, None]).any(dim=0)
    return int(seen.any(dim=1).sum()), int(seen.any(dim=0).sum())


def test_sizes_are_what_the_factors_say(data: CocoDataset) -> None:
    """Images of 96 x 96 fit a square of 64 at the factor 1; larger ones are cropped, smaller ones padded."""
    sides = []
    for image, _ in (stream(data, 0.1, 2.0)[n] for n in range(200)):
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32
        height, width = extent(image)
        assert height == width
        sides.append(height)
    assert min(sides) in (6, 7, 8) and max(sides) == 64
    whole = sum(side == 64 for side in sides) / 200
    assert whole == pytest.approx(1 / 1.9, abs=0.12)  # the share of factors above 1
    assert {extent(stream(data, 0.5, 0.5)[n][0]) for n in range(9)} == {(32, 32)}


def test_boxes_follow_the_image(data: CocoDataset) -> None:
    checked = 0
    samples = stream(data, 0.7, 2.0, side=96)
    for n in range(100):
        image, target = samples[n]
        red = (image[0] > 0.6) & (image[1] < 0.4)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = box
            assert 0 <= x1 < x2 <= 96 and 0 <= y1 < y2 <= 96
            if label != data.labels[SQUARE]:
                continue
            assert red[round(y1) + 1 : round(y2) - 1, round(x1) + 1 : round(x2) - 1].all()
            assert x1 < 2 or not red[round(y1) : round(y2), round(x1) - 2].any()
            assert y2 > 93 or not red[round(y2) + 1, round(x1) : round(x2)].any()
            checked += 1
    assert checked > 20


def test_what_is_hardly_visible_stays_and_what_is_outside_does_not() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 100, 100], [40, 40, 60, 60], [0, 0, 10, 10]])
    labels, areas = torch.tensor([CROWD, 1, 2]), []
    for _ in range(100):
        cropped, kept, kept_labels = ScaleJitter((2.0, 2.0), 100, MEAN)(image, boxes, labels)
        assert cropped.shape == (3, 100, 100)
        assert kept_labels[0] == CROWD and kept[0].tolist() == [0, 0, 100, 100]
        assert (kept[:, 2:] > kept[:, :2]).all()
        areas += (kept[:, 2:] - kept[:, :2]).prod(dim=1)[kept_labels == 2].tolist()
    assert 0 < len(areas) < 100 and 0 < min(areas) < 0.4 * 400
    thin = torch.zeros(3, 2, 100, dtype=torch.uint8)
    small, kept, _ = ScaleJitter((0.1, 0.1), 100, MEAN)(thin, boxes[:1].clamp(max=2), labels[:1])
    assert small.shape == (3, 1, 10) and len(kept) == 1


def test_the_model_takes_the_square_as_it_is() -> None:
    """The padding is 0 where it is normalised, and nothing is resized again."""
    jitter = ScaleJitter((0.5, 0.5), LETTERBOX.max_size, LETTERBOX.image_mean)
    image = jitter.pad(torch.rand(3, 30, 48))
    assert image.shape == (3, 96, 96)
    batch, _ = transform(LETTERBOX).train()([image], None)
    mean, std = (
        torch.tensor(getattr(LETTERBOX, f"image_{n}"))[:, None, None] for n in ("mean", "std")
    )
    assert torch.equal(batch.tensors[0], (image - mean) / std)
    assert (batch.tensors[0, :, 30:] == 0).all() and (batch.tensors[0, :, :, 48:] == 0).all()


def test_where_it_can_be() -> None:
    boxed = Recipe(model=LETTERBOX, scale_jitter=(0.1, 2.0))
    for changes, sentence in (
        (
            {"scale_jitter": (2.0, 0.1)},
            "scale_jitter must be the lower and the higher limit, got 2.0, 0.1",
        ),
        ({"crop": 64}, "crop must be nothing with scale_jitter, got 64"),
        (
            {"model": dataclasses.replace(LETTERBOX, letterbox=False)},
            r"scale_jitter must be nothing without the model's letterbox, got \(0.1, 2.0\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            dataclasses.replace(boxed, **changes)


def test_a_run_with_it(data: CocoDataset, tmp_path: Path) -> None:
    """Its samples are the recipe's, and neither the number of workers nor an interruption changes them."""
    model = {"letterbox": True, "min_size": 64, "max_size": 64, "image_mean": MEAN}
    recipe = dataclasses.replace(with_model(TINY_RECIPE, **model), scale_jitter=(0.3, 2.0))
    image, _ = training_stream(recipe, data)[0]
    assert torch.equal(image, stream(data, 0.3, 2.0)[0][0])
    weights = []
    for workers in (0, 1):
        file = tmp_path / f"{workers}.pt"
        train(recipe, data, file, pretrained=False, workers=workers)
        weights.append(load_checkpoint(file)["model"])
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value)
