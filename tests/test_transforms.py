"""Every public op under the compiler and the transforms of torch, in one table."""

import functools
import inspect
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import focalops
from focalops import (
    assign_atss,
    assign_fcos,
    assign_simota,
    assign_task_aligned,
    batched_nms,
    class_index_targets,
    count_degenerate_boxes,
    decode_boxes,
    decode_distances,
    dense_box_loss,
    dense_equalized_focal_loss,
    dense_focal_loss,
    dense_quality_loss,
    detect,
    distribution_focal_loss,
    encode_boxes,
    encode_distances,
    fuse_features,
    match_anchors,
    match_iou_matrix,
    matched_iou,
    matrix_nms,
    multiclass_nms,
    nms,
    nms_match,
    sigmoid_focal_loss,
    sigmoid_focal_loss_star,
    soft_nms,
    softmax_focal_loss,
)

Inputs = tuple[Tensor, ...]

IOU_KINDS = ("", "generalized_", "distance_", "complete_")


def boxes(*shape: int) -> Tensor:
    corner, size = torch.rand(*shape, 2) * 60, torch.rand(*shape, 2) * 40 + 1
    return torch.cat((corner, corner + size), dim=-1)


def focal(n: int) -> Inputs:
    return torch.randn(n, 5), torch.randint(0, 6, (n,))


def row_loss(function: Callable, x: Tensor, targets: Tensor, scores: Tensor) -> Tensor:
    return function(x, (targets, scores.detach()), reduction="sum")


def head(n: int) -> Inputs:
    """Two levels of 2 anchors and 3 classes: 2 (n + 4) anchors an image."""
    levels = torch.randn(2, 6, n, 1), torch.randn(2, 6, 2, 2)
    return (*levels, torch.randint(0, 4, (2, 2 * n + 8)))


def head_of_boxes(n: int) -> Inputs:
    """Deltas of 2 anchors, anchors, boxes, matches."""
    levels = torch.randn(2, 8, n, 1), torch.randn(2, 8, 2, 2)
    return (*levels, boxes(2 * n + 8), boxes(2, 3), torch.randint(-2, 3, (2, 2 * n + 8)))


def padded(n: int) -> Inputs:
    counts = torch.tensor([n, n // 2])
    return boxes(2, n), torch.rand(2, n), torch.randint(0, 3, (2, n)), counts


# Of each op: a call, and what makes its inputs for a size.
EXAMPLES: dict[str, tuple[Callable, Callable[[int], Inputs]]] = {
    "assign_atss": (
        lambda a, g, c: assign_atss(a, [18, 2], g, 4, counts=c),
        lambda n: (boxes(20), boxes(2, n), torch.tensor([4, 1])),
    ),
    "assign_fcos": (
        lambda p, g, c: assign_fcos(p, [8, 16], [18, 2], g, counts=c),
        lambda n: (torch.rand(20, 2) * 60, boxes(2, n), torch.tensor([4, 1])),
    ),
    "assign_simota": (
        lambda s, b, p, g, t, c: assign_simota(s, b, p, torch.full((20,), 8.0), g, t, counts=c),
        lambda n: (
            *(torch.randn(2, 20, 3), boxes(2, 20), torch.rand(20, 2) * 60),
            *(boxes(2, n), torch.randint(0, 3, (2, n)), torch.tensor([4, 1])),
        ),
    ),
    "assign_task_aligned": (
        lambda s, b, p, g, t, c: assign_task_aligned(s, b, p, g, t, counts=c),
        lambda n: (
            *(torch.rand(2, 20, 3), boxes(2, 20), torch.rand(20, 2) * 60),
            *(boxes(2, n), torch.randint(0, 3, (2, n)), torch.tensor([4, 1])),
        ),
    ),
    "batched_nms": (
        lambda b, s, i: batched_nms(b, s, i, 0.5),
        lambda n: (boxes(n), torch.rand(n), torch.randint(0, 3, (n,))),
    ),
    **{
        f"{kind}box_iou": (getattr(focalops, f"{kind}box_iou"), lambda n: (boxes(n), boxes(3)))
        for kind in IOU_KINDS
    },
    **{
        f"{kind}box_iou_loss": (
            getattr(focalops, f"{kind}box_iou_loss"),
            lambda n: (boxes(n), boxes(n)),
        )
        for kind in IOU_KINDS
    },
    "class_index_targets": (
        lambda m, x: class_index_targets(m, x, 4),
        lambda n: (torch.randint(-2, 3, (2, n)), torch.randint(0, 4, (2, 3))),
    ),
    "count_degenerate_boxes": (
        lambda g: count_degenerate_boxes(g, [(50, 60), (40, 30)]),
        lambda n: (boxes(2, n),),
    ),
    "decode_boxes": (
        lambda d, a: decode_boxes(d, a, image_size=(80, 90)),
        lambda n: (torch.randn(n, 4), boxes(n)),
    ),
    "decode_distances": (
        lambda d3, d4, p: decode_distances([d3, d4], p.detach(), [8, 16], bins=3),
        lambda n: (torch.randn(2, 12, n, 1), torch.randn(2, 12, 2, 2), torch.rand(n + 4, 2) * 60),
    ),
    "dense_box_loss": (
        lambda d3, d4, a, g, m: dense_box_loss([d3, d4], a.detach(), g.detach(), m, loss="giou"),
        head_of_boxes,
    ),
    "dense_equalized_focal_loss": (
        lambda p3, p4, labels, gamma: dense_equalized_focal_loss([p3, p4], labels, gamma.detach()),
        lambda n: (*head(n), torch.tensor([0.0, 2.0, 4.5])),
    ),
    "dense_focal_loss": (lambda p3, p4, labels: dense_focal_loss([p3, p4], labels), head),
    "dense_quality_loss": (
        lambda p3, p4, labels, scores: dense_quality_loss([p3, p4], labels, scores.detach()),
        lambda n: (*head(n), torch.rand(2, 2 * n + 8)),
    ),
    "detect": (
        lambda p3, p4, d3, d4, f3, f4, a: detect(
            [p3, p4], [d3, d4], a, max_detections=9, score_factors=[f3, f4], combine="sqrt"
        ),
        lambda n: (
            *(torch.randn(2, 6, n, 1), torch.randn(2, 6, 2, 2)),
            *(torch.randn(2, 8, n, 1), torch.randn(2, 8, 2, 2)),
            *(torch.randn(2, 2, n, 1), torch.randn(2, 2, 2, 2)),
            boxes(2 * n + 8),
        ),
    ),
    "distribution_focal_loss": (
        lambda x, t: distribution_focal_loss(x, t.detach(), reduction="sum"),
        lambda n: (torch.randn(n, 4, 5), torch.rand(n, 4) * 4),
    ),
    "encode_distances": (encode_distances, lambda n: (torch.rand(n, 2) * 60, boxes(2, n))),
    "encode_boxes": (encode_boxes, lambda n: (boxes(n), boxes(n))),
    "fuse_features": (
        lambda own, up, down, w: fuse_features([own, up, down], w, activation="silu"),
        lambda n: (
            *(torch.randn(2, n, 4, 6), torch.randn(2, n, 2, 3), torch.randn(2, n, 8, 12)),
            torch.tensor([0.5, 1.0, 0.25]),
        ),
    ),
    "match_anchors": (
        lambda a, g, c: match_anchors(a, g, counts=c),
        lambda n: (boxes(n), boxes(2, 4), torch.tensor([4, 1])),
    ),
    "match_iou_matrix": (match_iou_matrix, lambda n: (torch.rand(5, n),)),
    "matched_iou": (lambda d3, d4, *others: matched_iou([d3, d4], *others), head_of_boxes),
    "multiclass_nms": (lambda b, s, i, c: multiclass_nms(b, s, i, 0.5, 7, counts=c), padded),
    "matrix_nms": (
        lambda b, s: matrix_nms(b, s, max_detections=7),
        lambda n: (boxes(2, n), torch.rand(2, n)),
    ),
    "soft_nms": (
        lambda b, s: soft_nms(b, s, max_detections=7),
        lambda n: (boxes(2, n), torch.rand(2, n)),
    ),
    "nms": (lambda b, s: nms(b, s, 0.5), lambda n: (boxes(n), torch.rand(n))),
    "nms_match": (lambda b, s: nms_match(b, s, 0.5), lambda n: (boxes(n), torch.rand(n))),
    **{
        name: (
            functools.partial(row_loss, getattr(focalops, name)),
            lambda n: (*focal(n), torch.rand(n)),
        )
        for name in (
            "ia_bce_loss",
            "matchability_aware_loss",
            "quality_focal_loss",
            "soft_focal_loss",
            "varifocal_loss",
        )
    },
    "sigmoid_focal_loss": (lambda x, t: sigmoid_focal_loss(x, t, reduction="sum"), focal),
    "softmax_focal_loss": (
        lambda x, t: softmax_focal_loss(x, t, reduction="sum"),
        lambda n: (torch.randn(n, 5), torch.randint(0, 5, (n,))),
    ),
    "sigmoid_focal_loss_star": (lambda x, t: sigmoid_focal_loss_star(x, t, beta=1.0), focal),
}

# Their results, or what they are made of, are as many as are kept.
DYNAMIC = {"batched_nms", "nms", "nms_match"}
# Matching, targets, NMS and detection choose, and an IoU that weighs is a constant: there is nothing to differentiate.
CHOICES = {
    "assign_atss",
    "assign_fcos",
    "assign_simota",
    "assign_task_aligned",
    "class_index_targets",
    "count_degenerate_boxes",
    "detect",
    "encode_distances",
    "match_anchors",
    "match_iou_matrix",
    "matched_iou",
    "matrix_nms",
    "multiclass_nms",
    "soft_nms",
}
DIFFERENTIABLE = EXAMPLES.keys() - DYNAMIC - CHOICES


def example(op: str, n: int, device: str) -> tuple[Callable, Inputs]:
    function, make = EXAMPLES[op]
    return function, tuple(tensor.to(device) for tensor in make(n))


def with_grad(function: Callable, inputs: Inputs) -> list[Tensor]:
    """Results, and the gradients of all inputs that have one."""
    inputs = tuple(t.clone().requires_grad_(t.is_floating_point()) for t in inputs)
    results = pytree.tree_leaves(function(*inputs))
    total = sum((r.sum() for r in results if r.requires_grad), torch.zeros(()))
    if total.requires_grad:
        total.backward()
    return [*results, *(t.grad for t in inputs if t.grad is not None)]


def test_every_op_is_in_the_table():
    functions = {n for n in focalops.__all__ if inspect.isfunction(getattr(focalops, n))}
    functions -= {"accelerate"}  # takes a model
    assert functions == EXAMPLES.keys()


@pytest.mark.parametrize("op", EXAMPLES)
def test_compiles_to_one_graph(op, backend, device):
    torch.compiler.reset()  # the losses of rows are one function to the compiler, whose variants it counts
    function, inputs = example(op, 13, device)
    # To inductor, which takes seconds, the emulated kernels are those of the CPU.
    compiler = "inductor" if backend in ("cpu", "cuda") else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    torch.testing.assert_close(with_grad(compiled, inputs), with_grad(function, inputs))


@pytest.mark.parametrize("op", EXAMPLES)
def test_exports_with_a_dynamic_size(op, device):
    function, inputs = example(op, 13, device)

    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor):
            return function(*inputs)

    _, others = example(op, 29, device)
    # What differs between two sizes is dynamic.
    sizes = [
        {d: torch.export.Dim.AUTO for d in range(a.dim()) if a.shape[d] != b.shape[d]}
        for a, b in zip(inputs, others, strict=True)
    ]
    program = torch.export.export(Model(), inputs, dynamic_shapes=(tuple(sizes),))
    torch.testing.assert_close(program.module()(*others), function(*others))


@pytest.mark.parametrize("op", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(op, dtype, device):
    function, inputs = example(op, 13, device)
    with torch.autocast(device, dtype=dtype):
        results = function(*inputs)
    torch.testing.assert_close(results, function(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("op", sorted(EXAMPLES.keys() - DYNAMIC))
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop(op, device):
    function, _ = example(op, 5, device)
    batch = [example(op, 5, device)[1] for _ in range(3)]
    together = torch.vmap(function)(*(torch.stack(tensors) for tensors in zip(*batch, strict=True)))
    loop = [function(*inputs) for inputs in batch]
    expected = pytree.tree_map(lambda *results: torch.stack(results), *loop)
    torch.testing.assert_close(together, expected)


@pytest.mark.parametrize("op", sorted(DIFFERENTIABLE))
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jvp of vmap", "compiled jvp", "dual"])
def test_forward_mode_is_refused_in_a_sentence(transform, op):
    """Autograd registered from Python would give tangents of 0."""
    function, inputs = example(op, 5, "cpu")
    tangents = tuple(torch.ones_like(t) if t.is_floating_point() else None for t in inputs)
    free = tuple(i for i, t in enumerate(inputs) if t.is_floating_point())

    def f(*values: Tensor):
        all_inputs = list(inputs)
        for i, value in zip(free, values, strict=True):
            all_inputs[i] = value
        return function(*all_inputs)

    primals, ones = tuple(inputs[i] for i in free), tuple(tangents[i] for i in free)
    with pytest.raises(NotImplementedError, match=r"^focalops::\w+ has no forward-mode derivative"):
        if transform == "jvp":
            torch.func.jvp(f, primals, ones)
        elif transform == "jacfwd":
            torch.func.jacfwd(f)(*primals)
        elif transform == "jvp of vmap":
            stacked = [tuple(t.unsqueeze(0) for t in tensors) for tensors in (primals, ones)]
            torch.func.jvp(torch.vmap(f), *stacked)
        elif transform == "compiled jvp":
            torch.compile(lambda *x: torch.func.jvp(f, x, ones), backend="eager")(*primals)
        else:
            with torch.autograd.forward_ad.dual_level():
                f(
                    *(
                        torch.autograd.forward_ad.make_dual(*pair)
                        for pair in zip(primals, ones, strict=True)
                    )
                )


@pytest.mark.parametrize("op", ["assign_atss", "assign_fcos", "detect", "match_anchors", "nms"])
def test_what_chooses_takes_tangents(op):
    function, inputs = example(op, 5, "cpu")
    expected = function(*inputs)
    with torch.autograd.forward_ad.dual_level():
        duals = tuple(
            torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
            if t.is_floating_point()
            else t
            for t in inputs
        )
        torch.testing.assert_close(function(*duals), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is (deprecated|not supported)")
@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="torch.jit.script does not know this Python"
)
@pytest.mark.parametrize("name", [n for n in focalops.__all__ if n != "__version__"])
def test_script_is_refused_in_a_sentence(name):
    public = getattr(focalops, name)
    if name == "AnchorGenerator":
        public = public(((32.0,),), ((1.0,),))

    class Caller(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = public if name == "AnchorGenerator" else None

        def forward(self, x):
            return public(x)

    sentence = rf"focalops\.{name} has no TorchScript: use torch\.compile or torch\.export"
    for script in (lambda: torch.jit.script(public), lambda: torch.jit.script(Caller())):
        with pytest.raises(NotImplementedError, match=sentence):
            script()


@pytest.mark.parametrize("op", sorted(DIFFERENTIABLE))
def test_activation_checkpointing(op, device):
    function, inputs = example(op, 13, device)

    def checkpointed(*inputs: Tensor) -> Tensor:
        return checkpoint(function, *inputs, use_reentrant=False)

    expected = with_grad(function, inputs)
    assert len(expected) > 1
    torch.testing.assert_close(with_grad(checkpointed, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", EXAMPLES)
def test_runs_on_the_current_stream(op, backend, device):
    if backend != "cuda":
        pytest.skip("needs a GPU; the emulation interleaves streams in test_cuda_emulation.py")
    function, inputs = example(op, 400, device)
    expected = with_grad(function, inputs)
    delayed = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)  # a kernel on any other stream would see the zeros
        for to, tensor in zip(delayed, inputs, strict=True):
            to.copy_(tensor)
        results = with_grad(function, tuple(delayed))
    torch.cuda.synchronize()
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", EXAMPLES)
def test_runs_on_a_second_gpu(op):
    if torch.cuda.device_count() < 2 or focalops._library.no_cuda_reason is not None:
        pytest.skip("needs two GPUs")
    function, inputs = example(op, 29, "cuda:1")  # cuda:0 is the current one
    first = tuple(tensor.to("cuda:0") for tensor in inputs)
    torch.testing.assert_close(
        pytree.tree_map(lambda t: t.cpu(), function(*inputs)),
        pytree.tree_map(lambda t: t.cpu(), function(*first)),
    )
