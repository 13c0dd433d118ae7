"""More logits than 2^31: 16 images of 201,600 anchors and 1,203 classes, where all but the last lie in memory that is not there.

The tensors are a reservation of addresses. The kernels write the gradient over the logits, so that only what they touch takes
memory: of the CUDA kernels, which are emulated, the last blocks; of the CPU's all, but nearly all addresses are the same
few megabytes.
"""

import ctypes
import mmap
import os
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from cuda_emulation import last_blocks
from ptx import executing, no_ptx_reason
from torch import Tensor

from focalops import sigmoid_focal_loss

IMAGES, ANCHORS, POSITIONS, CLASSES = 16, 9, (160, 140), 1203
ROWS = IMAGES * ANCHORS * 160 * 140
SIZE = ROWS * CLASSES * 2  # bfloat16
TAIL = 32  # rows whose gradient is looked at
NORESERVE = 0x4000


def untouched_logits() -> Tensor:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return torch.frombuffer(mmap.mmap(-1, SIZE, flags=flags), dtype=torch.bfloat16)


def repeated_logits() -> Tensor:
    """The same 64 MB again and again, and memory of its own at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    logits = untouched_logits()
    piece = 2**26
    file = os.memfd_create("logits")
    os.ftruncate(file, piece)
    fixed, read_write = 0x10, mmap.PROT_READ | mmap.PROT_WRITE
    for begin in range(0, SIZE - 2 * piece, piece):
        address = logits.data_ptr() + begin
        mapped = libc.mmap(address, piece, read_write, mmap.MAP_SHARED | fixed, file, 0)
        assert mapped == address, os.strerror(ctypes.get_errno())
    os.close(file)
    return logits


def labels_of_tail() -> Tensor:
    labels = torch.full((ROWS,), CLASSES, dtype=torch.int32)
    labels[-TAIL:] = torch.randint(0, CLASSES + 1, (TAIL,))
    labels[-3] = -100
    return labels


BACKENDS = ["cpu", "cuda-emulated", *["cuda-ptx"] * (no_ptx_reason() is None)]


def kernels_of(backend: str) -> AbstractContextManager[None]:
    return executing() if backend == "cuda-ptx" else nullcontext()


def expected_gradient(tail: Tensor, labels: Tensor) -> Tensor:
    x = tail.clone().requires_grad_()
    loss = sigmoid_focal_loss(x, labels[-TAIL:], reduction="sum")
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows(backend):
    logits = (repeated_logits() if backend == "cpu" else untouched_logits()).view(ROWS, CLASSES)
    assert logits.numel() > 2**31 and logits.numel() == 3_880_396_800
    tail, labels = logits[-TAIL:], labels_of_tail()
    tail.copy_(torch.randn(TAIL, CLASSES) * 4)
    expected = expected_gradient(tail, labels)
    arguments = (logits, labels, 0.25, 2.0, None, -100, None, 1.0)
    if backend == "cpu":
        assert torch.ops.focalops._sigmoid_focal_loss_sum_(*arguments).isfinite()
    else:
        count = 1 + TAIL * CLASSES // 8192  # a block: 256 threads x 4 vectors of 8
        with kernels_of(backend), last_blocks(count) as ops:
            ops._sigmoid_focal_loss_sum_(*arguments)
    torch.testing.assert_close(tail[-20:], expected[-20:], rtol=2**-7, atol=1e-30)
    assert (tail[-3] == 0).all() and expected.abs().sum() > 0


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_levels(backend, layout):
    flat = repeated_logits() if backend == "cpu" else untouched_logits()
    shape = IMAGES, *POSITIONS, ANCHORS * CLASSES
    if layout == "rows":
        logits = flat.view(shape).permute(0, 3, 1, 2)
    else:
        logits = flat.view(shape[0], shape[3], *POSITIONS)
    # The last positions of the last anchor, in the last 16 classes of the last image.
    tail = logits[-1, -16:, -1, -TAIL:]
    tail.copy_(torch.randn(tail.shape) * 4)
    labels = labels_of_tail().view(IMAGES, -1)
    of_anchor = labels[-1].view(-1, ANCHORS)[-TAIL:, -1]
    of_anchor.copy_(torch.randint(CLASSES - 16, CLASSES + 1, (TAIL,)))
    of_anchor[-3] = -100
    within = torch.where(of_anchor < 0, of_anchor, of_anchor - (CLASSES - 16))  # 16: background
    x = tail.t().clone().requires_grad_()
    loss = sigmoid_focal_loss(x, within, reduction="sum")
    (expected,) = torch.autograd.grad(loss, x)
    arguments = ([logits], labels, 0.25, 2.0, 0.0, None, None, -100, None, 1.0)
    if backend == "cpu":
        assert torch.ops.focalops._dense_focal_loss_(*arguments).isfinite()
    else:
        # Rows: TAIL positions of 9 anchors. Planes: a thread has 8 positions of 16 classes, and the
        # last slice of the last anchor lies in the last 2,800 of them.
        count = 2 + TAIL * ANCHORS * CLASSES // 8192 if layout == "rows" else 12
        with kernels_of(backend), last_blocks(count) as ops:
            ops._dense_focal_loss_(*arguments)
    torch.testing.assert_close(tail.t(), expected, rtol=2**-7, atol=1e-30)
    assert (tail[:, -3] == 0).all() and expected.abs().sum() > 0
