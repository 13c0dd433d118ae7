"""assign_atss against the reference, and what mmdet's and mmyolo's assigners gave."""

import math

import pytest
import torch
from assignments import GOLDEN, positives, random_boxes, squares
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focalops import assign_atss, reference

STRIDES = [8, 16, 32]
RULES = ["atss", "mmyolo"]


def check_is_the_references(anchors, level_sizes, gt_boxes, *arguments, **options) -> Tensor:
    matches = assign_atss(anchors, level_sizes, gt_boxes, *arguments, **options)
    assert matches.dtype == torch.int64
    expected = reference.assign_atss(anchors, level_sizes, gt_boxes, *arguments, **options)
    assert torch.equal(matches, expected)
    return matches


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("counts", [(0,), (1,), (5, 0, 33), (60, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_references(rule, counts, dtype, device):
    anchors, level_sizes = squares(160, STRIDES, 8, device)
    gt_boxes = [random_boxes(n, 160).to(device, dtype) for n in counts]
    for at_least_one in (False, True):
        options = {"rule": rule, "at_least_one": at_least_one}
        matches = check_is_the_references(anchors.to(dtype), level_sizes, gt_boxes, **options)
        assert (matches >= 0).any() or max(counts) < 2


@pytest.mark.parametrize("topk", [1, 2, 31, 32, 33, 81, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_number_of_candidates(topk, dtype, device):
    """Whose IoUs are added up in the order of the reference, and of levels that have fewer."""
    anchors, level_sizes = squares(128, STRIDES, 8, device)
    gt_boxes = [random_boxes(9, 128).to(device, dtype)]
    check_is_the_references(anchors.to(dtype), level_sizes, gt_boxes, topk)


@pytest.mark.parametrize("level_sizes", [[0], [1], [31, 0, 2], [257], [255, 256, 129], [1] * 8], ids=str)  # fmt: skip
def test_any_number_of_anchors(level_sizes, device):
    """Whose order is not that of a grid."""
    anchors = random_boxes(sum(level_sizes), 160).to(device)
    gt_boxes = [random_boxes(20, 160).to(device) for _ in range(2)]
    for rule in RULES:
        check_is_the_references(anchors, level_sizes, gt_boxes, rule=rule, at_least_one=True)


def crossings(x: list[float], y: list[float], of_crossing: int = 1, half: float = 8) -> Tensor:
    """Anchors about the crossings of columns and rows, row by row, of growing sides."""
    rows, columns = torch.meshgrid(torch.tensor(y), torch.tensor(x), indexing="ij")
    centers = torch.stack((columns, rows), dim=-1).reshape(-1, 1, 2)
    halves = half * torch.arange(1, of_crossing + 1)[:, None]
    return torch.cat((centers - halves, centers + halves), dim=-1).reshape(-1, 4)


@pytest.mark.parametrize("of_crossing, topk", [(1, 1), (1, 9), (2, 20), (9, 9), (3, 128)])
def test_grids_of_any_proportions(of_crossing, topk, device):
    """A few columns and rows around a box hold its candidates only where both are as far apart."""
    even = [8.0 * i for i in range(12)]
    squeezed = [i / 4 for i in range(20)]
    apart = [float(i * i) for i in range(9)]
    boxes = random_boxes(5, 96)
    boxes = torch.cat((boxes, boxes + 300, boxes * 1e4, boxes.round())).to(device)
    for x, y in ((even, even), (even, squeezed), (squeezed, even), (apart, even), ([0.0], even), (even, [3.0])):  # fmt: skip
        anchors = crossings(x, y, of_crossing)
        level_sizes = [len(anchors), len(x) * of_crossing]
        anchors = torch.cat((anchors, anchors[: level_sizes[1]])).to(device)
        check_is_the_references(anchors, level_sizes, [boxes], topk)


@pytest.mark.parametrize("of_crossing", [1, 3])
def test_crowds_around_a_box(of_crossing, device):
    """Its candidates are then far from it, or none."""
    anchors = crossings([8.0 * i for i in range(16)], [8.0 * i for i in range(16)], of_crossing)
    boxes = torch.tensor([[30.0, 30, 90, 90], [50, 50, 70, 70], [0, 0, 9, 9]])
    for crowd in ([41.0, 41, 79, 79], [33, -8, 87, 150], [-9, -9, 999, 999]):
        of_image = torch.cat((boxes, torch.tensor([crowd]))).to(device)
        is_crowd = torch.tensor([False, False, False, True], device=device)
        options = {"crowd": [is_crowd], "at_least_one": True}
        check_is_the_references(anchors.to(device), [len(anchors)], [of_image], **options)


@pytest.mark.parametrize("changed", ["nothing", "a center", "order", "a row", "not a number"])
def test_nearly_grids(changed, device):
    """One anchor that is not where the grid would have it is found all the same."""
    x = [8.0 * i for i in range(25)]
    anchors = crossings(x, x)
    if changed == "a center":
        anchors[-7] = torch.tensor([20.0, 20, 36, 36])
    elif changed == "order":
        anchors = anchors[torch.randperm(len(anchors))]
    elif changed == "a row":
        anchors = torch.cat((anchors[:25], anchors[:25], anchors[50:], anchors[25:50]))
    elif changed == "not a number":
        anchors[-7] = math.nan
    boxes = torch.cat((random_boxes(15, 200), torch.tensor([[10.0, 10, 46, 46]])))
    for topk in (1, 9):
        check_is_the_references(anchors.to(device), [len(anchors)], [boxes.to(device)], topk)


@pytest.mark.parametrize("is_grid", [True, False])
def test_boxes_infinitely_far_away(is_grid, device):
    """All anchors are equally near to them, and those of them that exist are the candidates."""
    x = [8.0 * i for i in range(25)]
    anchors = crossings(x, x).to(device)
    anchors = anchors if is_grid else anchors.flip(0)
    corners = torch.tensor([-math.inf, -1e38, 0, 1e38, math.inf, math.nan])
    boxes = torch.cartesian_prod(corners, corners, corners, corners).to(device)
    for topk in (3, 128):
        check_is_the_references(anchors, [len(anchors)], [boxes[::31]], topk)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("least, most", [(1, 12), (5, 40), (100, 900)])
def test_crowded_images(rule, least, most, device):
    """Nearly all anchors are claimed by several boxes."""
    anchors, level_sizes = squares(96, STRIDES, 5, device)
    boxes = random_boxes(60, 96, least, most).to(device)
    check_is_the_references(anchors, level_sizes, [boxes], rule=rule)
    check_is_the_references(anchors, level_sizes, [boxes], rule=rule, at_least_one=True)


@pytest.mark.parametrize("rule", RULES)
def test_ties(rule, device):
    """Centers on the cells' edges and corners, anchors at one location and boxes that are the same."""
    anchors, level_sizes = squares(96, STRIDES, 8, device)
    anchors = anchors.repeat_interleave(2, dim=0)
    level_sizes = [2 * size for size in level_sizes]
    boxes = (random_boxes(30, 96, most=100) / 16).round().to(device) * 16
    for topk in (3, 9):
        check_is_the_references(anchors, level_sizes, [boxes, boxes[[0, 0, 1, 1]]], topk, rule=rule)


@pytest.mark.parametrize("scene", GOLDEN["atss"], ids=lambda scene: scene["kind"])
def test_is_mmdets_and_mmyolos(scene, device):
    boxes = torch.tensor(scene["boxes"], device=device)
    for call in scene["calls"]:
        anchors, level_sizes = squares(scene["size"], scene["strides"], call["sides"], device)
        matches = check_is_the_references(
            anchors, level_sizes, [boxes], call["topk"], rule=call["rule"]
        )
        assert positives(matches[0]) == call["positives"]


def test_rules_differ(device):
    """Where all IoUs are equal, they reach the threshold by one rule alone."""
    anchors = torch.tensor([[0.0, 0, 8, 8]] * 3, device=device)
    boxes = torch.tensor([[1.0, 1, 7, 7]], device=device)
    assert assign_atss(anchors, [3], [boxes]).tolist() == [[0, 0, 0]]
    assert assign_atss(anchors, [3], [boxes], rule="mmyolo").tolist() == [[-1, -1, -1]]
    # A center that is inside by 0.005, of the better of two anchors.
    anchors = torch.tensor([[-8.0, -8, 8, 8], [40, 40, 48, 48], [50, 50, 58, 58]], device=device)
    boxes = torch.tensor([[-0.005, -8, 8, 8]], device=device)
    assert assign_atss(anchors, [3], [boxes]).tolist() == [[-1, -1, -1]]
    assert assign_atss(anchors, [3], [boxes], rule="mmyolo").tolist() == [[0, -1, -1]]


def test_a_box_may_end_with_nothing(device):
    """IoUs of 1, 5, 5, 5 have the mean 4 and the deviation 2, and a single one has no deviation."""
    anchors = torch.tensor([[0.0, 0, 10, 10], *[[0.0, 0, 10, 50]] * 3], device=device)
    boxes = torch.tensor([[0.0, 0, 10, 100]], device=device)
    for rule in RULES:
        for n in (4, 1):
            options = {"rule": rule}
            matches = assign_atss(anchors[:n], [n], [boxes], **options)
            assert matches.tolist() == [[-1] * n]
            matches = assign_atss(anchors[:n], [n], [boxes], at_least_one=True, **options)
            assert matches.tolist() == [[-1, 0, -1, -1] if n == 4 else [0]]


def test_at_least_one_takes_no_boxs_only_anchor(device):
    anchors = torch.tensor([[0.0, 0, 8, 8]], device=device)
    boxes = torch.tensor([[0.0, 0, 8, 7], [0, 0, 8, 8], [40, 40, 48, 48]], device=device)
    matches = assign_atss(anchors, [1], [boxes], at_least_one=True)
    assert matches.tolist() == [[0]]
    # The second takes one of the two that the first has, of equal ones the first; the third finds none.
    anchors = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8]], device=device)
    boxes = torch.tensor([[0.0, 0, 8, 8], [7, 7, 20, 20], [7, 7, 21, 21]], device=device)
    assert assign_atss(anchors, [2], [boxes]).tolist() == [[0, 0]]
    matches = check_is_the_references(anchors, [2], [boxes], at_least_one=True)
    assert matches.tolist() == [[1, 0]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_crowds(rule, dtype, device):
    anchors, level_sizes = squares(160, STRIDES, 8, device)
    anchors = anchors.to(dtype)
    gt_boxes = [random_boxes(n, 160).to(device, dtype) for n in (40, 0, 60)]
    crowd = [torch.rand(len(boxes), device=device) < 0.1 for boxes in gt_boxes]
    for boxes, is_crowd in zip(gt_boxes, crowd, strict=True):
        boxes[3:4] = torch.tensor([30.0, 40, 60, 70], device=device)  # whose edge is on no center
        is_crowd[3:4] = True
    options = {"rule": rule, "crowd": crowd}
    matches = check_is_the_references(anchors, level_sizes, gt_boxes, **options)
    check_is_the_references(anchors, level_sizes, gt_boxes, at_least_one=True, **options)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    low, high = centers.new_tensor([30, 40]), centers.new_tensor([60, 70])
    inside = ((centers > low) & (centers < high)).all(1)
    for match, is_crowd in zip(matches, crowd, strict=True):
        assert not torch.isin(match, torch.where(is_crowd)[0]).any()
        assert not len(is_crowd) or (match[inside] == -2).all()
    assert (matches[1] == -1).all()


def test_padded_boxes_and_counts(device):
    anchors, level_sizes = squares(160, STRIDES, 8, device)
    counts = [7, 0, 40]
    gt_boxes = [random_boxes(n, 160).to(device) for n in counts]
    expected = assign_atss(anchors, level_sizes, gt_boxes)
    # What lies behind the count is not looked at.
    padded = torch.tensor([20.0, 20, 40, 40], device=device).repeat(3, 40, 1)
    for row, boxes in zip(padded, gt_boxes, strict=True):
        row[: len(boxes)] = boxes
    for dtype in (torch.int32, torch.int64):
        on_device = torch.tensor(counts, dtype=dtype, device=device)
        strided = torch.stack((on_device, on_device + 1), dim=1)[:, 0]
        transposed = padded.transpose(0, 1).contiguous().transpose(0, 1)
        matches = assign_atss(anchors, level_sizes, transposed, counts=strided)
        assert torch.equal(matches, expected)


def test_counts_out_of_range(backend, device):
    anchors, level_sizes = squares(64, STRIDES, 8, device)
    gt_boxes = random_boxes(6, 64).view(2, 3, 4).to(device)
    counts = torch.tensor([-2, 9], device=device)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"counts must lie in \[0, 3\], .* got -2"):
            assign_atss(anchors, level_sizes, gt_boxes, counts=counts)
    else:  # the nearest that is in range
        expected = assign_atss(anchors, level_sizes, gt_boxes, counts=counts.clamp(0, 3))
        assert torch.equal(assign_atss(anchors, level_sizes, gt_boxes, counts=counts), expected)


def test_other_dtypes_and_no_images(device):
    anchors, level_sizes = squares(64, STRIDES, 8, device)
    boxes = random_boxes(12, 64).round().to(device)
    expected = assign_atss(anchors, level_sizes, [boxes])
    for dtype in (torch.int64, torch.float16, torch.bfloat16):
        matches = assign_atss(anchors.to(dtype), level_sizes, [boxes.to(dtype)])
        assert torch.equal(matches, expected)
    matches = assign_atss(anchors, level_sizes, [boxes.double().requires_grad_()])
    assert matches.shape == expected.shape
    assert assign_atss(anchors, level_sizes, []).shape == (0, len(anchors))


COORDINATES = st.sampled_from([-3.0, 0, 1, 1.5, 2, 4, 7, 20, 1e6, 1e30, math.inf, math.nan])
BOXES = st.tuples(*[COORDINATES] * 4)


@given(
    st.lists(BOXES, min_size=1, max_size=30),
    st.lists(BOXES, max_size=12),
    st.sampled_from(RULES),
    st.sampled_from([1, 2, 9]),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.booleans(),
)
def test_any_boxes(anchors, boxes, rule, topk, crowd, at_least_one):
    """Inverted ones, infinite ones and what is not a number included."""
    first = len(anchors) // 2
    check_is_the_references(
        torch.tensor(anchors),
        [first, len(anchors) - first],
        [torch.tensor(boxes).reshape(-1, 4)],
        topk,
        rule=rule,
        crowd=[torch.tensor(crowd[: len(boxes)], dtype=torch.bool)] if sum(crowd) > 6 else None,
        at_least_one=at_least_one,
    )


LINES = st.lists(st.integers(-6, 6), min_size=1, max_size=9, unique=True).map(sorted)
CORNERS = st.tuples(*[st.integers(-20, 20)] * 2, *[st.integers(0, 12)] * 2)


@given(
    LINES, LINES, st.integers(1, 3), st.integers(1, 12), st.lists(CORNERS, min_size=1, max_size=8)
)
def test_any_grid(x, y, of_crossing, topk, corners):
    """With distances that are equal far from each other, of which the first anchor counts."""
    anchors = crossings([float(i) for i in x], [float(i) for i in y], of_crossing, half=1)
    boxes = torch.tensor([(i, j, i + w, j + h) for i, j, w, h in corners]) / 2
    check_is_the_references(anchors, [len(anchors)], [boxes], topk, at_least_one=True)


def test_opcheck_and_compiles_whole(device):
    anchors, level_sizes = squares(32, STRIDES, 8, device)
    gt_boxes = torch.stack([random_boxes(5, 32).to(device) for _ in range(2)])
    crowd = torch.rand(2, 5, device=device) < 0.3
    for counts, of_boxes in ((None, None), (torch.tensor([5, 2], device=device), crowd)):
        arguments = (anchors, gt_boxes, counts, of_boxes, level_sizes, 9, 0, True)
        torch.library.opcheck(torch.ops.focalops.assign_atss.default, arguments)

    def f(anchors, gt_boxes):
        return assign_atss(anchors, level_sizes, gt_boxes)

    boxes = list(gt_boxes)
    whole = torch.compile(f, fullgraph=True, dynamic=True)
    assert torch.equal(whole(anchors, boxes), f(anchors, boxes))
