"""detect of heads that score their anchors too: the objectness of YOLOX, the centerness of FCOS."""

from unittest.mock import patch

import pytest
import torch
from detections import assert_same_detections
from test_detect import (
    DTYPES,
    IMAGE,
    LARGE,
    LAYOUTS,
    METHODS,
    SIZES,
    check_against_reference,
    lay_out,
    make_logits,
)
from test_detect import setup as setup_anchors
from test_detect_distances import STRIDES
from test_detect_distances import head as head_of_distances
from torch import Tensor
from torchvision.models.detection import _utils, fcos
from torchvision.ops import batched_nms, box_convert
from torchvision.ops import boxes as box_ops

from focalops import detect, reference

COMBINE = ("product", "sqrt")
# With logits of hundredths two scores, or roots of them, are equal or differ by far more than an ulp.
FACTORS = torch.tensor([-3.9, 0, torch.inf])


def factors_like(logits: list[Tensor], anchors: int, layout: str) -> list[Tensor]:
    levels = []
    for level in logits:
        shape = (level.shape[0], anchors, *level.shape[2:])
        levels.append(FACTORS[torch.randint(0, len(FACTORS), shape)].to(level))
    return lay_out(levels, layout)


def setup(
    device: str,
    dtype: torch.dtype = torch.float32,
    layout: str = "mixed",
    anchors: int = 3,
    classes: int = 5,
    sizes=SIZES,
    low: int = -900,
) -> tuple[tuple, dict]:
    """What detect takes,."""
    head = setup_anchors(device, dtype, layout, anchors=anchors, classes=classes, sizes=sizes)
    for level in head[0]:
        level.copy_(torch.randint(low, 600, level.shape) / 100)
    return head, {"score_factors": factors_like(head[0], anchors, layout)}


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("anchors", "classes"), [(1, 1), (2, 3)])
def test_matches_the_reference(anchors, classes, dtype, layout, combine, device):
    head, factors = setup(device, dtype, layout, anchors, classes)
    sizes = torch.tensor([IMAGE, (34, 50)], device=device)
    options = {"topk_per_level": 20, "image_sizes": sizes, "max_detections": 30}
    *_, counts = check_against_reference(head, combine=combine, **factors, **options)
    assert (counts > 2).all()


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("layouts", [("planes", "rows"), ("rows", "planes")])
def test_factors_lie_in_their_own_way(layouts, combine, device):
    head, _ = setup(device, layout=layouts[0])
    factors = factors_like(head[0], 3, layouts[1])
    check_against_reference(head, score_factors=factors, combine=combine)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bins", [1, 4])
def test_distances(bins, method, combine, device):
    logits, distances, points = head_of_distances(device, bins)
    for level in logits:
        level.copy_(torch.randint(-500, 600, level.shape) / 100)
    options = {"coding": "distance", "strides": STRIDES, "bins": bins, "method": method}
    options |= {"topk": 40, "max_detections": 20, "image_sizes": [IMAGE, (34, 50)]}
    factors = factors_like(logits, 1, "mixed")
    check_against_reference(
        (logits, distances, points), score_factors=factors, combine=combine, **options
    )


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("score_threshold", [-1.0, 0.0, 0.05, 0.5, 0.7071067690849304, 0.98, 1.0])
def test_score_threshold(score_threshold, combine, device):
    """Scores of 1/2, and roots of it, are not above them; with a factor of 1 a class of more than a quarter has such a root."""
    head, factors = setup(device, anchors=2, classes=3)
    head[0][1][0, :3, 0, 0] = torch.tensor([0, torch.inf, -torch.inf])
    factors["score_factors"][1][0, 0, 0, 0] = torch.inf
    options = {"score_threshold": score_threshold, "iou_threshold": 1.0}
    *_, counts = check_against_reference(head, combine=combine, **factors, **options)
    if score_threshold == 1:
        assert (counts == 0).all()


def points_apart(n: int, device: str) -> dict:
    """What makes of n logits of a level of one row as many boxes that do not overlap."""
    return {
        "box_deltas": [torch.ones(1, 4, 1, n, device=device)],
        "anchors": torch.arange(n, device=device)[:, None].expand(n, 2) * 10.0,
        "coding": "distance",
        "strides": [1],
        "max_detections": n,
        "topk_per_level": n,
    }


@pytest.mark.parametrize("combine", COMBINE)
def test_nothing_that_passes_is_missed(combine, device):
    """Logits next to the least that can pass, each with factors next to 1 and next to the least: the same bits as the score that
    a logit has alone gives."""
    threshold = 0.3
    least = torch.tensor(threshold if combine == "product" else threshold**2).logit()
    near = least.view(torch.int32) + torch.arange(-12, 12, dtype=torch.int32)
    values = torch.cat((near.view(torch.float32), torch.tensor([2.0, 14, 15, 16, 17, 20])))
    values = values.sort(descending=True).values
    n = len(values)
    alone = detect(
        cls_logits=[values.view(1, 1, 1, n).to(device)],
        score_threshold=-1.0,
        **points_apart(n, device),
    )[1][0].cpu()
    scores = alone[:, None] * alone  # of class and factor
    if combine == "sqrt":
        scores = scores.double().sqrt().float()  # rounded once, as torch's root of float32 is not
    logits, factors = (
        t.reshape(1, 1, 1, n * n).to(device) for t in torch.meshgrid(values, values, indexing="ij")
    )
    _, found, _, counts = detect(
        cls_logits=[logits],
        score_factors=[factors],
        combine=combine,
        score_threshold=threshold,
        **points_apart(n * n, device),
    )
    expected = scores[scores > torch.tensor(threshold)].sort(descending=True).values
    assert 100 < len(expected) < n * n / 2
    assert torch.equal(found[0, : int(counts)].cpu(), expected)


# ---- exact cuts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("topk", [1, 100])
def test_more_pass_than_fit(topk, dtype, layout, combine, device):
    """In the CUDA kernel's buffer, where those that have a low factor do not count."""
    head, factors = setup(device, dtype, layout, classes=12, sizes=LARGE, low=-100)
    options = {"score_threshold": 0.02, "topk_per_level": topk, "iou_threshold": 1.0}
    options |= {"max_detections": 2 * topk, "combine": combine}
    *_, counts = check_against_reference(head, **factors, **options)
    assert (counts == 2 * topk).all()
    few = [level.clamp(max=-30) for level in factors["score_factors"]]
    few[0][:, 1, 2, 3] = 0
    *_, counts = check_against_reference(head, score_factors=few, **options)
    assert (counts <= 12).all()


def test_all_scores_equal(device):
    head, factors = setup(device, classes=12, sizes=LARGE)
    for level in (*head[0], *factors["score_factors"]):
        level.fill_(30)
    options = {"topk_per_level": 50, "iou_threshold": 1.0}
    _, _, labels, counts = check_against_reference(head, **factors, **options)
    assert (counts == 100).all() and labels[0, :50].tolist() == [i % 12 for i in range(50)]


def test_more_pass_than_a_thread_keeps(backend, device):
    """The worst of those that it keeps raises the threshold of what follows."""
    sizes = ((40, 60), (20, 30)) if backend == "cpu" else LARGE
    head, factors = setup(device, classes=9, sizes=sizes, low=-100)
    for combine in COMBINE:
        options = {"topk_per_level": 300, "iou_threshold": 1.0, "combine": combine}
        check_against_reference(head, max_detections=600, **factors, **options)


# ---- the peers ----------------------------------------------------------------------------------


def grid_points(sizes, offset: float = 0.5) -> list[Tensor]:
    points = []
    for (height, width), stride in zip(sizes, STRIDES, strict=False):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points.append((torch.stack((x, y), dim=-1).reshape(-1, 2) + offset) * stride)
    return points


def torchvision_detections(
    logits: list[Tensor], distances: list[Tensor], factors: list[Tensor], options: dict
) -> list[dict[str, Tensor]]:
    """FCOS.postprocess_detections of the rows that its head makes."""
    model = fcos.FCOS.__new__(fcos.FCOS)
    torch.nn.Module.__init__(model)
    model.score_thresh = options["score_threshold"]
    model.topk_candidates = options["topk_per_level"]
    model.nms_thresh = options["iou_threshold"]
    model.detections_per_img = options["max_detections"]
    model.box_coder = _utils.BoxLinearCoder(normalize_by_size=True)
    names = ("cls_logits", "bbox_regression", "bbox_ctrness")
    outputs = {
        name: [reference.head_rows(level, level.shape[1]) for level in levels]
        for name, levels in zip(names, (logits, distances, factors), strict=True)
    }
    anchors = [
        torch.cat((points - stride / 2, points + stride / 2), dim=1)
        for points, stride in zip(grid_points(SIZES), STRIDES, strict=True)
    ]
    sizes = options["image_sizes"]
    # Its other way moves classes apart by offsets, which round the coordinates.
    with patch.object(box_ops, "_batched_nms_coordinate_trick", box_ops._batched_nms_vanilla):
        return model.postprocess_detections(outputs, [anchors] * len(sizes), sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torchvisions_fcos(layout, backend, device):
    for seed in range(250 if backend == "cpu" else 2):
        torch.manual_seed(seed)
        classes = int(torch.randint(1, 12, ()))
        logits = make_logits(SIZES, 2, classes, -4 * float(torch.rand(())), 4)
        distances = [torch.randn(2, 4, *size).relu() * 3 for size in SIZES]
        factors = [torch.randn(2, 1, *size) * 2 for size in SIZES]
        options = {
            "score_threshold": 0.2,
            "topk_per_level": 50,
            "iou_threshold": 0.6,
            "max_detections": 60,
            "image_sizes": [IMAGE, (34, 50)],
        }
        expected = torchvision_detections(logits, distances, factors, options)
        points = torch.cat(grid_points(SIZES))
        levels = [
            [level.to(device) for level in lay_out(levels, layout)]
            for levels in (logits, distances, factors)
        ]
        *padded, counts = detect(
            *(*levels[:2], points.to(device)),
            coding="distance",
            strides=STRIDES,
            score_factors=levels[2],
            combine="sqrt",
            **options,
        )
        for i, one in enumerate(expected):
            names = ("boxes", "scores", "labels")
            got = {n: t[i, : int(counts[i])].cpu() for n, t in zip(names, padded, strict=True)}
            # torchvision's sigmoid rounds otherwise on another SIMD width.
            assert_same_detections(got, one, scores=(2e-6, 0), boxes=(2e-6, 2e-5))


def yolox_detections(
    outputs: list[Tensor], score_threshold: float, iou_threshold: float
) -> list[dict[str, Tensor]]:
    """As YOLOX defines them: of levels (B, 4 + 1 + K, H, W) the center is the cell's corner and an offset in strides, the sides are
    exponentials, and an anchor has its best class alone, whose probability times objectness is its score."""
    rows = []
    sizes = [level.shape[2:] for level in outputs]
    for level, corners, stride in zip(outputs, grid_points(sizes, 0.0), STRIDES, strict=False):
        of_level = level.flatten(2).transpose(1, 2).clone()  # (B, H * W, 5 + K)
        of_level[..., :2] = of_level[..., :2] * stride + corners
        of_level[..., 2:4] = of_level[..., 2:4].exp() * stride
        rows.append(of_level)
    found = []
    for image in torch.cat(rows, dim=1):
        boxes = box_convert(image[:, :4], "cxcywh", "xyxy")
        best, labels = image[:, 5:].sigmoid().max(dim=1)
        scores = image[:, 4].sigmoid() * best
        boxes, scores, labels = (t[scores > score_threshold] for t in (boxes, scores, labels))
        with patch.object(box_ops, "_batched_nms_coordinate_trick", box_ops._batched_nms_vanilla):
            keep = batched_nms(boxes, scores, labels, iou_threshold)
        found.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
    return found


def test_equals_yolox(backend, device):
    sizes = SIZES[:2]
    for seed in range(200 if backend == "cpu" else 2):
        torch.manual_seed(seed)
        outputs = [torch.randn(2, 4 + 1 + 6, *size) for size in sizes]
        expected = yolox_detections(outputs, 0.2, 0.6)
        deltas, factors, logits = (
            [level.to(device) for level in levels]
            for levels in zip(*(level.split((4, 1, 6), dim=1) for level in outputs), strict=True)
        )
        anchors = [
            torch.cat((corners - stride / 2, corners + stride / 2), dim=1)
            for corners, stride in zip(grid_points(sizes, 0.0), STRIDES, strict=False)
        ]
        best_class = [
            level.where(level == level.amax(dim=1, keepdim=True), -torch.inf) for level in logits
        ]
        *padded, counts = detect(
            *(best_class, deltas, torch.cat(anchors).to(device)),
            score_factors=factors,
            score_threshold=0.2,
            iou_threshold=0.6,
            topk_per_level=10**6,
            clip=torch.inf,
        )
        for i, one in enumerate(expected):
            names = ("boxes", "scores", "labels")
            got = {n: t[i, : int(counts[i])].cpu() for n, t in zip(names, padded, strict=True)}
            assert_same_detections(got, one, scores=(2e-6, 0), boxes=(2e-6, 2e-5))


# ---- hostile input ------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("score_threshold", [-1.0, 0.05])
def test_nan_and_infinite_logits(score_threshold, combine, device):
    head, factors = setup(device, classes=7, sizes=LARGE)
    for level in (*head[0], *factors["score_factors"]):
        level[torch.rand_like(level) < 0.2] = torch.nan
        level[torch.rand_like(level) < 0.1] = torch.inf
        level[torch.rand_like(level) < 0.1] = -torch.inf
    options = {"score_threshold": score_threshold, "topk_per_level": 30, "iou_threshold": 0.9}
    _, scores, _, counts = check_against_reference(head, combine=combine, **factors, **options)
    assert (counts > 0).all() and not scores.isnan().any()
    for level in factors["score_factors"]:
        level.fill_(torch.nan)
    *_, counts = detect(*head, combine=combine, **factors, **options)
    assert (counts == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_detect(method, device):
    """Neither positions, nor images, nor classes."""
    for sizes in (((0, 0),), ((0, 4), (3, 0))):
        head, factors = setup(device, sizes=sizes)
        *_, counts = check_against_reference(head, method=method, **factors)
        assert (counts == 0).all()
    (logits, deltas, anchors), factors = setup(device)
    none = [level[:, :0] for level in logits]
    assert (detect(none, deltas, anchors, method=method, **factors)[3] == 0).all()
    none = [[level[:0] for level in levels] for levels in (logits, deltas)]
    of_none = [level[:0] for level in factors["score_factors"]]
    assert detect(*none, anchors, method=method, score_factors=of_none)[3].shape == (0,)


# ---- as an op -----------------------------------------------------------------------------------


def test_other_memory(device):
    """Strided factors are copied; those that begin off a 16-byte boundary are read where they lie."""
    head, factors = setup(device, sizes=LARGE)
    expected = detect(*head, **factors)
    levels = factors["score_factors"]
    strided = [torch.cat((level, level), dim=3)[..., : level.shape[3]] for level in levels]
    shifted = []
    for level in levels:
        flat = torch.empty(level.numel() + 1, device=device)[1:]
        shifted.append(flat.as_strided(level.shape, level.stride()).copy_(level))
    for others in (strided, shifted):
        results = detect(*head, score_factors=others)
        assert all(map(torch.equal, results, expected))


def test_factors_are_not_differentiated(device):
    head, factors = setup(device)
    factors["score_factors"][0].requires_grad_()
    assert not any(t.requires_grad for t in detect(*head, **factors))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (lambda f: f[:1], "detect: score_factors must be 4 levels like cls_logits, got 1"),
        (lambda f: [*f[:3], f[3].double()], "detect: score_factors[3] must be torch.float32 like cls_logits[0], got torch.float64"),
        (lambda f: [*f[:3], f[3][:, 1:]], "detect: score_factors[3] must have shape (B, A, H, W), B and A the same in all levels, H and W those of the level, got (2, 2, 1, 1)"),
        (lambda f: [f[0][..., 1:], *f[1:]], "detect: score_factors[0] must have shape (B, A, H, W), B and A the same in all levels, H and W those of the level, got (2, 3, 5, 6)"),
        (lambda f: [level[:, :1] for level in f], "detect: score_factors must have a channel for each of 3 anchors, got 1"),
        (lambda f: None, "detect: combine must be 'product' unless there are score_factors, got 'sqrt'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("method", ["hard", "linear"])
def test_errors(given, sentence, method, native, device, request):
    if not native:
        request.getfixturevalue("without_kernels")
    head, factors = setup(device)
    with pytest.raises(ValueError) as error:
        detect(*head, score_factors=given(factors["score_factors"]), combine="sqrt", method=method)
    assert str(error.value) == sentence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, device):
    head, factors = setup(device, dtype, sizes=SIZES[1:])
    first = (*head, None, [1.0] * 4, 4.0, 0.05, 10)
    for takes_root in (False, True):
        arguments = (
            *first,
            0.5,
            20,
            False,
            False,
            None,
            [],
            1,
            takes_root,
            factors["score_factors"],
        )
        torch.library.opcheck(torch.ops.focalops.detect.default, arguments)
        arguments = (*first, 12, [], 1, takes_root, factors["score_factors"])
        torch.library.opcheck(torch.ops.focalops._head_candidates.default, arguments)


@pytest.mark.parametrize("method", ["hard", "gaussian"])
def test_compiles_whole_and_exports(method, device):
    (logits, deltas, anchors), factors = setup(device)

    class Model(torch.nn.Module):
        def forward(self, logits, deltas, anchors, factors):
            factors = [level * 2 for level in factors]
            options = {"combine": "sqrt", "topk": 40, "method": method}
            return detect(logits, deltas, anchors, score_factors=factors, **options)

    inputs = (logits, deltas, anchors, factors["score_factors"])
    expected = Model()(*inputs)
    for whole in (
        torch.compile(Model(), fullgraph=True),
        torch.export.export(Model(), inputs).module(),
    ):
        assert all(map(torch.equal, whole(*inputs), expected))
