"""Every path of every public function on random arguments, for as long as one likes: `make fuzz ARGS="--seconds 60 --seed 1"`.

A round makes arguments of one function, and compares what it gives on the CPU with the reference in float64, torchvision where
it has the function, the CUDA kernels emulated, other memory layouts, each reduction, `inplace_backward`, a graph that is kept,
`torch.compile`, and meta tensors: results and gradients. Or it makes one argument wrong: then every path has to say the same
sentence. Each difference is printed with the seed that repeats its round; the exit status is 1 if there was one.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from cuda_emulation import emulated_cuda
from fuzz_arguments import DENSE_TARGETS, DTYPES, MAKERS, Arguments, wrong
from fuzz_modules import MODULES
from torch import Tensor
from torch.utils import _pytree as pytree
from torchvision.models.detection._utils import BoxCoder, Matcher

import focalops
from focalops import reference

NAMES = sorted(MAKERS)
DIFFERENTIATED = {
    **dict.fromkeys(MAKERS, ("inputs", "cls_logits", "deltas", "boxes1", "boxes2")),
    **dict.fromkeys(("encode_boxes", "decode_boxes"), ("boxes", "deltas", "anchors")),
    "decode_distances": ("levels",),
    "dense_box_loss": ("deltas", "weight"),
    "dense_quality_loss": ("cls_logits", "weight"),
    "distribution_focal_loss": ("inputs", "weight"),
    # The terms of the weights' gradient cancel where one map has all the weight: test_fuse_features.py compares it.
    "fuse_features": ("features",),
    **dict.fromkeys(("detect", "class_index_targets", "encode_distances"), ()),
}
# What is said of the numbers in a tensor.
OF_NUMBERS = r"(targets|labels|labels\[\d+\]|matches|matches\[\d+\]|counts|scores) must (lie in|be less than the number)"
# Their number of results depends on the data.
DYNAMIC = ("nms", "batched_nms", "nms_match")
# These compare overlaps with thresholds, so that float64 may decide otherwise: the reference's bits are asked for.
CHOICES = (
    *DYNAMIC,
    "multiclass_nms",
    "soft_nms",
    "matrix_nms",
    "assign_atss",
    "assign_fcos",
    "assign_simota",
    "assign_task_aligned",
    "detect",
    "match_anchors",
    "match_iou_matrix",
    "nms_match",
)


REFERENCES = {name: getattr(reference, name, None) for name in MAKERS}


@dataclass
class Said:
    """What was raised."""

    kind: str
    sentence: str
    is_usual: bool  # an error that the functions document

    def __str__(self) -> str:
        return f"{self.kind}: {self.sentence}"


Outcome = list[Tensor] | Said


# ---- calls --------------------------------------------------------------------------------------


def results_of(function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    return [r for r in pytree.tree_leaves(function(**arguments)) if isinstance(r, Tensor)]


def upstream_of(result: Tensor) -> Tensor:
    """Eighths, which every dtype holds."""
    index = torch.arange(result.numel()).view(result.shape)
    return ((index * 5 + 11) % 17 - 8).to(result.dtype) / 8


def with_gradients(
    name: str,
    function: Callable[..., Any],
    arguments: Arguments,
    lay_out: Callable[[Tensor], Tensor] = lambda t: t,
    create_graph: bool = False,
    chained: bool = False,
) -> list[Tensor]:
    """Results and gradients; `lay_out` makes of each tensor what the function gets, and `chained` makes each a function of
    the one before it, of the same value."""
    leaves: list[Tensor] = []
    before: list[Tensor] = []

    def prepare(value: Any, differentiated: bool) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(prepare(v, differentiated) for v in value)
        if not isinstance(value, Tensor):
            return value
        if not (differentiated and value.is_floating_point()):
            return lay_out(value)
        leaves.append(value.detach().clone().requires_grad_())
        made = leaves[-1] * 1  # no leaf, so that its gradient may be written over it
        if chained and before and before[-1].isfinite():
            made = made + (before[-1] - before[-1].detach()).to(made.dtype)
        before.append(made.mean())  # not the sum, whose gradients would grow from one to the next
        return lay_out(made)

    prepared = {k: prepare(v, k in DIFFERENTIATED[name]) for k, v in arguments.items()}
    results = results_of(function, prepared)
    outputs = [r for r in results if r.requires_grad]
    grads: list[Tensor] = []
    if outputs and leaves:
        upstream = [upstream_of(r) for r in outputs]
        kept = torch.autograd.grad(
            outputs, leaves, upstream, create_graph=create_graph, allow_unused=True
        )
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(kept, leaves, strict=True)]
    return [r.detach() for r in (*results, *grads)]


def outcome_of(call: Callable[[], list[Tensor]]) -> Outcome:
    try:
        return call()
    except Exception as error:
        is_usual = isinstance(error, (RuntimeError, ValueError, TypeError))
        is_usual = is_usual and not isinstance(error, NotImplementedError)
        return Said(type(error).__name__, str(error).strip(), is_usual)


def doubled(arguments: Arguments) -> Arguments:
    return pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, arguments
    )


def on_meta(arguments: Arguments) -> Arguments:
    return pytree.tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, arguments)


def strided(t: Tensor) -> Tensor:
    """The same numbers, elsewhere in memory."""
    how = random.randint(0, 2)
    if t.dim() == 0:
        return t
    if how == 0:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if how == 1:
        return torch.stack((t, t), dim=-1)[..., 0]
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def as_computed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sums that are kept in float64 in the dtype of the loss, which tells how they were computed."""

    def in_dtype_of_the_loss(**arguments: Any) -> tuple[Tensor, Tensor]:
        loss, sums = function(**arguments)
        return loss, sums.to(loss.dtype)

    return in_dtype_of_the_loss


# ---- torchvision --------------------------------------------------------------------------------


def torchvisions(name: str, a: Arguments) -> list[Tensor] | None:
    """What torchvision gives in float64, where it has the function and the same rule."""
    a = doubled(a)
    tensors = [t for t in pytree.tree_leaves(a) if isinstance(t, Tensor) and t.is_floating_point()]
    if not all(t.isfinite().all() for t in tensors):
        return None
    if name == "sigmoid_focal_loss":
        x, t = a["inputs"], a["targets"]
        if t.shape != x.shape or a.get("normalizer") is not None or x.numel() == 0:
            return None
        options = [a[k] for k in ("alpha", "gamma", "reduction")]
        return [torchvision.ops.sigmoid_focal_loss(x, t.double(), *options)]
    if "box_iou" in name and hasattr(torchvision.ops, name):
        b1, b2 = a["boxes1"], a["boxes2"]
        of_corners = a.get("fmt", "xyxy") == "xyxy" and a.get("mode", "iou") == "iou"
        if (
            not of_corners
            or b1.dim() != 2
            or not all((b[:, 2:] > b[:, :2]).all() for b in (b1, b2))
        ):
            return None
        options = {k: a[k] for k in ("eps", "reduction") if k in a}
        is_other_eps = name == "complete_box_iou_loss" and a["eps"] != 1e-7
        return None if is_other_eps else [getattr(torchvision.ops, name)(b1, b2, **options)]
    if name == "encode_boxes" and a["boxes"].dim() == a["anchors"].dim() == 2:
        return [BoxCoder(a["weights"]).encode_single(a["boxes"], a["anchors"])]
    return None


def torchvisions_choice(name: str, a: Arguments) -> list[Tensor] | None:
    """The same of what chooses, in the arguments' own dtype."""
    if name == "nms" and a["overlap"] == "iou" and a["boxes"].dtype == a["scores"].dtype:
        b, s = a["boxes"], a["scores"]
        if b.dtype in (torch.float32, torch.float64) and b.isfinite().all() and s.isfinite().all():
            return [torchvision.ops.nms(b, s, a["iou_threshold"])]
    if name == "match_anchors" and not {"crowd", "counts", "image_sizes"} & a.keys():
        if a["rule"] in ("mmdet", "efficientdet"):
            return None
        thresholds = a["fg_iou_threshold"], a["bg_iou_threshold"], a["allow_low_quality_matches"]
        matches = []
        for boxes in a["gt_boxes"]:
            iou = torchvision.ops.box_iou(boxes, a["anchors"]).nan_to_num(0)
            # There a box that overlaps nothing takes every anchor.
            if iou.numel() == 0 or (iou.amax(1) <= 0).any():
                return None
            matches.append(Matcher(*thresholds)(iou))
        return [torch.stack(matches)] if matches else None
    return None


# ---- comparison ---------------------------------------------------------------------------------


def largest_of(t: Tensor) -> float:
    t = torch.zeros(1) if t.is_meta else t.double().flatten()
    t = t[t.isfinite()].abs()
    return t.max().item() if len(t) else 0


def roundings(a: Arguments) -> float:
    """How many roundings a result may be off: some dozens of operations; an exponential of y loses |y|, and a power of it as
    often as its exponent says; a side of a box loses as many as it is smaller than the coordinates."""
    tensors = [t for t in pytree.tree_leaves(a) if isinstance(t, Tensor) and t.is_floating_point()]
    if "inputs" in a or "cls_logits" in a:
        gamma = a.get("gamma", 0)
        largest = largest_of(gamma) if isinstance(gamma, Tensor) else gamma
        exponent = max(largest, a.get("beta", 0), 1)
        return 64 + 4 * (exponent + 1) * max(largest_of(t) for t in tensors)
    ratio = 1.0
    for t in tensors:
        if t.dim() and t.shape[-1] == 4:
            sides = (t[..., 2:] - t[..., :2]).double().abs()
            sides = sides[(sides > 0) & sides.isfinite()]
            ratio = max(ratio, largest_of(t) / sides.min().item() if len(sides) else 1)
    return 128 * (1 + ratio)


def difference(
    actual: Tensor, expected: Tensor, roundings: float, terms: float, stored: int = 1
) -> str:
    """In words; nothing where there is none. ``stored``: how often it was rounded to its dtype."""
    if actual.shape != expected.shape:
        return f"has shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if actual.dtype != expected.dtype and expected.dtype != torch.float64:  # that of references
        return f"is {actual.dtype} and not {expected.dtype}"
    if actual.is_meta:
        return ""
    a, e = actual.double(), expected.double()
    if not actual.is_floating_point():
        bad = actual != expected
    else:
        of_compute = torch.float64 if actual.dtype == torch.float64 else torch.float32
        unit, info = torch.finfo(of_compute).eps, torch.finfo(actual.dtype)
        # Terms may cancel: the largest number says how large they are, and what the caller knows.
        scale = max(largest_of(e), terms)
        # What underflow takes: where it is rounded to float16, of bfloat16 where it is computed.
        is_float16 = actual.dtype == torch.float16
        least = info.smallest_normal * (4 * info.eps if is_float16 else 1e4)
        absolute = roundings * unit * scale + least
        overflow = e.abs() > info.max  # of float32 or half precision
        e = torch.where(overflow, e.sign() * math.inf, e)
        bad = ~torch.isclose(
            a, e, rtol=roundings * unit + stored * info.eps, atol=absolute, equal_nan=True
        )
        bad |= a.isnan() != e.isnan()
    if not bad.any():
        return ""
    where = bad.nonzero()[0].tolist()
    values = f"{a[bad][0].item():.9g} instead of {e[bad][0].item():.9g}"
    return f"differs in {int(bad.sum())} of {bad.numel()}, first at {where}: {values}"


class Report:
    """Differences, each kind a few times."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, ...]] = Counter()

    def add(self, seed: int, name: str, path: str, what: str, arguments: Arguments) -> None:
        kind = (name, path, re.sub(r"[-\d.e+]+", "#", what)[:120])
        self.found[kind] += 1
        if self.found[kind] <= 2:
            again = f"python tests/fuzz.py --only {name} --seed {seed} --seconds 0"
            print(
                f"{name}, {path}: {what}\n    {in_words(name, arguments)}\n    again: {again}",
                flush=True,
            )


def in_words(name: str, arguments: Arguments) -> str:
    def word(value: Any) -> str:
        if isinstance(value, Tensor):
            if value.numel() <= 12 and not value.is_meta:
                return re.sub(r"\s+", " ", repr(value))
            return f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
        if isinstance(value, (list, tuple)) and len(value) > 12:
            return f"[{word(value[0])}, ...] of {len(value)}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(word(v) for v in value)}]"
        return repr(value) if not isinstance(value, torch.nn.Module) else type(value).__name__

    return f"{name}({', '.join(f'{k}={word(v)}' for k, v in arguments.items())})"


# ---- rounds -------------------------------------------------------------------------------------


@dataclass
class Round:
    """A function, arguments, and where to say what differs."""

    report: Report
    seed: int
    name: str
    arguments: Arguments
    slack: float = 0  # roundings
    terms: float = 0  # how large what cancels in a gradient is at least

    def add(self, path: str, what: str) -> None:
        self.report.add(self.seed, self.name, path, what, self.arguments)

    def check(self, path: str, actual: Outcome, expected: Outcome) -> None:
        if isinstance(actual, Said) or isinstance(expected, Said):
            if actual != expected:
                words = [str(x) if isinstance(x, Said) else "a result" for x in (actual, expected)]
                self.add(path, f"{words[0]} instead of {words[1]}")
            return
        # 1 less an overlap is as exact as 1 is, and so is 1 less a probability in torchvision and in the logarithm of a
        # softmax; a gradient by what others depend on has their terms.
        is_of_one = re.search("iou_loss|softmax|distribution", self.name) or "torchvision" in path
        result = max(largest_of(expected[0]), bool(is_of_one)) if expected else 0
        most = max(1e-4 * result, self.terms)
        if path == "graph kept":
            most = max([most, *map(largest_of, expected)])
        for i, (a, e) in enumerate(zip(actual, expected, strict=False)):
            # A gradient is rounded when it is saved and when it is scaled.
            if what := difference(a, e, self.slack, most if i else result, 2 if i else 1):
                self.add(path, f"result or gradient {i} {what}")
                return

    def compare_modules(self) -> None:
        results = []
        for function in MODULES[self.name]:
            torch.manual_seed(self.seed)
            results.append(results_of(function, self.arguments))
        self.slack = 1e4  # sums through a small network
        self.check("against the original", *results)

    def compare_paths(self, compile_share: float) -> None:
        name, a = self.name, self.arguments
        function, of_reference = getattr(focalops, name), REFERENCES[name]
        if name == "dense_equalized_focal_loss":
            function, of_reference = (as_computed(f) for f in (function, of_reference))
        self.slack = roundings(a)
        if isinstance(boxes := a.get("boxes1"), Tensor):
            # The derivative of an overlap by a coordinate has terms of 1 / side, which may cancel; the slack has
            # the largest coordinate over the least side.
            number = max(boxes.shape[-2:-1] + a["boxes2"].shape[-2:-1], default=1)
            self.terms = number / max(largest_of(boxes), largest_of(a["boxes2"]), 1)

        def run(function: Callable[..., Any] = function, a: Arguments = a, **how: Any) -> Outcome:
            return outcome_of(lambda: with_gradients(name, function, a, **how))

        plain = run()
        self.check(
            "cpu against the reference",
            plain,
            run(of_reference, a if name in CHOICES else doubled(a)),
        )
        if isinstance(plain, Said):
            return
        peer = torchvisions_choice(name, a) if name in CHOICES else torchvisions(name, a)
        if peer is not None:
            self.check("cpu against torchvision", plain[: len(peer)], peer)

        layout = random.choice((strided, channels_last))
        self.check(layout.__name__, run(lay_out=layout), plain)
        # A graph that is kept is computed anew, from inputs that may depend on each other: where that rounds no more.
        dtypes = {t.dtype for t in pytree.tree_leaves(a) if isinstance(t, Tensor)}
        chained = len(dtypes & set(DTYPES)) == 1 and not dtypes & {torch.float16, torch.bfloat16}
        kept = run(create_graph=True, chained=chained)
        self.check("graph kept", kept, run(chained=True) if chained else plain)
        with emulated_cuda():
            self.check(f"cuda-emulated, {layout.__name__}", run(lay_out=layout), plain)
        takes_inplace = "inputs" in a and name != "distribution_focal_loss"
        if name in DENSE_TARGETS:
            takes_inplace = isinstance(a["targets"], tuple)  # dense ones are refused
        if a.get("reduction") != "none" and (takes_inplace or name == "dense_focal_loss"):
            over = {**a, "inplace_backward": True}
            how = {"lay_out": channels_last} if name == "dense_focal_loss" else {}
            self.check("inplace_backward, cpu", run(a=over, **how), plain)
            with emulated_cuda():
                self.check("inplace_backward, cuda-emulated", run(a=over, **how), plain)
        if "reduction" in a:
            # In float64, as half precision rounds each element.
            left_out = ("normalizer", "min_normalizer", "return_iou")
            wide = {k: v for k, v in doubled(a).items() if k not in left_out}
            total, each = (run(a={**wide, "reduction": r}) for r in ("sum", "none"))
            summed = run(lambda **a: function(**a).sum(), {**wide, "reduction": "none"})
            self.check(
                "the sum against the sum of each", total, each if isinstance(each, Said) else summed
            )
        if name not in DYNAMIC:
            self.check("meta", outcome_of(lambda: results_of(function, on_meta(a))), plain)
        if random.random() < compile_share:
            self.check("compiled", run(compiled(function)), plain)

    def compare_sentences(self) -> None:
        """One argument is made wrong."""
        name, argument = self.name, random.choice(list(self.arguments))
        a = self.arguments = {**self.arguments, argument: wrong(self.arguments[argument])}
        reductions = [{}]
        if "reduction" in a and argument not in ("reduction", "normalizer", "min_normalizer"):
            a = {k: v for k, v in a.items() if k not in ("normalizer", "min_normalizer")}
            means = () if name.startswith("dense_") else ("mean",)
            reductions = [{"reduction": r} for r in ("none", "sum", *means)]
        is_elsewhere = any(isinstance(t, Tensor) and t.is_meta for t in pytree.tree_leaves(a))
        said: dict[str, str] = {}
        for reduction in reductions:
            these = {**a, **reduction}
            with_it = "".join(f", {r}" for r in reduction.values())
            first = outcome_of(lambda t=these: results_of(getattr(focalops, name), t))
            said[f"cpu{with_it}"] = short(first)
            with emulated_cuda():
                said[f"cuda-emulated{with_it}"] = short(
                    outcome_of(lambda t=these: results_of(getattr(focalops, name), t))
                )
            if not is_elsewhere and name not in DYNAMIC:
                said[f"meta{with_it}"] = short(
                    outcome_of(lambda t=these: results_of(getattr(focalops, name), on_meta(t)))
                )
        (path, expected), *others = said.items()
        for other, sentence in others:
            # Only the CPU looks at the numbers in a tensor.
            is_known = other.startswith("cpu") or not re.search(OF_NUMBERS, expected)
            if sentence != expected and is_known:
                self.add(f"wrong {argument}, {other}", f"says {sentence!r}, {path} {expected!r}")
                return
        if isinstance(first, Said) and not is_a_sentence(first, self.arguments):
            self.add(
                f"wrong {argument}",
                f"is refused in other words than a sentence that names it: {first}",
            )


def is_a_sentence(said: Said, arguments: Arguments) -> bool:
    names = [*arguments, "labels", "scores"]  # of targets (labels, scores)
    return (
        said.is_usual and "\n" not in said.sentence and any(name in said.sentence for name in names)
    )


def short(outcome: Outcome) -> str:
    """What was said, but for what depends on the device."""
    return (
        outcome.sentence.replace("on meta like", "on cpu like")
        if isinstance(outcome, Said)
        else "nothing"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first round")
    parser.add_argument("--compile", type=float, default=0.02, help="share of compiled rounds")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    options = parser.parse_args(arguments)
    end, seed, report, done = time.monotonic() + options.seconds, options.seed, Report(), Counter[str]()  # fmt: skip
    while True:
        random.seed(seed)
        torch.manual_seed(seed)
        name = options.only[seed % len(options.only)]
        this = Round(report, seed, name, MAKERS[name]())
        if name in MODULES:
            this.compare_modules()
        elif random.random() < 0.25:
            this.compare_sentences()
        else:
            this.compare_paths(options.compile)
        done[name] += 1
        seed += 1
        if time.monotonic() >= end:
            break
    print(f"{sum(done.values()):,} rounds of {len(done)} functions, {sum(report.found.values())} differences of {len(report.found)} kinds")  # fmt: skip
    return 1 if report.found else 0


if __name__ == "__main__":
    sys.exit(main())
