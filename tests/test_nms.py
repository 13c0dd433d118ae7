"""nms, batched_nms and multiclass_nms against the reference and torchvision."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focalops import batched_nms, box_iou, multiclass_nms, nms, nms_match, reference

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# No box, one, more than 64 (a block of the CPU), a chunk of 512 (CUDA) and its neighbours, more.
SIZES = (0, 1, 2, 65, 511, 512, 513, 1100)


@pytest.fixture
def many(backend: str) -> int:
    """As many boxes as the device takes in a second."""
    return {"cpu": 40_000, "cuda": 200_000}.get(backend, 600)


def random_boxes(n: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Boxes of 5 to 100 pixels around the origin."""
    centers = torch.randn(n, 2) * 15 * max(n, 1) ** 0.5
    sizes = torch.exp(torch.rand(n, 2) * 3) * 5
    return torch.cat((centers - sizes / 2, centers + sizes / 2), dim=1).to(device, dtype)


def distinct_scores(n: int, device: str = "cpu") -> Tensor:
    return (torch.randperm(n).to(torch.float32) / max(n, 1)).to(device)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("iou_threshold", [0.0, 0.5])
def test_nms_equals_torchvision(n, iou_threshold, device):
    boxes, scores = random_boxes(n, device), distinct_scores(n, device)
    keep = nms(boxes, scores, iou_threshold)
    assert keep.dtype == torch.int64 and keep.device == boxes.device
    expected = torchvision.ops.nms(boxes.cpu(), scores.cpu(), iou_threshold)
    assert torch.equal(keep.cpu(), expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    ("classes", "index_dtype"), [(1, torch.int64), (3, torch.int32), (80, torch.uint8)], ids=str
)
def test_batched_nms_equals_torchvision(n, classes, index_dtype, device):
    # Integer coordinates, so that torchvision's own move of the classes rounds nothing.
    boxes, scores = random_boxes(n, device).round(), distinct_scores(n, device)
    idxs = torch.randint(0, classes, (n,)).to(device, index_dtype)
    keep = batched_nms(boxes, scores, idxs, 0.3)
    shifted = (boxes - boxes.min()) if n else boxes
    expected = torchvision.ops.batched_nms(shifted.cpu(), scores.cpu(), idxs.cpu().long(), 0.3)
    assert torch.equal(keep.cpu(), expected)


@pytest.mark.parametrize("box_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("score_dtype", FLOATING, ids=str)
def test_dtypes(box_dtype, score_dtype, device):
    boxes = random_boxes(100, device, box_dtype) / 4
    scores = torch.rand(100).to(device, score_dtype)
    idxs = torch.randint(-2, 2, (100,), device=device)
    assert torch.equal(nms(boxes, scores, 0.2), reference.nms(boxes, scores, 0.2))
    keep = batched_nms(boxes, scores, idxs, 0.2)
    assert torch.equal(keep, reference.batched_nms(boxes, scores, idxs, 0.2))


def test_ties_go_to_the_lower_index(device):
    boxes = random_boxes(600, device)
    for scores in (torch.zeros(600), torch.randint(0, 4, (600,)).float() - 2):
        scores[::7] *= -1  # zeros of both signs are equal
        scores = scores.to(device)
        assert torch.equal(nms(boxes, scores, 0.2), reference.nms(boxes, scores, 0.2))


def test_identical_boxes(device):
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]], device=device).repeat(600, 1)
    scores = torch.rand(600, device=device)
    best = scores.argmax().unsqueeze(0)
    assert torch.equal(nms(boxes, scores, 0.99), best)
    assert len(nms(boxes, scores, 1.0)) == 600
    keep = batched_nms(boxes, scores, torch.arange(600, device=device) % 2, 0.5)
    assert len(keep) == 2 and set((keep % 2).tolist()) == {0, 1}


def test_very_many_boxes_on_one_spot(backend, device):
    n = 100_000 if backend in ("cpu", "cuda") else 2_000
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]], device=device).repeat(n, 1)
    scores = torch.rand(n, device=device)
    assert torch.equal(nms(boxes, scores, 0.5), reference.nms(boxes, scores, 0.5))
    indices, num_kept = multiclass_nms(boxes[None], scores[None], None, 0.5)
    assert num_kept == 1 and indices[0, 0] == scores.argmax()


def test_chains_in_which_every_other_box_is_kept(device):
    # Sixty boxes in a row, each suppressed by the one before it unless that is suppressed itself.
    index = torch.arange(600, device=device)
    left = index * 4.0 + index // 60 * 20
    boxes = torch.stack((left, left * 0, left + 10, left * 0 + 10), dim=1)
    assert torch.equal(nms(boxes, -index.float(), 0.3), index[::2])


def test_degenerate_boxes(device):
    boxes = random_boxes(100, device)
    boxes[::3, 2:] = boxes[::3, :2]  # points
    boxes[1::3, 0], boxes[1::3, 2] = boxes[1::3, 2].clone(), boxes[1::3, 0].clone()  # inside out
    boxes[::50] = torch.inf
    boxes[1::50, 2:] = torch.inf
    scores = torch.rand(100, device=device)
    for iou_threshold in (-0.5, 0.0, 0.5, 1.0, 1e300, torch.inf, torch.nan):
        keep = nms(boxes, scores, iou_threshold)
        assert torch.equal(keep, reference.nms(boxes, scores, iou_threshold))


def test_nan_is_never_kept_and_suppresses_nothing(device):
    boxes, scores = random_boxes(600, device), torch.rand(600, device=device)
    bad = torch.rand(600, device=device) < 0.3
    broken_boxes, broken_scores = boxes.clone(), scores.clone()
    for column in range(4):
        broken_boxes[bad & (torch.rand(600, device=device) < 0.4), column] = torch.nan
    broken_scores[bad & (torch.rand(600, device=device) < 0.5)] = torch.nan
    good = ~(broken_boxes.isnan().any(dim=1) | broken_scores.isnan())
    keep = nms(broken_boxes, broken_scores, 0.3)
    assert torch.equal(keep, good.nonzero()[:, 0][nms(boxes[good], scores[good], 0.3)])
    assert len(nms(broken_boxes * torch.nan, scores, 0.3)) == 0


def test_infinite_scores_are_ordinary(device):
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]], device=device).repeat(3, 1)
    scores = torch.tensor([-torch.inf, 1.0, torch.inf], device=device)
    assert nms(boxes, scores, 1.0).tolist() == [2, 1, 0]
    assert nms(boxes, scores, 0.5).tolist() == [2]


def test_iou_at_the_threshold_does_not_suppress(device):
    # IoU 1/3: the float32 quotient is above the double 1/3, and below the next.
    boxes = torch.tensor([[0.0, 0.0, 20.0, 10.0], [10.0, 0.0, 30.0, 10.0]], device=device)
    scores = torch.tensor([1.0, 0.5], device=device)
    rounded = (torch.tensor(1.0) / 3).item()
    assert rounded > 1 / 3
    assert len(nms(boxes, scores, 1 / 3)) == 1
    assert len(nms(boxes, scores, rounded)) == 2
    assert len(nms(boxes.double(), scores, 1 / 3)) == 2


def test_non_contiguous(device):
    boxes, scores = random_boxes(600, device), torch.rand(600, device=device)
    idxs = torch.randint(0, 3, (600,), device=device)
    transposed = boxes.t().contiguous().t()
    strided = torch.stack((scores, scores), dim=1)[:, 0]
    strided_idxs = torch.stack((idxs, idxs), dim=1)[:, 1]
    assert torch.equal(nms(transposed, strided, 0.4), nms(boxes, scores, 0.4))
    keep = batched_nms(transposed[1:], strided[1:], strided_idxs[1:], 0.4)
    assert torch.equal(keep, batched_nms(boxes[1:].clone(), scores[1:].clone(), idxs[1:], 0.4))


def test_classes_of_any_value_and_size(many, device):
    n = min(many, 1500)
    classes = n // 4
    boxes, scores = random_boxes(n, device) / 8, torch.rand(n, device=device)
    idxs = torch.randint(0, classes, (n,), device=device)
    idxs[: n * 2 // 3] = 7  # one large class among many small ones
    names = torch.randint(-(2**62), 2**62, (classes,), device=device)
    names[:3] = torch.tensor([-(2**63), 2**63 - 1, 0], device=device)
    keep = batched_nms(boxes, scores, names[idxs], 0.3)
    assert torch.equal(keep, reference.batched_nms(boxes, scores, idxs, 0.3))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("iou_threshold", [-0.2, 0.0, 0.5])
def test_diou_equals_the_reference(n, iou_threshold, device):
    boxes, scores = random_boxes(n, device) / 4, distinct_scores(n, device)
    idxs = torch.randint(0, 3, (n,), device=device)
    for arguments in ((boxes, scores, idxs, iou_threshold), (boxes.double(), scores, idxs, 0.3)):
        keep = batched_nms(*arguments, overlap="diou")
        assert torch.equal(keep, reference.batched_nms(*arguments, overlap="diou"))
    keep = nms(boxes, scores, iou_threshold, overlap="diou")
    assert torch.equal(keep, reference.nms(boxes, scores, iou_threshold, overlap="diou"))


def test_diou_keeps_more_of_two_objects_in_one_place(device):
    # IoU 0.6; the centers are 5 apart, the corners of the box around both (25, 20): 25 / 1025.
    boxes = torch.tensor([[0.0, 0, 20, 20], [5, 0, 25, 20]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    overlap = torchvision.ops.distance_box_iou(boxes, boxes)[0, 1].item()
    assert abs(overlap - (0.6 - 25 / 1025)) < 1e-6
    assert nms(boxes, scores, 0.59).tolist() == [0]
    assert nms(boxes, scores, 0.59, overlap="diou").tolist() == [0, 1]
    assert nms(boxes, scores, 0.57, overlap="diou").tolist() == [0]


coordinates = st.one_of(
    st.integers(-8, 8).map(float),
    st.floats(width=32, min_value=-100, max_value=100),
    st.just(torch.nan),
)


@given(
    rows=st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=90),
    iou_threshold=st.floats(0, 1),
    data=st.data(),
)
def test_any_boxes(rows, iou_threshold, data):
    n = len(rows)
    boxes = torch.tensor(rows).reshape(n, 4)
    scores = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    idxs = data.draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    scores, idxs = torch.tensor(scores).float(), torch.tensor(idxs).long()
    assert torch.equal(
        nms(boxes, scores, iou_threshold), reference.nms(boxes, scores, iou_threshold)
    )
    keep = batched_nms(boxes, scores, idxs, iou_threshold)
    assert torch.equal(keep, reference.batched_nms(boxes, scores, idxs, iou_threshold))
    group = nms_match(boxes, scores, iou_threshold)
    assert torch.equal(group, reference.nms_match(boxes, scores, iou_threshold))


def test_two_runs_and_any_number_of_threads_agree(many, backend, device):
    if backend not in ("cpu", "cuda"):
        pytest.skip("the emulation itself compares orders of threads")
    boxes, scores = random_boxes(many, device) / 4, torch.rand(many, device=device)
    idxs = torch.randint(0, 3, (many,), device=device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append((nms(boxes, scores, 0.5), batched_nms(boxes, scores, idxs, 0.5)))
    finally:
        torch.set_num_threads(threads)
    for first, second in results[1:]:
        assert torch.equal(first, results[0][0]) and torch.equal(second, results[0][1])


def test_many_boxes(many, device):
    # A grid of boxes apart, each twice.
    place = torch.arange(many // 2)
    corner = torch.stack((place % 1000, place // 1000), dim=1) * 12.0
    boxes = torch.cat((corner, corner + 10), dim=1).repeat(2, 1).to(device)
    scores = torch.rand(many, device=device)
    keep = nms(boxes, scores, 0.5)
    twin = torch.maximum(scores[: many // 2], scores[many // 2 :])
    assert torch.equal(scores[keep], twin.sort(descending=True).values)


def test_many_boxes_on_one_spot(many, device):
    boxes = torch.tensor([[3.0, 4.0, 5.0, 6.0]], device=device).repeat(many, 1)
    scores, idxs = torch.rand(many, device=device), torch.arange(many, device=device) // 4
    assert nms(boxes, scores, 0.5).tolist() == [scores.argmax()]
    keep = batched_nms(boxes, scores, idxs, 0.5)
    assert torch.equal(idxs[keep].sort().values, idxs.unique())


def test_compiles_without_a_graph_break(device):
    @torch.compile(fullgraph=True)
    def kept_scores(boxes, scores, idxs):
        return (
            scores[nms(boxes, scores, 0.5)].sum()
            + scores[batched_nms(boxes, scores, idxs, 0.5)].sum()
        )

    boxes, scores = random_boxes(300, device), torch.rand(300, device=device)
    idxs = torch.randint(0, 3, (300,), device=device)
    expected = (
        scores[nms(boxes, scores, 0.5)].sum() + scores[batched_nms(boxes, scores, idxs, 0.5)].sum()
    )
    torch.testing.assert_close(kept_scores(boxes, scores, idxs), expected)


def test_exports_with_a_dynamic_number_of_boxes(device):
    class Model(torch.nn.Module):
        def forward(self, boxes, scores):
            return boxes[nms(boxes, scores, 0.5)]

    boxes, scores = random_boxes(30, device), torch.rand(30, device=device)
    n = torch.export.Dim("n")
    program = torch.export.export(Model(), (boxes, scores), dynamic_shapes=({0: n}, {0: n}))
    boxes, scores = random_boxes(200, device), torch.rand(200, device=device)
    assert torch.equal(program.module()(boxes, scores), boxes[nms(boxes, scores, 0.5)])


def test_opcheck(device):
    boxes, scores = random_boxes(50, device), torch.rand(50, device=device)
    idxs = torch.randint(0, 3, (50,), device=device)
    for arguments in ((boxes, scores, None, 0.5), (boxes, scores, idxs, 0.5)):
        torch.library.opcheck(torch.ops.focalops.nms, arguments)


@pytest.mark.parametrize("n", [300, 1500])
def test_float_classes_are_torchvisions(n, device):
    """YOLOX passes them. Beyond 1,000 boxes torchvision goes class by class, as here."""
    boxes, scores = random_boxes(n, device) / 4, distinct_scores(n, device)
    idxs = torch.randint(0, 3, (n,), device=device)
    expected = batched_nms(boxes, scores, idxs, 0.5)
    for floats in (idxs.float(), idxs.half(), idxs.double() / 8 - 0.125):
        assert torch.equal(batched_nms(boxes, scores, floats, 0.5), expected)
    theirs = torchvision.ops.batched_nms(boxes.cpu(), scores.cpu(), idxs.cpu().float(), 0.5)
    assert torch.equal(expected.cpu(), theirs)
    zero = torch.where(idxs == 1, -0.0, 0.0)
    assert torch.equal(batched_nms(boxes, scores, zero, 0.5), nms(boxes, scores, 0.5))


def test_no_boxes_without_columns(device):
    """Whoever makes boxes from an empty list passes these."""
    nothing = torch.zeros(0, device=device)
    assert nms(nothing, nothing, 0.5).shape == (0,)
    assert batched_nms(nothing, nothing, nothing.long(), 0.5).shape == (0,)
    assert nms_match(nothing, nothing, 0.5).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 1 / 3, 0.5, 1.0])
def test_nms_match(threshold, dtype, device):
    boxes, scores = random_boxes(200, device).to(dtype) / 4, distinct_scores(200, device)
    boxes[3, 1], scores[5] = torch.nan, torch.nan
    boxes[7] = boxes[8] = torch.tensor([0.0, 0, 20, 10])
    boxes[9] = torch.tensor([10.0, 0, 30, 10])  # its IoU with them is 1/3, rounded up
    group = nms_match(boxes, scores, threshold)
    assert torch.equal(group, reference.nms_match(boxes, scores, threshold))
    keep = nms(boxes, scores, threshold)
    assert torch.equal(group[keep], keep)
    assert group[3] == group[5] == -1
    iou = box_iou(boxes, boxes).double()
    for i in range(len(boxes)):
        if i in keep.tolist() or i in (3, 5):
            continue
        overlapping = [k for k in keep.tolist() if iou[k, i] > threshold]
        assert group[i] == overlapping[0]


# ---- multiclass_nms -----------------------------------------------------------------------------


def padded_batch(images: int, n: int, device: str, dtype: torch.dtype = torch.float32):
    """Images with 0 to n boxes, padded with what would come first if it counted."""
    boxes = random_boxes(images * n, device, dtype).reshape(images, n, 4) / 4
    scores = (torch.rand(images, n) * 300).round().to(device) / 300  # some ties
    labels = torch.randint(-1, 2, (images, n), device=device)
    counts = torch.linspace(0, n, images, device=device).long()
    is_padding = torch.arange(n, device=device) >= counts[:, None]
    scores[is_padding] = torch.inf
    boxes[is_padding & (torch.rand(images, n).to(device) < 0.5)] = torch.nan
    return boxes, scores, labels, counts


@pytest.mark.parametrize(
    ("dtype", "max_detections"),
    [*((dtype, 40) for dtype in FLOATING), (torch.float32, 0), (torch.float32, 1000)],
    ids=str,
)
def test_multiclass_nms_equals_the_reference(dtype, max_detections, device):
    boxes, scores, labels, counts = padded_batch(4, 600, device, dtype)
    for these_labels, these_counts in (
        (labels, counts),
        (labels.int(), None),
        (None, counts.int()),
    ):
        arguments = (boxes, scores, these_labels, 0.3, max_detections)
        for overlap in ("iou", "diou"):
            options = {"counts": these_counts, "overlap": overlap}
            expected = reference.multiclass_nms(*arguments, **options)
            indices, num_kept = multiclass_nms(*arguments, **options)
            assert torch.equal(indices, expected[0]) and torch.equal(num_kept, expected[1])


def test_multiclass_nms_equals_batched_nms_of_each_image(device):
    boxes, scores, labels, counts = padded_batch(3, 1100, device)
    indices, num_kept = multiclass_nms(boxes, scores, labels, 0.5, 1100, counts=counts)
    for i, count in enumerate(counts.tolist()):
        keep = batched_nms(boxes[i, :count], scores[i, :count], labels[i, :count], 0.5)
        assert torch.equal(indices[i, : len(keep)], keep) and num_kept[i] == len(keep)
        assert (indices[i, len(keep) :] == -1).all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1)], ids=str)
def test_multiclass_nms_of_nothing(shape, device):
    boxes, scores = torch.rand(*shape, 4, device=device), torch.rand(shape, device=device)
    labels = torch.zeros(shape, dtype=torch.int64, device=device)
    indices, num_kept = multiclass_nms(boxes, scores, labels, 0.5, 7)
    assert indices.shape == (shape[0], 7)
    assert num_kept.tolist() == [shape[1]] * shape[0]
    assert (indices[:, shape[1] :] == -1).all()


def test_multiclass_nms_takes_any_counts(device):
    boxes, scores, labels, _ = padded_batch(3, 20, device)
    counts = torch.tensor([-5, 2**40, 20], device=device)
    indices, num_kept = multiclass_nms(boxes, scores, labels, 0.5, counts=counts)
    assert num_kept[0] == 0
    assert torch.equal(indices[1:], multiclass_nms(boxes[1:], scores[1:], labels[1:], 0.5)[0])


def test_multiclass_nms_of_views(device):
    boxes, scores, labels, counts = padded_batch(3, 50, device)
    expected = multiclass_nms(boxes, scores, labels, 0.5, counts=counts)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (boxes, scores, labels)]
    actual = multiclass_nms(*strided, 0.5, counts=counts.repeat_interleave(2)[::2])
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_multiclass_nms_compiles_to_static_shapes(device):
    boxes, scores, labels, counts = padded_batch(3, 50, device)

    @torch.compile(fullgraph=True, dynamic=True)
    def kept_scores(boxes, scores, labels, counts):
        indices, num_kept = multiclass_nms(boxes, scores, labels, 0.5, 10, counts=counts)
        return scores.gather(1, indices.clamp(min=0)), num_kept

    indices, num_kept = multiclass_nms(boxes, scores, labels, 0.5, 10, counts=counts)
    actual = kept_scores(boxes, scores, labels, counts)
    assert torch.equal(actual[0], scores.gather(1, indices.clamp(min=0)))
    assert torch.equal(actual[1], num_kept)
    torch.library.opcheck(
        torch.ops.focalops.multiclass_nms, (boxes, scores, labels, counts, 0.5, 10)
    )


def test_multiclass_nms_in_a_cuda_graph(backend, device):
    if backend != "cuda":
        pytest.skip("needs a GPU")
    boxes, scores, labels, counts = padded_batch(3, 2000, device)
    multiclass_nms(boxes, scores, labels, 0.5, counts=counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, num_kept = multiclass_nms(boxes, scores, labels, 0.5, counts=counts)
    scores.copy_(torch.rand_like(scores))
    graph.replay()
    expected = multiclass_nms(boxes, scores, labels, 0.5, counts=counts)
    assert torch.equal(indices, expected[0]) and torch.equal(num_kept, expected[1])
