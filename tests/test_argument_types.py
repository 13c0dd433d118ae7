"""An argument of the wrong type gets one sentence that names it, and the same one on every path."""

import inspect
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import emulated_cuda
from fuzz_arguments import DENSE_TARGETS
from test_errors import function_of, reductions_of, right_arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import focalops

FLAGS = {
    "allow_low_quality_matches",
    "at_least_one",
    "class_agnostic",
    "detach_weight",
    "gt_max_assign_all",
    "ignore_wrt_candidates",
    "inplace_backward",
    "iou_weighted",
    "return_iou",
}
INTEGERS = {
    "bins",
    "final_topk",
    "ignore_index",
    "max_detections",
    "num_classes",
    "topk",
    "topk_per_level",
}
NUMBERS = {
    "alpha",
    "beta",
    "bg_iou_threshold",
    "center_radius",
    "clip",
    "crowd_threshold",
    "ctr_clamp",
    "dfl_weight",
    "eps",
    "fg_iou_threshold",
    "gamma",
    "iou_threshold",
    "label_smoothing",
    "max_distance",
    "min_normalizer",
    "min_pos_iou",
    "min_side",
    "score_threshold",
    "sigma",
}
CHOICES = {"coding", "combine", "fmt", "loss", "method", "mode", "overlap", "reduction", "rule"}
SEQUENCES = {"image_size", "image_sizes", "level_sizes", "ranges", "strides", "weights"}
# The others are tensors, or lists of them.

ARRAY, VECTOR = np.zeros(3), torch.ones(2)
WRONG_TYPES: dict[str, list[Any]] = {
    "flag": [None, "1", [1], 1, 1.5, math.nan, VECTOR, torch.tensor(True), ARRAY],
    "integer": [None, "1", [1], 1.5, math.nan, math.inf, VECTOR, ARRAY, 2**63, -(2**63) - 1],
    "number": [None, "1", [1], 1j, VECTOR, torch.tensor(1j), ARRAY, 10**400, torch.zeros((), device="meta")],
    "choice": [None, 1, 1.5, ["sum"], VECTOR, ARRAY, torch.zeros(3, 3)],
    "sequence": [1.5, "1111", ["1"] * 4, [None, None], [1j] * 4, torch.ones(4) * 1j, [[1, 2], ["3", 4]]],
    "tensor": [None, "1", 1.5, ARRAY, [ARRAY], [None]],
}  # fmt: skip


def kind_of(name: str) -> str:
    kinds = {"flag": FLAGS, "integer": INTEGERS, "number": NUMBERS, "choice": CHOICES}
    kinds["sequence"] = SEQUENCES
    return next((kind for kind, names in kinds.items() if name in names), "tensor")


def may_be_none(op: str, name: str) -> bool:
    parameter = inspect.signature(function_of(op)).parameters[name]
    others = {("multiclass_nms", "labels"), ("assign_fcos", "center_radius")}
    return parameter.default is None or (op, name) in others


def in_complex(value: Any) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(torch.complex64) if t.is_floating_point() else t, value
    )


def wrong_values(op: str, name: str) -> list[Any]:
    wrongs = WRONG_TYPES[kind_of(name)]
    if kind_of(name) == "tensor":
        given = right_arguments()[op].get(name, torch.ones(2, 3))
        if name == "normalizer":
            wrongs = ["1", [1], ARRAY, torch.ones(()) * 1j]
        elif any(t.is_floating_point() for t in pytree.tree_leaves(given)):
            wrongs = [*wrongs, in_complex(given)]
        if name == "targets" and op in DENSE_TARGETS:
            wrongs = [*wrongs, torch.zeros(6, 5, dtype=torch.complex64)]
    return [w for w in wrongs if w is not None or not may_be_none(op, name)]


def sentences(op: str, name: str, arguments: dict[str, Any]) -> set[str]:
    """What is said, in every reduction."""
    of = inspect.signature(function_of(op)).parameters
    of_one = ("reduction", "normalizer", "inplace_backward")
    reductions = reductions_of(op) if "reduction" in of and name not in of_one else (None,)
    said = set()
    for reduction in reductions:
        these = arguments if reduction is None else arguments | {"reduction": reduction}
        try:
            function_of(op)(**these)
            said.add("nothing")
        except (TypeError, ValueError) as error:
            said.add(str(error))
        except Exception as error:
            said.add(f"{type(error).__name__}: {error}")
    return said


def on_meta(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), value)


@pytest.fixture(params=["cpu", "cuda-emulated", "meta", "fake", "reference"])
def path(request):
    if request.param == "reference":
        request.getfixturevalue("without_kernels")
    with emulated_cuda() if request.param == "cuda-emulated" else nullcontext():
        yield request.param


@pytest.mark.parametrize("op", right_arguments())
def test_wrong_types_are_refused_in_one_sentence(op, path):
    wrong = []
    for name, parameter in inspect.signature(function_of(op)).parameters.items():
        if parameter.kind == parameter.VAR_KEYWORD:
            continue
        right = right_arguments()[op]
        is_tensor = kind_of(name) == "tensor"
        for value in wrong_values(op, name):
            if path == "meta":
                arguments = on_meta(right) | {name: on_meta(value) if is_tensor else value}
            else:
                arguments = right | {name: value}
            with FakeTensorMode(allow_non_fake_inputs=True) if path == "fake" else nullcontext():
                said = sentences(op, name, arguments)
            names = ("labels", "scores", name) if name == "targets" else (name,)
            (sentence, *others) = said
            named = any(n in sentence.partition(" must ")[0] for n in names)
            if others or "\n" in sentence or " must " not in sentence or not named:
                wrong.append(f"{name}={value!r}: {said}")
    assert not wrong, "\n".join(wrong)


# ---- what is not of the table -------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, np.bool_(True), np.array(True)])
def test_flags_may_be_numpys(value):
    logits = [torch.zeros(1, 3, 2, 2)]
    arguments = (logits, [torch.zeros(1, 4, 2, 2)], torch.ones(4, 4).cumsum(1))
    expected = focalops.detect(*arguments, score_threshold=0.1, class_agnostic=True)
    actual = focalops.detect(*arguments, score_threshold=0.1, class_agnostic=value)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_largest_integers_are_taken():
    x, labels = torch.zeros(3, 2), torch.tensor([0, 2, 2**63 - 1])
    loss = focalops.sigmoid_focal_loss(x, labels, ignore_index=2**63 - 1)
    assert (loss[2] == 0).all() and (loss[:2] > 0).all()


@pytest.mark.parametrize("num_classes", [-1, 2**30, 2**63 - 1])
def test_class_index_targets_say_how_many_classes_there_may_be(num_classes):
    matches, labels = torch.zeros(1, 2).long(), torch.zeros(1, 1).long()
    with pytest.raises(ValueError, match=r"num_classes must lie in \[0, 2\^30\), got -?\d+$"):
        focalops.class_index_targets(matches, labels, num_classes)


def test_quantized_boxes_are_refused():
    boxes = torch.quantize_per_tensor(torch.zeros(6, 4), 1.0, 0, torch.quint8)
    for function in (focalops.nms, focalops.nms_match):
        with pytest.raises(ValueError, match=r"^boxes must be real numbers, got torch.quint8: dequantize it$"):  # fmt: skip
            function(boxes, torch.zeros(6), 0.5)
    with pytest.raises(ValueError, match=r"^boxes must be real numbers, got torch\.quint8"):
        focalops.batched_nms(boxes, torch.zeros(6), torch.zeros(6), 0.5)


# ---- what the type of one argument hides of another ---------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"deltas": torch.zeros(6, 4).to(torch.complex64)}, "deltas must be real numbers, got torch.complex64"),
        ({"anchors": torch.zeros(6, 4).to(torch.complex64)}, "anchors must be real numbers, got torch.complex64"),
        ({"anchors": torch.zeros(6, 4, device="meta")}, "decode_boxes: anchors must be on cpu like deltas, got meta"),
        ({"anchors": torch.zeros(6, 4).bool()}, "decode_boxes: anchors must be float32 (float64 for float64 deltas), got torch.bool"),
    ],
    ids=str,
)  # fmt: skip
def test_ctr_clamp_hides_nothing(wrong, sentence):
    with pytest.raises(ValueError) as raised:
        focalops.decode_boxes(**(right_arguments()["decode_boxes"] | wrong), ctr_clamp=32)
    assert str(raised.value) == sentence


def test_no_images():
    """Neither boxes, nor sizes, nor a normalizer for each."""
    deltas = [torch.zeros(0, 4, 2, 2, requires_grad=True)]
    anchors, matches = torch.ones(4, 4), torch.zeros(0, 4).long()
    for function in (focalops.dense_box_loss, focalops.reference.dense_box_loss):
        for gt_boxes in ([], torch.zeros(0, 3, 4)):
            for normalizer in (None, 2.0, torch.zeros(0)):
                loss = function(deltas, anchors, gt_boxes, matches, normalizer=normalizer)
                (grad,) = torch.autograd.grad(loss, deltas, create_graph=True)
                assert loss == 0 and grad.shape == deltas[0].shape
    logits = [torch.zeros(0, 3, 2, 2)]
    for function in (focalops.detect, focalops.reference.detect):
        boxes, scores, labels, counts = function(logits, deltas, anchors, image_sizes=[])
        assert boxes.shape == (0, 100, 4) and scores.shape == labels.shape == (0, 100)
        assert counts.shape == (0,)
