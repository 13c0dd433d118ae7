"""What share of a copy's bandwidth the instructions of the memory-bound kernels leave room for: counted, not measured.

An op runs on background anchors in the interpreter of PTX (compute capability 9.0), which counts how often warps execute each instruction. Each
is put to the pipe that executes it, as many times as the instructions that ptxas usually makes of it; what it makes of registers and of
parameters costs nothing. Their sum over the numbers that the op reads is what a number costs, and a table of a card's pipes, clock and bandwidth makes
times of both. Nothing here knows of latencies, caches, launches or of how well a kernel fills the card: a share is what the kernel
cannot exceed, if the assumptions hold.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_check import settings
from cuda_emulation import ORDERS
from ptx import compiled_cuda, library

import focalops

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks" / "results" / "throughput.md"


@dataclass(frozen=True)
class Card:
    """Multiprocessors, their clock, how many numbers a pipe of one takes in a clock (NVIDIA's programming guide), and what a copy of
    device memory moves, read plus written."""

    name: str
    multiprocessors: int
    gigahertz: float
    copy_gb_per_s: float
    source: str  # of the copy
    lanes: dict[str, int]


CARDS = [
    Card(
        *("H100 SXM", 132, 1.98, 2573),
        "measured by others with p2pBandwidthLatencyTest, github.com/NVIDIA/nccl/issues/1264",
        {"FMA": 128, "ALU": 64, "XU": 16, "FP64": 64, "LSU": 32},
    ),
    Card(
        *("A100 40 GB", 108, 1.41, 1355),
        "measured by others, github.com/PTsolvers/gpu-workshop-JuliaCon23/issues/7",
        {"FMA": 64, "ALU": 64, "XU": 16, "FP64": 32, "LSU": 32},
    ),
    Card(
        *("RTX 5090", 170, 2.41, 0.9 * 1792),
        "not measured: nine tenths of the 1,792 GB/s of its data sheet",
        {"FMA": 128, "ALU": 64, "XU": 16, "FP64": 2, "LSU": 32},
    ),
]
ISSUED = 4  # instructions of warps, a multiprocessor and clock

# By the opcode of PTX and its types: the pipe, and how many instructions ptxas makes of one. The first that matches counts.
PIPES = [
    (
        r"mov|cvta|ld\.(param|const)|neg|abs|cvt\.[su]64\.[su]32|cvt\.[su]32\.[su]64|cvt\.[su]16.*",
        "none",
        0,
    ),
    (r"(fma|mul|add|sub|div|setp|min|max)\..*f64", "FP64", 1),
    (r"(ex2|lg2|rsqrt)\.approx(?!\.ftz)", "XU scaled", 1),
    (r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|div)\.approx", "XU", 1),
    (r"(div|rcp)\.rn\.f32", "divided", 1),
    (r"cvt\..*f(32|64)\.[su]\d+|cvt\..*[su]\d+\.f|popc|clz|brev|bfind", "XU", 1),
    (r"cvt\.(rn\.)?b?f16.*|cvt\.(rn|sat)\.f32\.f32", "ALU", 1),
    (r"cvt\.f32\.b?f16", "FMA", 1),
    (
        r"(fma|mul|add|sub)\..*f(32|16)|mul\.wide|(mul|mad)\.(lo|hi)\.[su](32|16)|mad\.wide",
        "FMA",
        1,
    ),
    (r"(mul|mad)\.(lo|hi)\.[su]64", "FMA", 3),
    (r"(add|sub|and|or|xor|not|shl|shr|setp\.\w+|selp|min|max)\.[subf]64", "ALU", 2),
    (r"(ld|st|red|atom|shfl).*", "LSU", 1),
    (r"(add|sub|and|or|xor|not|shl|shr|shf|lop3|setp|selp|min|max|prmt|bfe|bfi)\..*", "ALU", 1),
]
SEVERAL = {
    # The range of ex2 and lg2 is scaled where subnormals are kept: a comparison and two products.
    "XU scaled": {"XU": 1, "ALU": 1, "FMA": 2},
    # A quotient that is rounded as IEEE has it: a reciprocal, its refinement, a check and a branch for the rare cases.
    "divided": {"XU": 1, "ALU": 1, "FMA": 5, "other": 1},
}


def cost_of(instruction: str) -> dict[str, int]:
    opcode = re.sub(r"^@!?\S+\s+", "", instruction).split(maxsplit=1)[0].rstrip(";")
    for pattern, pipe, count in PIPES:
        if re.match(rf"(?:{pattern})(?![a-z0-9])", opcode):
            return SEVERAL.get(pipe) or ({pipe: count} if count else {})
    return {"other": 1}


# ---- what runs ----------------------------------------------------------------------------------

CLASSES, ANCHORS, SIDE = 80, 9, 16


def head(dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[list, torch.Tensor]:
    level = torch.randn(1, ANCHORS * CLASSES, SIDE, SIDE).to(dtype) - 4
    level = level.contiguous(memory_format=memory_format).requires_grad_()
    return [level], torch.full((1, ANCHORS * SIDE * SIDE), CLASSES)


@dataclass(frozen=True)
class Case:
    """An op, and what it moves of each number that it is counted by: read plus written, in the numbers' dtype."""

    name: str
    moved: int
    run: Callable[[torch.dtype], int]  # says how many numbers


def focal_rows(dtype: torch.dtype) -> int:
    logits = (torch.randn(2048, CLASSES).to(dtype) - 4).requires_grad_()
    focalops.sigmoid_focal_loss(logits, torch.full((2048,), CLASSES), reduction="sum")
    return logits.numel()


def dense(memory_format: torch.memory_format) -> Callable[[torch.dtype], int]:
    def run(dtype: torch.dtype) -> int:
        levels, labels = head(dtype, memory_format)
        focalops.dense_focal_loss(levels, labels)
        return levels[0].numel()

    return run


def quality(memory_format: torch.memory_format) -> Callable[[torch.dtype], int]:
    def run(dtype: torch.dtype) -> int:
        levels, labels = head(dtype, memory_format)
        scores = torch.zeros(labels.shape)
        focalops.dense_quality_loss(levels, labels, scores, "quality_focal_loss")
        return levels[0].numel()

    return run


def fusion(dtype: torch.dtype) -> int:
    maps = [torch.randn(1, 64, 64, 64).to(dtype) for _ in range(2)]
    focalops.fuse_features(maps, torch.ones(2), activation="silu")
    return maps[0].numel()


PLANES, ROWS = torch.contiguous_format, torch.channels_last
CASES = [
    Case("focal loss of rows, with its gradient", 2, focal_rows),
    Case("focal loss of a head, contiguous, with its gradient", 2, dense(PLANES)),
    Case("focal loss of a head, channels_last, with its gradient", 2, dense(ROWS)),
    Case("quality focal loss of a head, contiguous, with its gradient", 2, quality(PLANES)),
    Case("quality focal loss of a head, channels_last, with its gradient", 2, quality(ROWS)),
    Case("fuse_features of two maps", 3, fusion),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- counting -----------------------------------------------------------------------------------


def executions() -> dict[str, list[tuple[str, int]]]:
    """Of each kernel that was launched so far, its instructions, and how many warps executed each."""
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as file:
        library().focalops_ptx_write_coverage(file.name.encode())
        rows = iter(file.read().splitlines())
    kernels = {}
    for row in rows:
        _, name, count = row.split("\t")
        instructions = [next(rows).split("\t", 2) for _ in range(int(count))]
        if instructions:
            kernels[name] = [(text, int(times)) for times, _, text in instructions]
    return kernels


def cost_of_number(case: Case, dtype: torch.dtype) -> Counter[str]:
    """Instructions of a thread for each number, in the kernel of the run that executes most. The emulation calls an op in every order."""
    before = executions()
    numbers = case.run(dtype)
    costs = []
    for name, instructions in executions().items():
        earlier = before.get(name) or [(text, 0) for text, _ in instructions]
        cost: Counter[str] = Counter()
        for (text, now), (_, then) in zip(instructions, earlier, strict=True):
            for pipe, count in cost_of(text).items():
                cost[pipe] += count * (now - then)
        costs.append(cost)
    most = max(costs, key=Counter.total)
    return Counter({pipe: 32 * count / (numbers * len(ORDERS)) for pipe, count in most.items()})


# ---- the table ----------------------------------------------------------------------------------


def share_of_copy(
    cost: Counter[str], case: Case, dtype: torch.dtype, card: Card
) -> tuple[float, str]:
    """And what pipe limits it; above 1 it is memory that does."""
    clocks = {pipe: 32 * cost[pipe] / lanes for pipe, lanes in card.lanes.items()}  # of 32 numbers
    clocks["issue"] = cost.total() / ISSUED
    limit = max(clocks, key=lambda pipe: clocks[pipe])
    numbers_per_s = 32 * card.multiprocessors * card.gigahertz * 1e9 / clocks[limit]
    share = numbers_per_s * case.moved * dtype.itemsize / (card.copy_gb_per_s * 1e9)
    return share, limit


def table() -> list[str]:
    _, version = settings()["nvcc_for_torch"]()
    explanation = " ".join(__doc__.split("\n\n", 1)[1].split())
    pipes = ["FMA", "ALU", "XU", "LSU", "other"]
    cards = [
        f"- {card.name}: {card.multiprocessors} multiprocessors at {card.gigahertz} GHz, numbers a clock "
        + ", ".join(f"{pipe} {lanes}" for pipe, lanes in card.lanes.items())
        + f"; a copy moves {card.copy_gb_per_s:,.0f} GB/s, {card.source}."
        for card in CARDS
    ]
    lines = [
        f"# Counted, not measured: the bandwidth that the instructions leave room for (nvcc {version})",
        *("", "No GPU has run anything for this table. " + explanation, ""),
        *(*cards, ""),
        "Instructions are those of a thread for each number, by pipe; behind a share stands the pipe that limits it. Above 1 it is memory that does.",
        "",
        f"| | dtype | {' | '.join([*pipes, 'in all', *(card.name for card in CARDS)])} |",
        "|---|---|" + "--:|" * (len(pipes) + 1 + len(CARDS)),
    ]
    for case in CASES:
        for dtype in DTYPES:
            with compiled_cuda():
                cost = cost_of_number(case, dtype)
            cells = [f"{n:.1f}" for n in (*(cost[pipe] for pipe in pipes), cost.total())]
            for card in CARDS:
                share, limit = share_of_copy(cost, case, dtype, card)
                cells.append(f"{share:.2f} ({limit})")
            name = str(dtype).removeprefix("torch.")
            lines.append(f"| {case.name} | {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text = "\n".join(table()) + "\n"
    if arguments.update:
        TABLE.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
