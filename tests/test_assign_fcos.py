"""assign_fcos against the reference, torchvision's FCOS and what mmdet's gave."""

import math
from types import SimpleNamespace

import pytest
import torch
from assignments import GOLDEN, grid, positives, random_boxes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection import FCOS

from focalops import assign_fcos, reference

STRIDES = [8, 16, 32]
RULES = ["torchvision", "mmdet"]


def check_is_the_references(points, strides, level_sizes, gt_boxes, **options) -> Tensor:
    matches = assign_fcos(points, strides, level_sizes, gt_boxes, **options)
    assert matches.dtype == torch.int64
    expected = reference.assign_fcos(points, strides, level_sizes, gt_boxes, **options)
    assert torch.equal(matches, expected)
    return matches


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("counts", [(0,), (1,), (5, 0, 33), (300, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_references(rule, counts, dtype, device):
    points, level_sizes = grid(160, STRIDES, device)
    gt_boxes = [random_boxes(n, 160).to(device, dtype) for n in counts]
    for center_radius in (1.5, None):
        options = {"rule": rule, "center_radius": center_radius}
        matches = check_is_the_references(
            points.to(dtype), STRIDES, level_sizes, gt_boxes, **options
        )
        assert (matches >= 0).any() or max(counts) < 2
        by_column = points.flip(1).to(dtype)
        check_is_the_references(by_column, STRIDES, level_sizes, gt_boxes, **options)


@pytest.mark.parametrize("level_sizes", [[0], [1], [31, 0, 2], [257], [255, 256, 129], [1] * 8], ids=str)  # fmt: skip
def test_any_number_of_points(level_sizes, device):
    points = torch.rand(sum(level_sizes), 2, device=device) * 160
    strides = [8.0 * 2**i for i in range(len(level_sizes))]
    gt_boxes = [random_boxes(20, 160).to(device) for _ in range(2)]
    check_is_the_references(points, strides, level_sizes, gt_boxes)


@pytest.mark.parametrize("center_radius", [1.5, 1.3, 3.0])
def test_is_torchvisions(center_radius, device):
    """Of boxes on the cells' edges too, which lie on every limit; torchvision needs five levels for none of this."""
    points, level_sizes = grid(160, STRIDES, device)
    strides = torch.tensor(STRIDES).repeat_interleave(torch.tensor(level_sizes))[:, None].to(device)
    anchors = torch.cat((points - strides / 2, points + strides / 2), dim=1)
    boxes = random_boxes(40, 160).to(device)
    gt_boxes = [boxes, (boxes / 8).round() * 8, boxes[:1], boxes[:0], boxes[[0, 0, 1, 1]]]
    head = SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matches: matches)
    model = SimpleNamespace(center_sampling_radius=center_radius, head=head)
    targets = [{"boxes": b} for b in gt_boxes]
    expected = FCOS.compute_loss(model, targets, {}, [anchors] * len(gt_boxes), level_sizes)
    matches = assign_fcos(points, STRIDES, level_sizes, gt_boxes, center_radius=center_radius)
    assert torch.equal(matches, torch.stack(expected))


@pytest.mark.parametrize("scene", GOLDEN["fcos"], ids=lambda scene: scene["kind"])
def test_is_mmdets(scene, device):
    points, level_sizes = grid(scene["size"], scene["strides"], device)
    boxes = torch.tensor(scene["boxes"], device=device).reshape(-1, 4)
    for call in scene["calls"]:
        options = {"rule": "mmdet", "center_radius": call["center_radius"]}
        matches = check_is_the_references(points, scene["strides"], level_sizes, [boxes], **options)
        assert positives(matches[0]) == call["positives"]


def test_rules_differ(device):
    """A box whose farthest side is 64 px away belongs to no level by one rule, to two by the other."""
    points = torch.tensor([[36.0, 36], [36, 36]], device=device)
    boxes = torch.tensor([[0.0, 0, 100, 72]], device=device)
    options = {"center_radius": None}
    assert assign_fcos(points, [8, 16], [1, 1], [boxes], **options).tolist() == [[-1, -1]]
    both = assign_fcos(points, [8, 16], [1, 1], [boxes], rule="mmdet", **options)
    assert both.tolist() == [[0, 0]]
    # What the areas leave of 1e8 is the same in float32.
    close = torch.tensor([[30.0, 30, 42, 42], [30, 30, 42, 41.7]], device=device)
    assert assign_fcos(points[:1], [8], [1], [close]).tolist() == [[0]]
    assert assign_fcos(points[:1], [8], [1], [close], rule="mmdet").tolist() == [[1]]
    assert assign_fcos(points[:1].double(), [8], [1], [close]).tolist() == [[1]]


@pytest.mark.parametrize("rule", RULES)
def test_ranges(rule, device):
    points, level_sizes = grid(160, STRIDES, device)
    gt_boxes = [random_boxes(30, 160).to(device)]
    own = [(0, 64), (64, 128), (128, math.inf)]
    matches = check_is_the_references(points, STRIDES, level_sizes, gt_boxes, rule=rule, ranges=own)
    assert torch.equal(matches, assign_fcos(points, STRIDES, level_sizes, gt_boxes, rule=rule))
    other = [(0, 20), (10, 60), (100, 30)]
    check_is_the_references(points, STRIDES, level_sizes, gt_boxes, rule=rule, ranges=other)


@pytest.mark.parametrize("rule", RULES)
def test_boxes_at_the_ends_of_a_range(rule, device):
    """Half of the longer side is the least that a point in a box can have, and all of it nearly the most."""
    along = torch.arange(41) / 2
    points = torch.cartesian_prod(along, along).flip(1).to(device)
    boxes = torch.tensor([[2.0, 2, 18, 6], [2, 2, 6, 18], [4, 4, 20, 20], [2, 2, 13, 12]])
    found = 0
    for limits in ((0, 8), (8, 8), (8, 15.5), (15.5, 16), (15.5, 15.5), (16, 20), (5.5, 5.5), (0, 5.5)):  # fmt: skip
        options = {"rule": rule, "center_radius": None, "ranges": [limits]}
        arguments = (points, [8], [len(points)], [boxes[i : i + 1].to(device) for i in range(4)])
        found += (check_is_the_references(*arguments, **options) >= 0).any().item()
    assert found == (2 if rule == "torchvision" else 7)


@pytest.mark.parametrize("rule", RULES)
def test_crowds(rule, device):
    points, level_sizes = grid(160, STRIDES, device)
    gt_boxes = [random_boxes(n, 160).to(device) for n in (40, 0, 300)]
    crowd = [torch.rand(len(boxes), device=device) < 0.1 for boxes in gt_boxes]
    for boxes, is_crowd in zip(gt_boxes, crowd, strict=True):
        boxes[3:4] = torch.tensor([30.0, 40, 60, 70], device=device)  # whose edge is on no point
        is_crowd[3:4] = True
    options = {"rule": rule, "crowd": crowd}
    matches = check_is_the_references(points, STRIDES, level_sizes, gt_boxes, **options)
    low, high = points.new_tensor([30, 40]), points.new_tensor([60, 70])
    inside = ((points > low) & (points < high)).all(1)
    for match, is_crowd in zip(matches, crowd, strict=True):
        assert not torch.isin(match, torch.where(is_crowd)[0]).any()
        assert not len(is_crowd) or (match[inside] == -2).all()
    assert (matches[1] == -1).all()


def test_padded_boxes_and_counts(device):
    points, level_sizes = grid(160, STRIDES, device)
    counts = [7, 0, 40]
    gt_boxes = [random_boxes(n, 160).to(device) for n in counts]
    expected = assign_fcos(points, STRIDES, level_sizes, gt_boxes)
    padded = torch.full(
        (3, 40, 4), 20.0, device=device
    )  # what lies behind the count is not looked at
    padded[:, :, 2:] = 40
    for row, boxes in zip(padded, gt_boxes, strict=True):
        row[: len(boxes)] = boxes
    for dtype in (torch.int32, torch.int64):
        on_device = torch.tensor(counts, dtype=dtype, device=device)
        strided = torch.stack((on_device, on_device + 1), dim=1)[:, 0]
        transposed = padded.transpose(0, 1).contiguous().transpose(0, 1)
        matches = assign_fcos(points, STRIDES, level_sizes, transposed, counts=strided)
        assert torch.equal(matches, expected)


def test_counts_out_of_range(backend, device):
    points, level_sizes = grid(64, STRIDES, device)
    gt_boxes = random_boxes(6, 64).view(2, 3, 4).to(device)
    counts = torch.tensor([-2, 9], device=device)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"counts must lie in \[0, 3\], .* got -2"):
            assign_fcos(points, STRIDES, level_sizes, gt_boxes, counts=counts)
    else:  # the nearest that is in range
        expected = assign_fcos(points, STRIDES, level_sizes, gt_boxes, counts=counts.clamp(0, 3))
        matches = assign_fcos(points, STRIDES, level_sizes, gt_boxes, counts=counts)
        assert torch.equal(matches, expected)


def test_other_dtypes_and_no_images(device):
    points, level_sizes = grid(64, STRIDES, device)
    boxes = random_boxes(12, 64).round().to(device)
    expected = assign_fcos(points, STRIDES, level_sizes, [boxes])
    for dtype in (torch.int64, torch.float16, torch.bfloat16):
        matches = assign_fcos(points.to(dtype), STRIDES, level_sizes, [boxes.to(dtype)])
        assert torch.equal(matches, expected)
    matches = assign_fcos(points, STRIDES, level_sizes, [boxes.double().requires_grad_()])
    assert matches.shape == expected.shape
    assert assign_fcos(points, STRIDES, level_sizes, []).shape == (0, len(points))
    huge = torch.tensor([[0.0, 0, 1e4, 1e4]], device=device)  # of an area of 1e8
    assert (assign_fcos(points, STRIDES, level_sizes, [huge]) == -1).all()


COORDINATES = st.sampled_from([-3.0, 0, 1, 1.5, 2, 4, 7, 20, 1e6, 1e30, math.inf, math.nan])


@given(
    st.lists(st.tuples(COORDINATES, COORDINATES), min_size=1, max_size=30),
    st.lists(st.tuples(*[COORDINATES] * 4), max_size=12),
    st.sampled_from(RULES),
    st.sampled_from([None, 0.0, 0.5, 2.0]),
    st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_any_boxes(points, boxes, rule, center_radius, crowd):
    """Inverted ones, infinite ones and what is not a number included."""
    first = len(points) // 2
    check_is_the_references(
        torch.tensor(points),
        [1, 2],
        [first, len(points) - first],
        [torch.tensor(boxes).reshape(-1, 4)],
        rule=rule,
        center_radius=center_radius,
        crowd=[torch.tensor(crowd[: len(boxes)], dtype=torch.bool)] if sum(crowd) > 6 else None,
    )


def test_opcheck_and_compiles_whole(device):
    points, level_sizes = grid(32, STRIDES, device)
    gt_boxes = torch.stack([random_boxes(5, 32).to(device) for _ in range(2)])
    crowd = torch.rand(2, 5, device=device) < 0.3
    limits = ([0.0, 64, 128], [64.0, 128, math.inf])
    for counts, of_boxes in ((None, None), (torch.tensor([5, 2], device=device), crowd)):
        arguments = (points, gt_boxes, counts, of_boxes, level_sizes, STRIDES, *limits, 1.5, 0)
        torch.library.opcheck(torch.ops.focalops.assign_fcos.default, arguments)

    def f(points, gt_boxes):
        return assign_fcos(points, STRIDES, level_sizes, gt_boxes)

    boxes = list(gt_boxes)
    whole = torch.compile(f, fullgraph=True, dynamic=True)
    assert torch.equal(whole(points, boxes), f(points, boxes))
