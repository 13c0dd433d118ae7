"""The emulation of CUDA itself: planted faults are caught and named, sound kernels pass, streams take turns."""

import os
import re
import subprocess
from pathlib import Path

import cuda_emulation
import pytest
import torch
from cuda_emulation import build

FAULTS = Path(__file__).parent / "cuda_emulation" / "faults.cu"
RACE = r"race on {0} memory 0x[0-9a-f]+: this thread {1} what thread \(\d+, 0, 0\) of block"

# Each fault in a variant that catches it, and what is said about it.
CAUGHT = [
    ("reads_past_the_end", "sanitized", "heap-buffer-overflow"),
    ("reads_misaligned", "watched", "misaligned access to 16 bytes"),
    ("reads_misaligned", "sanitized", "misaligned address .* requires 16 byte alignment"),
    ("shifts_too_far", "sanitized", "shift exponent 32 is too large"),
    ("indexes_past_an_array", "sanitized", "index 64 out of bounds"),
    ("reads_beyond_dynamic_shared", "watched", "beyond the dynamic shared memory"),
    ("reads_beyond_dynamic_shared", "sanitized", "use-after-poison"),
    ("reads_unwritten_shared", "watched", "read of shared memory that nobody in the block has"),
    ("misses_a_barrier", "watched", RACE.format("shared", "writes")),
    ("misses_a_warp_barrier", "watched", RACE.format("shared", "writes")),
    ("misses_a_fence", "watched", RACE.format("global", "reads")),
    ("threads_race", "watched", RACE.format("global", "writes")),
    ("blocks_race", "watched", RACE.format("global", "writes")),
    ("streams_share_scratch", "watched", "writes what another stream's kernel writes"),
    ("is_not_in_its_mask", "watched", "called by lane 16, which is not in the mask 0xffff"),
    ("brings_different_masks", "watched", "threads 16 to 31 wait at __ballot_sync"),
    ("shuffles_from_nobody", "watched", "reads a lane that takes no part"),
    ("diverges_at_a_barrier", "watched", "threads 32 to 63 exited"),
    ("waits_at_two_barriers", "watched", "threads 32 to 63 wait at __syncthreads"),
    ("waits_for_another_block", "watched", "the thread does not end"),
    ("depends_on_the_order", "watched", "three orders, three results"),
]


def run_fault(name: str, variant: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run(
        [build.executable(variant, "faults.cu"), name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(("name", "variant", "said"), CAUGHT)
def test_a_planted_fault_is_caught_and_named(name, variant, said):
    done = run_fault(name, variant)
    assert done.returncode != 0
    assert re.search(said, done.stderr), done.stderr
    if name == "depends_on_the_order":
        return  # the whole of its result shows it, no place in it
    line = 1 + FAULTS.read_text()[: FAULTS.read_text().index(f"// fault: {name}")].count("\n")
    assert f"faults.cu:{line}" in done.stderr, done.stderr
    kernel = {"misses_a_fence": "last_block_sums<false>", "streams_share_scratch": "uses_scratch"}
    assert f"{kernel.get(name, name)}(" in done.stderr.splitlines()[-1], done.stderr
    assert re.search(r"block \(\d+, 0, 0\)", done.stderr.splitlines()[-2]), done.stderr


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_sound_kernels_pass(variant):
    done = run_fault("sound", variant)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_not_emulated_does_not_compile(tmp_path):
    source = tmp_path / "cooperative.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n__global__ void f(float* x) { atomicAdd(x, 1.0f); }\n"
    )
    done = subprocess.run(
        [*build.COMPILE, "-fsyntax-only", source], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "atomicAdd" in done.stderr


def test_every_op_has_a_cuda_kernel():
    with cuda_emulation.emulated_cuda():
        schemas = {schema.name for schema in torch._C._jit_get_all_schemas()}
    ops = {name.split("::")[1] for name in schemas if name.startswith("focalops_emulated::")}
    assert ops == set(cuda_emulation.ops())


def calls():
    """Ops that need scratch memory or several launches, each with inputs of its own."""
    ops = torch.ops.focalops_emulated
    corners = torch.rand(700, 2) * 100
    boxes = torch.cat((corners, corners + torch.rand(700, 2) * 30), dim=1)
    logits, targets = torch.randn(300, 33), torch.randint(0, 34, (300,))
    scores, classes = torch.rand(700), torch.randint(0, 3, (700,))
    return [
        lambda: ops.nms(boxes, scores, classes, 0.4),
        lambda: ops.match_anchors(boxes, boxes[:90].reshape(3, 30, 4), None, 0.5, 0.4, 1),
        lambda: ops.sigmoid_focal_loss_sum(logits, targets, 0.25, 2.0, None, -100, None, 1.0, True),
    ]


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("j", range(3))
def test_two_streams_do_not_see_each_other(i, j):
    with cuda_emulation.emulated_cuda():
        first, second = calls()[i], calls()[j]
        alone = [first(), second()]
        together = cuda_emulation.interleave(first, second)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize("i", range(3))
def test_a_gpu_that_the_build_has_no_kernels_for(i):
    """The sentence is the same whether an op asks for the occupancy first or launches."""
    library = cuda_emulation.library()
    with cuda_emulation.emulated_cuda():
        call = calls()[i]
        library.focalops_emulation_set_kernel_images(False)
        try:
            with pytest.raises(RuntimeError, match="was not compiled for this GPU"):
                call()
        finally:
            library.focalops_emulation_set_kernel_images(True)
        call()
