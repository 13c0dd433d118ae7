"""Comparison of detections that were computed in different ways."""

from __future__ import annotations

import torch
from torch import Tensor

Detections = dict[str, Tensor]  # "boxes" (D, 4), "scores" (D,), "labels" (D,), best first
Tolerance = tuple[float, float]  # relative, absolute


def assert_same_detections(
    got: Detections, expected: Detections, *, scores: Tolerance, boxes: Tolerance
) -> None:
    """Each expected detection is among those found, once, and nothing else is.

    Two detections whose scores differ by less than their rounding may stand in either order.
    """
    assert len(got["scores"]) == len(expected["scores"])
    assert (got["scores"].diff() <= 0).all(), "not best first"
    close = {"scores": scores, "boxes": boxes, "labels": (0, 0)}
    for name in ("scores", "boxes", "labels"):
        assert got[name].dtype == expected[name].dtype
    fits = torch.ones(len(got["scores"]), len(expected["scores"]), dtype=torch.bool)
    for name, (rtol, atol) in close.items():
        same = torch.isclose(got[name][:, None], expected[name][None], rtol=rtol, atol=atol)
        fits &= same if same.dim() == 2 else same.all(dim=2)
    free = torch.ones(len(fits), dtype=torch.bool)
    for index in range(len(fits)):
        candidates = (fits[:, index] & free).nonzero()
        assert len(candidates), (
            f"no detection is as {[v[index].tolist() for v in expected.values()]}"
        )
        free[candidates[0]] = False
