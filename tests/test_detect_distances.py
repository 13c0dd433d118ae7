"""detect of heads without anchor boxes, whose boxes are distances, or distributions of them."""

import pytest
import torch
from test_detect import (
    DTYPES,
    IMAGE,
    LAYOUTS,
    METHODS,
    SIZES,
    check_against_reference,
    lay_out,
    make_logits,
)
from torch import Tensor

from focalops import decode_distances, detect

STRIDES = [8, 16, 32, 64]


def head(
    device: str,
    bins: int = 4,
    dtype: torch.dtype = torch.float32,
    layout: str = "mixed",
    classes: int = 3,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    logits = make_logits(SIZES, 2, classes, -8, 4)
    scale = 2.0 if bins > 1 else 0.5
    distances = [torch.randn(2, 4 * bins, *size) * scale + (bins == 1) for size in SIZES]
    points = []
    for (height, width), stride in zip(SIZES, STRIDES, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points.append((torch.stack((x, y), dim=-1).reshape(-1, 2) + 0.5) * stride)
    return (
        lay_out([level.to(device, dtype) for level in logits], layout),
        lay_out([level.to(device, dtype) for level in distances], layout),
        torch.cat(points).to(device),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", [1, 4])
def test_matches_the_reference(bins, dtype, layout, device):
    options = {"coding": "distance", "strides": STRIDES, "bins": bins, "topk_per_level": 20}
    sizes = torch.tensor([IMAGE, (34, 50)], device=device)
    results = check_against_reference(
        head(device, bins, dtype, layout), image_sizes=sizes, max_detections=30, **options
    )
    assert (results[3] > 5).all()


@pytest.mark.parametrize("method", METHODS)
def test_methods(method, device):
    options = {"coding": "distance", "strides": STRIDES, "bins": 4, "method": method}
    check_against_reference(head(device), max_detections=20, topk=40, **options)


def test_boxes_are_those_of_decode_distances(device):
    """Whichever are left, not their neighbours'; without clipping and with it."""
    logits, distances, points = head(device, bins=16)
    options = {"strides": STRIDES, "bins": 16}
    for sizes in (None, [IMAGE, (34, 50)]):
        every = decode_distances(distances, points, image_sizes=sizes, **options)
        boxes, _, _, counts = detect(
            *(logits, distances, points),
            **{"image_sizes": sizes, "coding": "distance", "iou_threshold": 1, **options},
        )
        for found, of_image, count in zip(boxes, every, counts.tolist(), strict=True):
            assert count > 50
            off = (found[:count, None] - of_image[None]).abs().amax(-1).amin(1)
            assert off.max() < 1e-3  # pixels: the exponentials of two kernels


def test_what_is_no_number(device):
    logits, distances, points = head(device, bins=4, layout="planes")
    distances[0][:, 5] = float("nan")
    distances[1][:, 2] = float("inf")
    options = {"coding": "distance", "strides": STRIDES, "bins": 4}
    boxes, _, _, counts = check_against_reference((logits, distances, points), **options)
    assert torch.isfinite(boxes).all() and (counts > 0).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"strides": None}, "strides must be numbers, one for each level, with coding 'distance', got none"),
        ({"strides": [8]}, "detect: strides must be 4 numbers, one for each level, got 1"),
        ({"bins": 0}, "detect: bins must lie in [1, 2^29), got 0"),
        ({"bins": 5}, "detect: box_deltas must have 4 channels for each of 5 bins, got 16"),
        ({"coding": "bins"}, "coding must be 'deltas' or 'distance', got 'bins'"),
        ({"coding": "deltas"}, "strides must be None unless coding is 'distance', got [8.0, 16.0, 32.0, 64.0]"),
        ({"coding": "deltas", "strides": None}, "bins must be 1 unless coding is 'distance', got 4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("native", [True, False])
def test_errors(options, sentence, native, device, request):
    if not native:
        request.getfixturevalue("without_kernels")
    arguments = {"coding": "distance", "strides": STRIDES, "bins": 4} | options
    with pytest.raises(ValueError) as error:
        detect(*head(device), **arguments)
    assert str(error.value) == sentence
    logits, distances, points = head(device)
    with pytest.raises(ValueError, match=r"anchors must have shape \(51, 2\), 1 at each"):
        detect(logits, distances, points.repeat(1, 2), coding="distance", strides=STRIDES, bins=4)


def test_opcheck_and_compiles_whole(device):
    inputs = head(device)
    defaults = ([1.0] * 4, 4.0, 0.05, 10, 0.5, 20, False, False, None, STRIDES, 4)
    torch.library.opcheck(torch.ops.focalops.detect.default, (*inputs, None, *defaults))

    def f(logits, distances, points):
        return detect(logits, distances, points, coding="distance", strides=STRIDES, bins=4)

    whole = torch.compile(f, fullgraph=True)
    assert all(map(torch.equal, whole(*inputs), f(*inputs)))
