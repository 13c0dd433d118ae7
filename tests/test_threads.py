"""Calls from several Python threads at once: each gets what it would get alone."""

import threading

import pytest
import torch

from focalops import (
    AnchorGenerator,
    assign_simota,
    assign_task_aligned,
    dense_box_loss,
    dense_focal_loss,
    detect,
    match_anchors,
    nms,
    soft_nms,
)

SIZES = [(24, 24), (12, 12)]
CLASSES = 6


def training_step(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchors = AnchorGenerator(((24,), (48,)), (0.5, 1.0, 2.0)).grid((192, 192), SIZES)
    logits, deltas = (
        [
            torch.randn(2, 3 * channels, *size, generator=generator).requires_grad_()
            for size in SIZES
        ]
        for channels in (CLASSES, 4)
    )
    corner = torch.rand(2, 5, 2, generator=generator) * 120
    gt_boxes = torch.cat((corner, corner + 20 + 40 * torch.rand(2, 5, 2, generator=generator)), 2)
    matches = match_anchors(anchors, list(gt_boxes))
    labels = torch.where(matches >= 0, matches % CLASSES, CLASSES)
    loss = dense_focal_loss(logits, labels) + dense_box_loss(
        deltas, anchors, list(gt_boxes), matches, loss="giou"
    )
    loss.backward()
    with torch.no_grad():
        found = detect(logits, deltas, anchors, image_sizes=[(192, 192)] * 2)
    return [loss.detach(), matches, *found, *(x.grad for x in (*logits, *deltas))]


def assignment(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    points = (torch.stack((x, y), dim=-1).reshape(-1, 2) + 0.5) * 8
    corner = torch.rand(2, 7, 2, generator=generator) * 120
    gt_boxes = torch.cat((corner, corner + 10 + 60 * torch.rand(2, 7, 2, generator=generator)), 2)
    labels = torch.randint(0, CLASSES, (2, 7), generator=generator)
    boxes = torch.cat((points - 12, points + 12), dim=1).repeat(2, 1, 1)
    logits = torch.randn(2, len(points), CLASSES, generator=generator)
    strides = torch.full((len(points),), 8.0)
    return [
        *assign_task_aligned(logits.sigmoid(), boxes, points, gt_boxes, labels),
        *assign_simota(logits, boxes, points, strides, gt_boxes, labels),
        nms(boxes[0], logits[0, :, 0], 0.5),
        *soft_nms(boxes, logits[:, :, 0].sigmoid()),
    ]


@pytest.mark.parametrize("work", [training_step, assignment])
@pytest.mark.parametrize("threads_of_torch", [1, 4])
def test_threads_get_what_each_gets_alone(work, threads_of_torch):
    count, rounds = 6, 5
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of_torch)
    try:
        alone = [work(seed) for seed in range(count)]
        together: list = [None] * count
        start = threading.Barrier(count)

        def run(seed: int) -> None:
            torch.set_num_threads(threads_of_torch)  # a number of each thread
            start.wait()
            together[seed] = [work(seed) for _ in range(rounds)]

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    for seed in range(count):
        assert together[seed] is not None, f"thread {seed} failed"
        for results in together[seed]:
            assert len(results) == len(alone[seed])
            for mine, its in zip(alone[seed], results, strict=True):
                assert torch.equal(mine, its)
