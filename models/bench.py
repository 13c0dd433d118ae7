"""Where the time of a detector goes, beside the package with the same model and weights where there is one."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contestants import TORCHVISIONS, Contestant, WithPyramid, contestants
from .recipes import PRECISIONS
from .structures import Detections

BENCH_MODELS = TORCHVISIONS
STEP = ("forward", "loss", "backward")
PHASES = (*STEP, "post-process", "inference")
OF_EFFICIENTDET = ("soft NMS", "BiFPN")
Figures = dict[str, dict[str, float]]  # phase -> implementation -> milliseconds


class Outcome(NamedTuple):
    """What the implementations must agree on."""

    loss: float
    detections: int
    scores: float  # the sum of the detections'


def bench(
    name: str,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    num_classes: int,
    size: tuple[int, int],
    device: str,
    precision: str,
    rounds: int,
) -> tuple[Figures, Figures]:
    """The least time of each phase over the rounds, in which all take turns, and the GiB of a training step: what it
    keeps for the backward pass, and on a GPU its peak.

    `forward` is the images' transform, the backbone and the heads, with the copies that torchvision
    makes of their outputs; `loss` is anchors, matching, losses and their backward as far as the heads'
    outputs; `backward` is the rest of it; `post-process` is from the heads' outputs to detections; `inference`
    is from images to detections. Of an EfficientDet beside effdet's, `soft NMS` is post-process with gaussian
    soft NMS, and `BiFPN` the part of forward and backward that is the pyramid's.
    """
    torch.manual_seed(0)
    autocast = functools.partial(
        torch.autocast,
        torch.device(device).type,
        PRECISIONS[precision],
        enabled=precision != "float32",
    )
    all_of_them = contestants(name, images, num_classes, size)
    figures: Figures = {}
    memory: Figures = {}
    outcomes: dict[str, Outcome] = {}
    for _ in range(rounds):
        for implementation, contestant in all_of_them.items():
            timed = functools.partial(_timed, figures, implementation, device)
            with autocast():
                outcomes[implementation], peak = _round(contestant, images, targets, timed)
            if peak is not None:
                memory.setdefault("peak memory", {})[implementation] = peak
    for implementation, contestant in all_of_them.items():
        with autocast():
            kept = _kept_for_backward(contestant, images, targets)
        memory.setdefault("kept memory", {})[implementation] = kept
    _check(outcomes)
    return figures, memory


def _round(
    contestant: Contestant,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    timed: Callable[[str, Callable[[], Any]], Any],
) -> tuple[Outcome, float | None]:
    """What came out, and the peak GiB of the training step on a GPU."""
    on_gpu, model = images[0].is_cuda, contestant.model
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def loss() -> Tensor:
        total = contestant.loss(leaves)
        total.backward()
        return total

    model.train()
    outputs = timed("forward", lambda: contestant.forward(images, targets))
    leaves = [_leaf(output) for output in outputs]
    total = timed("loss", loss)
    gradients = [leaf.grad for leaf in leaves]
    timed("backward", lambda: torch.autograd.backward(outputs, gradients))
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    if isinstance(contestant, WithPyramid):
        _pyramid(contestant, timed)
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        found: list[Detections] = timed("post-process", lambda: contestant.detections(leaves))
        if isinstance(contestant, WithPyramid):
            found = found + timed("soft NMS", lambda: contestant.detections(leaves, soft=True))
        timed("inference", lambda: contestant.inference(images))
    count = sum(len(of_image["boxes"]) for of_image in found)
    scores = sum(of_image["scores"].sum().item() for of_image in found)
    return Outcome(total.item(), count, scores), peak


def _pyramid(contestant: WithPyramid, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
    with torch.no_grad():
        features = contestant.features()
    features = [_leaf(feature) for feature in features]

    def run() -> None:
        outputs = contestant.pyramid(features)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    timed("BiFPN", run)


def _leaf(output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _kept_for_backward(
    contestant: Contestant, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> float:
    """GiB of what the graph of a training step holds until its backward pass, the weights among it."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    contestant.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contestant.loss(contestant.forward(images, targets))
    return sum(storages.values()) / 2**30


def _timed(
    figures: Figures, implementation: str, device: str, phase: str, run: Callable[[], Any]
) -> Any:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    milliseconds = (time.perf_counter() - start) * 1000
    of_phase = figures.setdefault(phase, {})
    of_phase[implementation] = min(of_phase.get(implementation, milliseconds), milliseconds)
    return result


def _check(outcomes: dict[str, Outcome]) -> None:
    """RuntimeError where losses, or the sums of the detections' scores, are more than a hundredth apart."""
    (_, first), *others = outcomes.items()
    for _, other in others:
        if (
            abs(other.loss - first.loss) > 0.01 * abs(first.loss)
            or abs(other.detections - first.detections) > 0.01 * first.detections + 3
            or abs(other.scores - first.scores) > 0.01 * first.scores
        ):
            raise RuntimeError(f"{' and '.join(outcomes)} must agree: {first} and {other}")


def table(figures: Figures, memory: Figures) -> str:
    """A column for each implementation, and how many times faster, or smaller, ours is where there are two."""
    names = list(figures["loss"])
    order = [*PHASES, *(phase for phase in OF_EFFICIENTDET if phase in figures)]
    rows = {phase: figures[phase] for phase in order}
    rows["training step"] = {name: sum(figures[phase][name] for phase in STEP) for name in names}

    def line(what: str, values: dict[str, float], form: str, unit: str) -> str:
        cells = "".join(f"{values[name]:{form}} {unit}" for name in names)
        ratio = f"{values[names[0]] / values['focalops']:8.2f}" if names[1:] else ""
        return f"{what:14}{cells}{ratio}"

    lines = ["".join([f"{'':14}", *(f"{n:>14}" for n in names), f"{'ratio':>8}" * len(names[1:])])]
    lines += [line(phase, times, "11.1f", "ms") for phase, times in rows.items()]
    if "BiFPN" in figures:
        shares = (
            figures["BiFPN"][n] / (figures["forward"][n] + figures["backward"][n]) for n in names
        )
        lines.append(f"{'BiFPN, share':14}" + "".join(f"{100 * share:12.0f} %" for share in shares))
    lines += [line(what, sizes, "10.3f", "GiB") for what, sizes in memory.items()]
    return "\n".join(lines)
