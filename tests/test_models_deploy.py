"""The deployed forms of the detector give the detections of the eager model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_models_retinanet import TINY
from torch import Tensor

import focalops
from models import deploy
from models.retinanet import RetinaNet, RetinaNetConfig

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(TINY, min_size=None, score_threshold=0.0, detections_per_image=20)
# What rounding makes of boxes of a hundred pixels and of scores where convolutions are compiled.
ROUNDING = (1e-2, 1e-5, 0, 0)


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    torch.manual_seed(0)
    return RetinaNet(CONFIG).eval()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    rng = np.random.default_rng(0)
    shapes = ((96, 120), (128, 60))
    return [torch.from_numpy(rng.random((3, *shape), dtype=np.float32)) for shape in shapes]


def check_detections(found, expected, tolerances=(0, 0, 0, 0)) -> None:
    for a, b, tolerance in zip(found, expected, tolerances, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@torch.no_grad()
def test_detector_is_the_eager_model(model, images):
    detector = deploy.StaticDetector(model)
    boxes, scores, labels, counts = detector(*detector.to_batch(images))
    for i, expected in enumerate(model(images)):
        count = counts[i]
        assert count == len(expected["scores"]) > 5
        assert torch.equal(boxes[i, :count], expected["boxes"])
        assert torch.equal(scores[i, :count], expected["scores"])
        assert torch.equal(labels[i, :count], expected["labels"])


RESIZING = dataclasses.replace(CONFIG, min_size=(96, 128), max_size=256)


@pytest.fixture(scope="module")
def resizing() -> RetinaNet:
    torch.manual_seed(0)
    return RetinaNet(RESIZING).eval()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(60, 90), (33, 64), (200, 300), (500, 70), (128, 128)])
def test_images_are_resized_as_the_model_resizes_them(resizing, shape):
    image = torch.rand(3, *shape)
    (expected,) = resizing([image])
    detector = deploy.StaticDetector(resizing)
    boxes, scores, labels, counts = detector(*detector.to_batch([image]))
    assert counts[0] == len(expected["scores"]) > 5
    # Normalising after the resize instead of before rounds otherwise.
    torch.testing.assert_close(boxes[0, : counts[0]], expected["boxes"], rtol=0, atol=1e-3)
    torch.testing.assert_close(scores[0, : counts[0]], expected["scores"], rtol=0, atol=1e-5)
    assert torch.equal(labels[0, : counts[0]], expected["labels"])


@torch.no_grad()
def test_a_batch_of_several_sizes_is_resized(resizing, images):
    detector = deploy.StaticDetector(resizing)
    batch = detector.to_batch(images)
    boxes, scores, _, counts = detector(*batch)
    for i, expected in enumerate(resizing(images)):
        torch.testing.assert_close(boxes[i, : counts[i]], expected["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[i, : counts[i]], expected["scores"], rtol=0, atol=1e-5)
    exported = deploy.export(detector, *batch).module()
    other = detector.to_batch([torch.rand(3, 40, 77)])
    check_detections(exported(*detector.prepare(*other)), detector(*other))
    with pytest.raises(ValueError, match="3000 x 2 pixels is too thin to be resized"):
        detector(*detector.to_batch([torch.rand(3, 2, 3000)]))


@torch.no_grad()
def test_what_lies_in_the_padding_is_not_seen(model, images):
    detector = deploy.StaticDetector(model)
    batch, sizes = detector.to_batch(images)
    expected = detector(batch, sizes)
    batch[0, :, 96:] = torch.nan
    batch[1, :, :, 60:] = 7
    check_detections(detector(batch, sizes), expected)


@torch.no_grad()
def test_half_precision(model, images):
    detector = deploy.StaticDetector(RetinaNet(CONFIG)).bfloat16()
    batch, sizes = detector.to_batch(images)
    boxes, scores, _, counts = detector(batch.bfloat16(), sizes)
    assert boxes.dtype == scores.dtype == torch.float32
    assert (counts > 5).all() and (boxes[0, :, 2] <= 120).all() and (boxes[1, :, 3] <= 128).all()


@torch.no_grad()
def test_compiles_to_one_graph(model, images):
    detector = deploy.StaticDetector(model)
    batch = detector.to_batch(images)
    compiled = torch.compile(detector, fullgraph=True)
    check_detections(compiled(*batch), detector(*batch), ROUNDING)


@torch.no_grad()
def test_exports_for_any_batch_and_size(model, images):
    detector = deploy.StaticDetector(model)
    exported = deploy.export(detector, *detector.to_batch(images)).module()
    for shapes in ([(96, 120), (128, 60)], [(200, 65)], [(64, 64), (96, 96), (32, 300)]):
        batch = detector.to_batch([torch.rand(3, *shape) for shape in shapes])
        check_detections(exported(*batch), detector(*batch))


class Coarse(RetinaNetConfig):
    size_divisor = 64


SQUARE = dataclasses.replace(CONFIG, min_size=128, max_size=128, letterbox=True)


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [Coarse(**dataclasses.asdict(RESIZING)), SQUARE], ids=["coarse", "letterbox"]
)
def test_runs_from_cpp_without_python(config, images, tmp_path):
    torch.manual_seed(0)
    detector = deploy.StaticDetector(RetinaNet(config))
    batch = detector.to_batch(images)
    package = tmp_path / "detector.pt2"
    run = deploy.package(deploy.export(detector, *batch), package, detector.metadata)
    check_detections(run(*detector.prepare(*batch)), detector(*batch), ROUNDING)

    make = ["make", "-C", ROOT / "models" / "cpp", f"PYTHON={sys.executable}", f"OUT={tmp_path}"]
    subprocess.run(make, check=True, capture_output=True)
    library = Path(focalops.__file__).with_name("libfocalops.so")

    def detect(*arguments: Path) -> subprocess.CompletedProcess[str]:
        # Nothing of Python's can be found: neither its modules nor its library.
        environment = {"PATH": os.environ["PATH"]}
        return subprocess.run(
            [tmp_path / "detect", *arguments], capture_output=True, text=True, env=environment
        )

    # 128 x 164 pixels, where multiples of 32 and of 64 give the same batch, and 128 x 146, where they do not.
    runs = [(package, 90), (package, 80)]
    if config.letterbox:
        runs.append((package, 160))  # 56 x 128, which multiples of 32 would not make a square
    else:
        older = tmp_path / "older.pt2"
        without_divisor(package, older)
        runs.append((older, 90))
    for file, width in runs:
        pixels = np.random.default_rng(1).integers(0, 256, (70, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.ppm")
        result = detect(file, tmp_path / "image.ppm", library)
        assert result.returncode == 0, result.stderr
        image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        boxes, scores, labels, counts = detector(*detector.to_batch([image]))
        lines = result.stdout.splitlines()
        rows = torch.tensor([[float(x) for x in line.split()] for line in lines])
        assert len(rows) == counts[0] > 5
        expected = torch.cat((labels[0, :, None], scores[0, :, None], boxes[0]), dim=1)
        torch.testing.assert_close(rows, expected[: len(rows)], rtol=0, atol=2e-2)

    assert "no binary PPM" in detect(package, package, library).stderr
    assert "missing.pt2 cannot be opened" in detect(Path("missing.pt2"), package, library).stderr


def without_divisor(package: Path, older: Path) -> None:
    """The package as it was written before packages had a size_divisor."""
    removed = 0
    with zipfile.ZipFile(package) as read, zipfile.ZipFile(older, "w") as written:
        for name in read.namelist():
            content = read.read(name)
            if name.endswith("_metadata.json"):
                metadata = json.loads(content)
                removed += metadata.pop("size_divisor", None) == "64"
                content = json.dumps(metadata).encode()
            written.writestr(name.replace(package.stem, older.stem, 1), content)
    assert removed


@torch.no_grad()
def test_cuda_graph(model, images, backend):
    if backend != "cuda":
        pytest.skip("needs a GPU")
    detector = deploy.StaticDetector(RetinaNet(CONFIG)).cuda()
    batch, sizes = (t.cuda() for t in detector.to_batch(images))
    replay = deploy.capture(detector, batch, sizes)
    for other in (batch, batch.flip(0), batch * 0.5):
        check_detections(replay(other, sizes), detector(other, sizes))


def test_disagreement_says_what_differs(model, images):
    with torch.no_grad():
        detector = deploy.StaticDetector(model)
        expected = detector(*detector.to_batch(images))
    assert deploy.disagreement(expected, expected) is None
    boxes, scores, labels, counts = expected
    moved = boxes + torch.tensor([[[0.0]], [[9.0]]])
    assert deploy.disagreement((moved, scores, labels, counts), expected) == (
        "image 1 lacks 20 of 20 detections"
    )
    fewer = (boxes, scores, labels, counts - 1)
    assert deploy.disagreement(fewer, expected) == "image 0 has 19 detections, not 20"
