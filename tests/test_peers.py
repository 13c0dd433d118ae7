"""The lines of docs/coming_from/, against numbers that the peers gave (golden/peers_boxes.json)."""

import json
import math
from pathlib import Path

import pytest
import torch

from focalops import (
    box_iou,
    box_iou_loss,
    complete_box_iou_loss,
    decode_boxes,
    distance_box_iou_loss,
    encode_boxes,
    match_anchors,
    nms,
    nms_match,
    soft_nms,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "peers_boxes.json").read_text())
BOXES, GT_BOXES, ANCHORS, DELTAS = (
    torch.tensor(GOLDEN[name]) for name in ("boxes", "gt_boxes", "anchors", "deltas")
)
# Ours and the peers' are the same few float32 operations in another order, some with an eps of 1e-6 beside areas of 100.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}
PIXELS = {"rtol": 2e-6, "atol": 2e-5}  # coordinates of about 100


def test_iou_over_foreground_is_mmdets(device):
    iof = box_iou(BOXES.to(device), GT_BOXES.to(device), mode="iof")
    torch.testing.assert_close(iof.cpu(), torch.tensor(GOLDEN["mmdet"]["iof"]), **TOLERANCE)


def test_logarithmic_iou_loss_is_mmdets(device):
    iou = 1 - box_iou_loss(BOXES.to(device), GT_BOXES.to(device), eps=0)
    loss = -iou.clamp(min=1e-6).log()
    # The smallest IoUs are 1 - loss: their errors are those of numbers near 1, and the logarithm enlarges them.
    expected = torch.tensor(GOLDEN["mmdet"]["iou_loss"])
    torch.testing.assert_close(loss[:7].cpu(), expected[:7], rtol=1e-5, atol=1e-5)
    exact = -box_iou(BOXES.to(device), GT_BOXES.to(device)).diagonal().clamp(min=1e-6).log()
    torch.testing.assert_close(exact.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_gated_ciou_loss_is_mmdets(device):
    boxes, gt_boxes = BOXES.to(device), GT_BOXES.to(device)
    complete, distance = (
        f(boxes, gt_boxes) for f in (complete_box_iou_loss, distance_box_iou_loss)
    )
    iou = 1 - box_iou_loss(boxes, gt_boxes)
    expected = torch.tensor(GOLDEN["mmdet"]["ciou_loss"])
    torch.testing.assert_close(
        torch.where(iou > 0.5, complete, distance).cpu(), expected, **TOLERANCE
    )
    assert not torch.allclose(complete.cpu(), expected, **TOLERANCE)


def test_clip_on_both_sides_is_mmdets(device):
    clip = math.log(1000 / 16)
    deltas, expected = DELTAS.to(device), torch.tensor(GOLDEN["mmdet"]["clip_both_sides"])
    anchors = ANCHORS.to(device)
    at_least = torch.tensor([-math.inf, -math.inf, -clip, -clip], device=device)
    boxes = decode_boxes(deltas.clamp(min=at_least), anchors, image_size=(70, 60))
    torch.testing.assert_close(boxes.cpu(), expected, **PIXELS)
    one_side = decode_boxes(deltas, anchors, image_size=(70, 60))
    assert not torch.allclose(one_side.cpu(), expected, **PIXELS)


def test_ctr_clamp_is_mmdets(device):
    boxes = decode_boxes(DELTAS.to(device), ANCHORS.to(device), image_size=(70, 60), ctr_clamp=12)
    torch.testing.assert_close(boxes.cpu(), torch.tensor(GOLDEN["mmdet"]["ctr_clamp"]), **PIXELS)


@pytest.mark.parametrize("call", GOLDEN["assigner"]["calls"])
def test_ignored_regions_are_mmdets(call, device):
    anchors = torch.tensor(GOLDEN["assigner"]["anchors"], device=device)
    crowd = torch.arange(9, device=device) >= 5
    matches = match_anchors(
        anchors,
        [GT_BOXES.to(device)],
        rule="mmdet",
        min_pos_iou=0.2,
        crowd=[crowd],
        ignore_wrt_candidates=call["ignore_wrt_candidates"],
    )
    assert matches.tolist() == [call["matches"]]


@pytest.mark.parametrize("call", GOLDEN["mmcv"]["soft_nms"])
def test_soft_nms_is_mmcvs(call, device):
    """Both of its comparisons include the threshold: two IoUs here are 0.5, a score is 0.25."""
    boxes = torch.tensor([GOLDEN["mmcv"]["boxes"]], device=device)
    scores = torch.tensor([GOLDEN["mmcv"]["scores"]], device=device)
    indices, kept_scores, num_kept = soft_nms(
        boxes,
        scores,
        iou_threshold=math.nextafter(call["iou_threshold"], 0),
        method=call["method"],
        score_threshold=math.nextafter(call["score_threshold"], 0),
    )
    assert indices[0, : num_kept[0]].tolist() == call["indices"]
    expected = torch.tensor(call["scores"])
    torch.testing.assert_close(kept_scores[0, : num_kept[0]].cpu(), expected, **TOLERANCE)


@pytest.mark.parametrize("call", GOLDEN["mmcv"]["nms_match"])
def test_nms_match_is_mmcvs(call, device):
    boxes = torch.tensor(GOLDEN["mmcv"]["boxes"], device=device)
    scores = torch.tensor(GOLDEN["mmcv"]["scores"], device=device)
    group = nms_match(boxes, scores, math.nextafter(call["iou_threshold"], 0))
    expected = [0] * len(scores)
    for members in call["groups"]:
        for member in members:
            expected[member] = members[0]
    assert group.tolist() == expected


def test_kornias_boxes(device):
    """Its nms is the same; its Boxes of mode "xyxy_plus" include their last row and column of pixels."""
    boxes = torch.tensor(GOLDEN["mmcv"]["boxes"], device=device)
    scores = torch.tensor(GOLDEN["mmcv"]["scores"], device=device)
    assert nms(boxes, scores, 0.5).tolist() == GOLDEN["kornia"]["nms"]
    plus = GT_BOXES + torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(plus, torch.tensor(GOLDEN["kornia"]["xyxy_plus_as_xyxy"]), **PIXELS)


def test_effdets_coder_and_soft_nms(device):
    """Its boxes and deltas are (y, x, h, w); it does not clip."""
    swap = [1, 0, 3, 2]
    anchors = ANCHORS.to(device)
    golden = GOLDEN["effdet"]
    deltas = DELTAS.clamp(-2, 2).to(device)[:, swap]
    boxes = decode_boxes(deltas[:, swap], anchors, clip=math.inf)[:, swap]
    torch.testing.assert_close(boxes.cpu(), torch.tensor(golden["decoded"]), **PIXELS)
    encoded = encode_boxes(GT_BOXES.to(device), anchors)[:, swap]
    # It adds 1e-7 to sizes, at which float32 does not change.
    torch.testing.assert_close(encoded.cpu(), torch.tensor(golden["encoded"]), **TOLERANCE)
    boxes = torch.tensor([GOLDEN["mmcv"]["boxes"]], device=device)
    scores = torch.tensor([GOLDEN["mmcv"]["scores"]], device=device)
    for call in golden["soft_nms"]:
        indices, kept_scores, num_kept = soft_nms(boxes, scores, method=call["method"])
        assert indices[0, : num_kept[0]].tolist() == call["indices"]
        expected = torch.tensor(call["scores"])
        torch.testing.assert_close(kept_scores[0, : num_kept[0]].cpu(), expected, **TOLERANCE)
