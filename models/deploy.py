"""A detector as it is deployed: a batch of images in, padded detections out, nothing else.

The transform at the front of torchvision's detectors resizes image by image on the host, and what they return
is as long as the detections are many. A StaticDetector takes and returns tensors of static shapes, so that the whole
model compiles to one graph, exports with a dynamic batch and image size, runs from C++ without Python
(models/cpp), and is captured in a CUDA graph. Where the model resizes its images the size of the batch depends on
theirs: `StaticDetector.prepare` resizes before the graph, as models/cpp does, and the graph gives the boxes in pixels of
the images as they were.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .detector import Detector
from .structures import PaddedDetections

Run = Callable[..., PaddedDetections]  # of what StaticDetector.prepare returns


class StaticDetector(nn.Module):
    """The detections of a Detector for images that lie in one tensor, padded as by focalops.detect.

    In half precision, `detector.bfloat16()`, so are the convolutions; anchors, boxes and scores stay float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model
        for name in ("mean", "std"):
            values = torch.tensor(getattr(model.config, f"image_{name}")).view(3, 1, 1)
            self.register_buffer(name, values.to(next(model.parameters()).device))
        self.eval()

    @property
    def size_limits(self) -> tuple[int, int] | None:
        """What the shorter and at most the longer side are resized to; None: images keep their size."""
        config = self.model.config
        if config.min_size is None:
            return None
        sizes = config.min_size if isinstance(config.min_size, tuple) else (config.min_size,)
        return sizes[-1], config.max_size

    @property
    def metadata(self) -> dict[str, str]:
        """What a program that runs the package has to know of the images that it takes."""
        limits = dict(zip(("min_size", "max_size"), self.size_limits or (), strict=False))
        numbers = {"size_divisor": self.model.config.batch_divisor, **limits}
        return {name: str(number) for name, number in numbers.items()}

    def to_batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images (3, H_i, W_i) in one tensor (B, 3, H, W), and their sizes (B, 2): what the detector takes."""
        divisor = self.model.config.batch_divisor
        sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.float32)
        height, width = (-(-int(extent) // divisor) * divisor for extent in sizes.amax(dim=0))
        batch = images[0].new_zeros((len(images), 3, height, width))
        for at, image in zip(batch, images, strict=True):
            at[:, : image.shape[1], : image.shape[2]] = image
        return batch, sizes.to(batch.device)

    def prepare(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """What the deployed forms take: of images (B, 3, H, W) and their sizes (B, 2) the resized images, padded
        to one size, their sizes, and the sizes that they had; or just the first two where nothing is resized.

        Raises:
            ValueError: an image is so thin that nothing is left of it.
        """
        if self.size_limits is None:
            return images, sizes
        least, most = self.size_limits
        resized = []
        for image, (height, width) in zip(images, sizes.long().tolist(), strict=True):
            scale = min(least / min(height, width), most / max(height, width))
            size = [math.floor(height * scale), math.floor(width * scale)]
            if min(size) < 1:
                raise ValueError(f"an image of {width} x {height} pixels is too thin to be resized")
            whole = image[None, :, :height, :width]
            resized.append(F.interpolate(whole, size, mode="bilinear", align_corners=False)[0])
        return *self.to_batch(resized), sizes

    def forward(
        self,
        images: Tensor,  # (B, 3, H, W) in 0..1, each image in the upper left; H, W: multiples of batch_divisor
        sizes: Tensor,  # (B, 2) float32, their heights and widths
        original_sizes: Tensor
        | None = None,  # (B, 2), before `prepare`, which is called if there are none
    ) -> PaddedDetections:
        if original_sizes is None and self.size_limits is not None:
            images, sizes, original_sizes = self.prepare(images, sizes)
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device)[:, None] < sizes[:, :1, None]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:, None]
        normalised = (images - self.mean) / self.std
        batch = torch.where((rows & columns)[:, None], normalised, 0)
        outputs, anchors = self.model.outputs(batch)
        boxes, scores, labels, counts = self.model.padded_detections(outputs, anchors, sizes)
        if original_sizes is not None:
            boxes = boxes * (original_sizes / sizes).flip(1).repeat(1, 2)[:, None]
        return boxes, scores, labels, counts


@torch.no_grad()
def export(detector: StaticDetector, images: Tensor, sizes: Tensor) -> torch.export.ExportedProgram:
    """The detector as a graph of torch's and focalops' ops, for any batch and image size.

    It takes what `detector.prepare` returns. The example should have two images or more: torch.export takes
    a dimension of 1 for a constant.
    """
    batch = torch.export.Dim("batch")
    config = detector.model.config
    of_images = {0: batch}
    if not config.letterbox:  # then every batch has one size
        for dimension, name in ((2, "height"), (3, "width")):
            of_images[dimension] = config.batch_divisor * torch.export.Dim(name)
    inputs = detector.prepare(images, sizes)
    of_sizes = [{0: batch}] * (len(inputs) - 1)
    return torch.export.export(detector, inputs, dynamic_shapes=(of_images, *of_sizes))


def package(
    program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str] | None = None
) -> Run:
    """Compiles the program by AOTInductor into a file ending in .pt2, and loads it.

    models/cpp runs such a file without Python, and makes its batch by `metadata`, the detector's; in Python
    `torch._inductor.aoti_load_package` loads it once focalops is imported.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(whole),
            inductor_configs={"aot_inductor.metadata": metadata or {}},
        )
        os.replace(whole, path)
    return torch._inductor.aoti_load_package(str(path))


@torch.no_grad()
def capture(run: Run, *inputs: Tensor) -> Run:
    """A CUDA graph of it: one launch for inputs of these shapes. The detections are overwritten by the next."""
    held = [tensor.clone() for tensor in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # cuDNN chooses its algorithms, lazily loaded kernels are loaded
            run(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        detections = run(*held)

    def replay(*new: Tensor) -> PaddedDetections:
        for tensor, value in zip(held, new, strict=True):
            tensor.copy_(value)
        graph.replay()
        return detections

    return replay


def forms(detector: StaticDetector, images: Tensor, sizes: Tensor, path: Path) -> dict[str, Run]:
    """Every way to run the detector on what its `prepare` returns; the package is written to the path."""
    program = export(detector, images, sizes)
    ways: dict[str, Run] = {
        "eager": detector,
        "torch.compile": torch.compile(detector, fullgraph=True),
        "torch.export": program.module(),
        "AOTInductor": package(program, path, detector.metadata),
    }
    if images.is_cuda:
        inputs = detector.prepare(images, sizes)
        ways["CUDA graph"] = capture(detector, *inputs)
        ways["CUDA graph of torch.compile"] = capture(ways["torch.compile"], *inputs)
    return ways


@torch.no_grad()
def milliseconds(run: Run, *inputs: Tensor, rounds: int = 5) -> float:
    """The least of several, after one that is not timed."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run(*inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
    return min(times[1:])


def disagreement(found: PaddedDetections, expected: PaddedDetections) -> str | None:
    """How the detections differ by more than the rounding of the convolutions; None: they do not.

    Convolutions that round otherwise may exchange detections of nearly equal score, so that each expected
    detection may be found at another place.
    """
    boxes, scores, labels, counts = found
    for i, count in enumerate(expected[3].tolist()):
        if int(counts[i]) != count:
            return f"image {i} has {int(counts[i])} detections, not {count}"
        same = (
            ((boxes[i, :count, None] - expected[0][i, None, :count]).abs() < 0.5).all(dim=-1)
            & ((scores[i, :count, None] - expected[1][i, None, :count]).abs() < 1e-3)
            & (labels[i, :count, None] == expected[2][i, None, :count])
        )
        missing = int((~same.any(dim=0)).sum())
        if missing:
            return f"image {i} lacks {missing} of {count} detections"
    return None
