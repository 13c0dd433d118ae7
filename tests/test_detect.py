"""detect against the reference and torchvision's RetinaNet."""

from unittest.mock import patch

import pytest
import torch
from detections import assert_same_detections
from torch import Tensor
from torchvision.models.detection import retinanet
from torchvision.ops import boxes as box_ops

from focalops import decode_boxes, detect, reference, soft_nms

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = {"planes": [False], "rows": [True], "mixed": [True, False, False, True]}
# Planes that end inside a vector and begin off a 16-byte boundary, an empty level, one position.
SIZES = ((5, 7), (3, 5), (0, 3), (1, 1))
IMAGE = (40, 56)
METHODS = ("hard", "linear", "gaussian")


def lay_out(levels: list[Tensor], layout: str) -> list[Tensor]:
    pattern = LAYOUTS[layout]
    return [
        level.contiguous(memory_format=torch.channels_last) if pattern[i % len(pattern)] else level
        for i, level in enumerate(levels)
    ]


def make_logits(sizes, images: int, channels: int, low: float, high: float) -> list[Tensor]:
    """In random order evenly from low to high, so that no two scores of an image are near each other."""
    shapes = [(channels, *size) for size in sizes]
    counts = [channels * height * width for height, width in sizes]
    levels = [torch.empty(images, *shape) for shape in shapes]
    for i in range(images):
        values = torch.linspace(low, high, sum(counts))[torch.randperm(sum(counts))]
        for level, part, shape in zip(levels, values.split(counts), shapes, strict=True):
            level[i] = part.view(shape)
    return levels


def make_anchors(sizes, anchors: int) -> Tensor:
    levels = []
    for i, (height, width) in enumerate(sizes):
        stride = 8 * 2**i
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        center = torch.stack((x, y, x, y), dim=-1).unsqueeze(2) * stride  # (H, W, 1, 4)
        half = stride * (1 + torch.rand(anchors, 2))
        levels.append((center + torch.cat((-half, half), dim=1)).reshape(-1, 4))
    return torch.cat(levels)


def setup(
    device: str,
    dtype: torch.dtype = torch.float32,
    layout: str = "mixed",
    images: int = 2,
    anchors: int = 3,
    classes: int = 5,
    sizes=SIZES,
    low: float = -8,
    high: float = 4,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    logits = make_logits(sizes, images, anchors * classes, low, high)
    deltas = [torch.randn(images, anchors * 4, *size) * 0.3 for size in sizes]
    return (
        lay_out([level.to(device, dtype) for level in logits], layout),
        lay_out([level.to(device, dtype) for level in deltas], layout),
        make_anchors(sizes, anchors).to(device),
    )


def check_against_reference(head, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = detect(*head, **options)
    expected = reference.detect(*head, **options)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.dtype == theirs.dtype
        if ours.dtype == torch.int64:
            assert torch.equal(ours, theirs)
        else:
            # Rounding of the exponential, in pixels of an image of a hundred.
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-5)
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("anchors", "classes"), [(1, 1), (2, 3)])
def test_matches_the_reference(anchors, classes, dtype, layout, device):
    head = setup(device, dtype, layout, anchors=anchors, classes=classes)
    sizes = torch.tensor([IMAGE, (34, 50)], device=device)
    check_against_reference(head, topk_per_level=20, image_sizes=sizes, max_detections=30)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("topk", [1, 7, 10**12])
def test_options(topk, iou_threshold, class_agnostic, device):
    options = {
        "topk_per_level": topk,
        "iou_threshold": iou_threshold,
        "class_agnostic": class_agnostic,
        "weights": (10.0, 10.0, 5.0, 5.0),
        "clip": 0.01,
        "max_detections": 50,
    }
    check_against_reference(setup(device), image_sizes=[IMAGE, IMAGE], **options)
    check_against_reference(setup(device), image_sizes=None, overlap="diou", **options)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("topk", [1, 30, 10**12])
def test_candidates_of_all_levels_together(topk, method, class_agnostic, device):
    options = {
        "topk": topk,
        "method": method,
        "class_agnostic": class_agnostic,
        "iou_threshold": 0.3,
        "sigma": 0.4,
        "max_detections": 40,
    }
    # Decays differ by the roundings of the IoUs: scores that they leave near each other may change places.
    head = setup(device, low=-5)
    *_, counts = check_against_reference(head, image_sizes=[IMAGE, IMAGE], **options)
    assert ((counts > 0) & (counts <= min(topk, 40))).all()
    check_against_reference(head, topk_per_level=9, **options)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_is_that_of_decoded_candidates(method, device):
    logits, deltas, anchors = setup(device)
    options = {"iou_threshold": 0.4, "max_detections": 60, "score_threshold": 0.02}
    results = detect([*logits], deltas, anchors, topk=200, method=method, **options)
    for i in range(2):
        rows = [reference.head_rows(level[i : i + 1], 5)[0] for level in logits]
        scores = torch.cat(rows).sigmoid().flatten()
        row_deltas = torch.cat([reference.head_rows(level[i : i + 1], 4)[0] for level in deltas])
        best = scores.sort(descending=True, stable=True).indices[:200]
        boxes, labels = decode_boxes(row_deltas, anchors)[best // 5], best % 5
        indices, kept_scores, num_kept = soft_nms(
            boxes[None], scores[best][None], labels[None], method=method, **options
        )
        keep = indices[0, : num_kept[0]]
        assert results[3][i] == num_kept[0]
        count = int(num_kept[0])
        torch.testing.assert_close(results[0][i, :count], boxes[keep], rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(results[1][i], kept_scores[0], rtol=1e-5, atol=1e-7)
        assert torch.equal(results[2][i, :count], labels[keep])
        assert (results[2][i, count:] == -1).all() and (results[0][i, count:] == 0).all()


@pytest.mark.parametrize("score_threshold", [-1.0, 0.0, 0.05, 0.5, 0.98, 0.99, 1.0, 2.0])
def test_score_threshold(score_threshold, device):
    head = setup(device, images=1, anchors=2, classes=3)
    head[0][1][0, :, 0, 0] = 0  # a score of exactly 0.5
    head[0][1][0, 1, 1, 0] = torch.inf
    head[0][1][0, 1, 1, 1] = -torch.inf
    *_, counts = check_against_reference(head, score_threshold=score_threshold, iou_threshold=1.0)
    assert counts.item() == {0.99: 1, 1.0: 0, 2.0: 0}.get(score_threshold, counts.item())


@pytest.mark.parametrize("max_detections", [0, 1, 200])
def test_max_detections(max_detections, device):
    head = setup(device)
    boxes, scores, labels, counts = check_against_reference(head, max_detections=max_detections)
    assert boxes.shape == (2, max_detections, 4)
    for i, count in enumerate(counts.tolist()):
        assert (scores[i, :count] > 0.05).all() and (labels[i, :count] >= 0).all()
        assert (boxes[i, count:] == 0).all() and (scores[i, count:] == 0).all()
        assert (labels[i, count:] == -1).all()


# ---- exact cuts ---------------------------------------------------------------------------------

# A level with more candidates than the CUDA kernel's buffer, and one with fewer.
LARGE = ((10, 11), (3, 5))


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("topk", [1, 100])
def test_more_pass_than_fit(topk, dtype, layout, device):
    """Half precision has few logits, so that many of them are equal at the cut."""
    head = setup(device, dtype, layout, anchors=3, classes=7, sizes=LARGE, low=-1, high=6)
    options = {"score_threshold": -1.0, "topk_per_level": topk, "iou_threshold": 1.0}
    *_, counts = check_against_reference(head, max_detections=2 * topk, **options)
    assert (counts == 2 * topk).all()


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("value", [-3.0, 0.0, 20.0, torch.inf])
def test_all_scores_equal(value, layout, device):
    head = setup(device, layout=layout, images=1, anchors=3, classes=7, sizes=LARGE)
    for level in head[0]:
        level.fill_(value)
    head[0][0][0, 3, 2, 1] = 30 if value == 20 else value  # different logits, the same score
    options = {"score_threshold": 0.0, "topk_per_level": 50, "iou_threshold": 1.0}
    _, _, labels, counts = check_against_reference(head, **options)
    assert counts == 100 and labels[0, :50].tolist() == [i % 7 for i in range(50)]


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("topk", [50, 2280])
def test_most_scores_equal(topk, layout, device):
    """More than fit, of which those of the cut share their first digits and the others do not."""
    head = setup(device, layout=layout, images=2, anchors=3, classes=7, sizes=LARGE)
    for level in head[0]:
        others = torch.rand_like(level) < 0.02
        level.copy_(torch.where(others, level, 0.5))
    options = {"score_threshold": 0.0, "topk_per_level": topk, "iou_threshold": 1.0}
    check_against_reference(head, max_detections=topk, **options)


def test_one_level_overflows_in_one_image(device):
    head = setup(device, images=3, anchors=3, classes=7, sizes=LARGE, low=-8, high=-4)
    head[0][0][1] += 6
    check_against_reference(head, topk_per_level=20, max_detections=40)


def test_topk_larger_than_the_least_buffer(device):
    head = setup(device, images=1, anchors=3, classes=7, sizes=LARGE[:1])
    options = {"score_threshold": 0.0, "iou_threshold": 1.0, "max_detections": 1100}
    check_against_reference(head, topk_per_level=1030, **options)


def test_two_runs_give_the_same_bits(device):
    head = setup(device, images=1, anchors=3, classes=7, sizes=LARGE)
    before = torch.get_num_threads()
    runs = []
    for threads in (1, before):
        torch.set_num_threads(threads)
        runs.append(detect(*head, score_threshold=0.0))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- torchvision --------------------------------------------------------------------------------


def torchvision_detections(head, image_sizes, anchors, **options) -> list[dict[str, Tensor]]:
    logits, deltas, anchor_boxes = head
    model = retinanet.RetinaNet.__new__(retinanet.RetinaNet)
    torch.nn.Module.__init__(model)
    model.score_thresh = options["score_threshold"]
    model.topk_candidates = options["topk_per_level"]
    model.nms_thresh = options["iou_threshold"]
    model.detections_per_img = options["max_detections"]
    model.box_coder = retinanet.det_utils.BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    rows = [
        [reference.head_rows(level, level.shape[1] // columns) for level in levels]
        for levels, columns in ((logits, anchors), (deltas, anchors))
    ]
    per_level = list(anchor_boxes.split([level.shape[1] for level in rows[1]]))
    # Its other way moves classes apart by offsets, which round the coordinates.
    with patch.object(box_ops, "_batched_nms_coordinate_trick", box_ops._batched_nms_vanilla):
        return model.postprocess_detections(
            {"cls_logits": rows[0], "bbox_regression": rows[1]},
            [per_level] * len(image_sizes),
            image_sizes,
        )


def check_against_torchvision(head, anchors: int) -> None:
    options = {
        "score_threshold": 0.05,
        "topk_per_level": 50,
        "iou_threshold": 0.5,
        "max_detections": 60,
    }
    image_sizes = [IMAGE, (34, 50)]
    boxes, scores, labels, counts = detect(*head, image_sizes=image_sizes, **options)
    expected = torchvision_detections(head, image_sizes, anchors, **options)
    for i, one in enumerate(expected):
        count = int(counts[i])
        got = {"boxes": boxes[i, :count], "scores": scores[i, :count], "labels": labels[i, :count]}
        # torchvision's sigmoid rounds otherwise on another SIMD width.
        assert_same_detections(got, one, scores=(2e-6, 0), boxes=(2e-6, 2e-5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torchvision(layout, backend, device):
    for seed in range(334 if backend == "cpu" else 2):  # a thousand heads
        torch.manual_seed(seed)
        anchors, classes = int(torch.randint(1, 5, ())), int(torch.randint(1, 12, ()))
        low = -float(torch.rand(()) * 8)
        head = setup(device, layout=layout, anchors=anchors, classes=classes, low=low)
        check_against_torchvision(head, anchors)


# ---- hostile input ------------------------------------------------------------------------------


def test_nan_and_infinite_logits(device):
    head = setup(device, anchors=3, classes=7, sizes=LARGE)
    for level in head[0]:
        level[torch.rand_like(level) < 0.2] = torch.nan
        level[torch.rand_like(level) < 0.1] = torch.inf
        level[torch.rand_like(level) < 0.1] = -torch.inf
    for score_threshold in (-1.0, 0.05):
        options = {"score_threshold": score_threshold, "topk_per_level": 30}
        _, scores, _, counts = check_against_reference(head, iou_threshold=0.9, **options)
        assert (counts > 0).all() and not scores.isnan().any()
    for level in head[0]:
        level.fill_(torch.nan)
    *_, counts = check_against_reference(head, score_threshold=-1.0)
    assert (counts == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_hostile_deltas(value, device):
    head = setup(device)
    for level in head[1]:
        level[torch.rand_like(level) < 0.05] = value
    for sizes in (None, [IMAGE, IMAGE]):
        boxes, *_ = check_against_reference(head, image_sizes=sizes, max_detections=100)
        assert not boxes.isnan().any()


def test_boxes_of_no_area(device):
    logits, deltas, anchors = setup(device)
    anchors[:, 2:] = anchors[:, :2]
    check_against_reference((logits, deltas, anchors), max_detections=100)
    # All of them outside the image, and so clipped to nothing.
    anchors += 1e6
    check_against_reference((logits, deltas, anchors), image_sizes=[IMAGE, IMAGE])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [((0, 0),), ((0, 4), (3, 0))])
@pytest.mark.parametrize("images", [0, 2])
def test_no_anchors(images, sizes, method, device):
    boxes, scores, labels, counts = check_against_reference(
        setup(device, images=images, sizes=sizes), max_detections=5, method=method
    )
    assert boxes.shape == (images, 5, 4) and (counts == 0).all()
    assert (labels == -1).all() and (scores == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_images(method, device):
    head = setup(device, images=0)
    found = detect(*head, image_sizes=torch.empty(0, 2), method=method)
    assert [t.shape[0] for t in found] == [0] * 4


@pytest.mark.parametrize("method", METHODS)
def test_no_classes(method, device):
    _, deltas, anchors = setup(device)
    logits = [level[:, :0] for level in deltas]
    assert (detect(logits, deltas, anchors, method=method)[3] == 0).all()


# ---- as an op -----------------------------------------------------------------------------------


def test_other_memory(device):
    """Strided levels are copied; one that begins off a 16-byte boundary is read where it lies."""
    logits, deltas, anchors = setup(device, sizes=LARGE)
    expected = detect(logits, deltas, anchors)
    strided = [torch.cat((level, level), dim=3)[..., : level.shape[3]] for level in logits]
    shifted = []
    for level in logits:
        flat = torch.empty(level.numel() + 1, device=device)[1:]
        shifted.append(flat.as_strided(level.shape, level.stride()).copy_(level))
    columns = anchors.t().contiguous().t()
    for levels in (strided, shifted):
        results = detect(levels, deltas, columns)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_nothing_is_differentiated(device):
    logits, deltas, anchors = setup(device)
    logits[0].requires_grad_()
    deltas[0].requires_grad_()
    assert not any(t.requires_grad for t in detect(logits, deltas, anchors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, device):
    head = setup(device, dtype, sizes=SIZES[1:])
    sizes = torch.tensor([IMAGE, IMAGE], dtype=torch.float32, device=device)
    for image_sizes in (None, sizes):
        arguments = (*head, image_sizes, [1.0] * 4, 4.0, 0.05, 10, 0.5, 20, False)
        torch.library.opcheck(torch.ops.focalops.detect.default, arguments)
        for topk in (None, 12):
            arguments = (*head, image_sizes, [1.0] * 4, 4.0, 0.05, 10, topk)
            torch.library.opcheck(torch.ops.focalops._head_candidates.default, arguments)


@pytest.mark.parametrize("method", ["hard", "gaussian"])
def test_compiles_whole(method, device):
    logits, deltas, anchors = setup(device)
    sizes = torch.tensor([IMAGE, IMAGE], device=device)

    def f(logits, deltas, anchors, sizes):
        levels = [level * 2 for level in logits]
        return detect(levels, deltas, anchors, image_sizes=sizes, topk=40, method=method)

    compiled = torch.compile(f, fullgraph=True)(logits, deltas, anchors, sizes)
    expected = f(logits, deltas, anchors, sizes)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))
