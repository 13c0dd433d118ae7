"""Random comparison with torchvision, for as long as one likes: `make fuzz ARGS="--minutes 60 --seed 1"`.

Not a part of the test run. A difference stops it and prints the seed of its round.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchorGenerator

import focalops


def randint(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def pick(*values):
    return values[randint(0, len(values) - 1)]


def random_boxes(count: int, dtype: torch.dtype = torch.float32, proper: bool = False) -> Tensor:
    """Clustered, spread, integer, negative, huge or touching; degenerate too unless `proper`."""
    scale = pick(1.0, 30.0, 1000.0, 1e5)
    corner = torch.randn(count, 2) * scale
    size = torch.rand(count, 2) * scale * pick(0.1, 1.0, 3.0)
    if pick(True, False):
        corner, size = corner.round(), size.round()
    if proper:
        size = size + scale * 0.01
    boxes = torch.cat((corner, corner + size), dim=1)
    if count and pick(True, False):
        boxes = boxes[torch.randint(0, count, (count,))]
    return boxes.to(dtype)


def focal_loss() -> None:
    shape = (randint(0, 40), randint(1, 90))
    x = (torch.randn(shape) * pick(0.1, 3, 30)).double().requires_grad_()
    targets = torch.rand(shape).double()
    if pick(True, False):
        targets = targets.round()
    alpha, gamma = pick(-1, 0.0, 0.25, 0.9), pick(0.0, 1.0, 1.5, 2.0, 5.0)
    reduction = pick("none", "sum") if 0 in shape else pick("none", "sum", "mean")
    ours = focalops.sigmoid_focal_loss(x, targets, alpha, gamma, reduction)
    theirs = torchvision.ops.sigmoid_focal_loss(x, targets, alpha, gamma, reduction)
    # torchvision's 1 - p_t cancels: an error of an ulp of 1, not of itself
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11 * max(1, x.numel()))
    upstream = torch.randn_like(ours)
    (our_grad,) = torch.autograd.grad(ours, x, upstream)
    (their_grad,) = torch.autograd.grad(theirs, x, upstream)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-7, atol=1e-9)


def box_iou() -> None:
    dtype = pick(torch.float32, torch.float64)
    a, b = random_boxes(randint(0, 60), dtype), random_boxes(randint(0, 60), dtype)
    ours, theirs = focalops.box_iou(a, b), torchvision.ops.box_iou(a, b)
    assert torch.equal(ours, theirs.nan_to_num(0)), (ours - theirs).abs().max()


def iou_family() -> None:
    a, b = (random_boxes(randint(1, 12), torch.float64, proper=True) for _ in range(2))
    for kind in ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou"):
        compare_with_gradients(getattr(focalops, kind), getattr(torchvision.ops, kind), a, b)
    b = b[torch.randint(0, len(b), (len(a),))] + torch.randn_like(a)
    b[:, 2:] = torch.maximum(b[:, 2:], b[:, :2] + 0.1)
    for kind in ("generalized_box_iou", "distance_box_iou", "complete_box_iou"):
        ours = getattr(focalops, f"{kind}_loss")
        compare_with_gradients(ours, getattr(torchvision.ops, f"{kind}_loss"), a, b)


def compare_with_gradients(ours: Callable, theirs: Callable, a: Tensor, b: Tensor) -> None:
    results = []
    for function in (ours, theirs):
        inputs = [t.clone().requires_grad_() for t in (a, b)]
        result = function(*inputs)
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
        results.append((result.detach(), *torch.autograd.grad((result * weights).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


def box_coding() -> None:
    boxes, anchors = (random_boxes(7, torch.float64, proper=True) for _ in range(2))
    weights = pick((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0))
    coder = BoxCoder(weights)
    deltas = focalops.encode_boxes(boxes, anchors, weights)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors))
    deltas = torch.randn(7, 4, dtype=torch.float64) * pick(0.1, 1, 10)
    theirs = coder.decode_single(deltas, anchors)
    torch.testing.assert_close(focalops.decode_boxes(deltas, anchors, weights), theirs)
    size = (randint(1, 900), randint(1, 900))
    clipped = torchvision.ops.clip_boxes_to_image(theirs, size)
    ours = focalops.decode_boxes(deltas, anchors, weights, image_size=size)
    torch.testing.assert_close(ours, clipped)


def matching() -> None:
    anchors = random_boxes(randint(1, 400))
    gt_boxes = [
        torch.cat((anchors[torch.randint(0, len(anchors), (n,))], random_boxes(n)))
        for n in (randint(0, 10) for _ in range(randint(1, 3)))
    ]
    gt_boxes = [g + torch.randn_like(g) * pick(0, 0.5, 5) for g in gt_boxes]
    low, high = sorted((pick(0.3, 0.4, 0.5), pick(0.5, 0.6, 0.7)))
    low_quality = pick(True, False)
    matcher = Matcher(high, low, low_quality)
    matches = focalops.match_anchors(anchors, gt_boxes, high, low, low_quality)
    for ours, boxes in zip(matches, gt_boxes, strict=True):
        iou = torchvision.ops.box_iou(boxes, anchors).nan_to_num(0)
        # torchvision lets a box that overlaps nothing take every anchor: compare the others' matches
        if len(boxes) == 0 or (low_quality and bool((iou.amax(1) <= 0).any())):
            theirs = focalops.reference.match_anchors(anchors, [boxes], high, low, low_quality)[0]
        else:
            theirs = matcher(iou)
        assert torch.equal(ours, theirs)


def nms() -> None:
    count = randint(0, 300)
    boxes, scores = random_boxes(count), torch.rand(count)
    if pick(True, False):
        scores = (scores * 8).round()
    threshold = pick(0.0, 0.3, 0.5, 0.5, 0.7, 1.0)
    ours = focalops.nms(boxes, scores, threshold)
    assert torch.equal(ours, torchvision.ops.nms(boxes, scores, threshold))
    idxs = torch.randint(0, pick(1, 3, 80), (count,))
    batched = focalops.batched_nms(boxes, scores, idxs, threshold)
    kept = [c[torchvision.ops.nms(boxes[c], scores[c], threshold)] for c in classes_of(idxs)]
    theirs = torch.cat(kept).sort().values if kept else torch.empty(0, dtype=torch.int64)
    assert torch.equal(batched.sort().values, theirs)
    order = scores[batched]
    assert bool((order[1:] <= order[:-1]).all())


def classes_of(idxs: Tensor) -> list[Tensor]:
    return [(idxs == i).nonzero().squeeze(1) for i in idxs.unique()]


def anchors() -> None:
    from torchvision.models.detection.image_list import ImageList

    levels = randint(1, 4)
    sizes = tuple((float(randint(8, 600)), float(randint(8, 600))) for _ in range(levels))
    ratios = ((0.5, 1.0, float(torch.rand(()) * 3 + 0.1)),) * levels
    height, width = randint(32, 500), randint(32, 500)
    images = ImageList(torch.zeros(1, 1, height, width), [(height, width)])
    maps = [
        torch.zeros(1, 1, max(height >> i + 3, 1), max(width >> i + 3, 1)) for i in range(levels)
    ]
    ours = focalops.AnchorGenerator(sizes, ratios)(images, maps)[0]
    assert torch.equal(ours, TorchvisionAnchorGenerator(sizes, ratios)(images, maps)[0])


ROUNDS = (focal_loss, box_iou, iou_family, box_coding, matching, nms, anchors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end, seed, done = time.monotonic() + arguments.minutes * 60, arguments.seed * 10**9, Counter()
    while time.monotonic() < end:
        for compare in ROUNDS:
            seed += 1
            torch.manual_seed(seed)
            try:
                compare()
            except Exception:
                print(f"{compare.__name__}, seed {seed}: differs")
                raise
            done[compare.__name__] += 1
    print("no difference in " + ", ".join(f"{n:,} {name}" for name, n in done.items()))


if __name__ == "__main__":
    main()
