"""The training loop."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, overload, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .checkpoint import load_checkpoint, load_weights, save_checkpoint
from .data import CocoDataset, DataError, TrainingStream, collate, mix
from .data.jitter import ScaleJitter
from .detector import Detector
from .detectors import create
from .distributed import rank, share_buffers, world_size
from .optimization import (
    average_of,
    build_optimizers,
    lr_factor,
    network_parameters,
    synchronised,
)
from .outputs import write_whole
from .ranges import check, whole
from .recipes import PRECISIONS, Recipe
from .resume import check_same_run, fingerprint
from .run_folder import BEST
from .structures import Target
from .validation import Validation

Sample = tuple[Tensor, Target]
Batch = tuple[list[Tensor], list[Target]]


def train(
    recipe: Recipe,
    data: CocoDataset,
    checkpoint_file: Path,
    *,
    device: str = "cpu",
    pretrained: bool = True,
    initialise: Callable[[Detector], None] | None = None,  # gives a new run other weights
    resume: bool = False,
    workers: int = 0,
    checkpoint_every: int = 1000,
    log: Callable[[int, dict[str, float]], None] | None = None,  # gets every step's figures
    saved: Callable[[int, Detector], None] | None = None,  # gets the evaluation model after a save
    validation: Validation | None = None,  # its best model goes to BEST beside checkpoint_file
    begin: Callable[[], None]
    | None = None,  # called before anything is written, after a first step
) -> Detector:
    """Trains, writes checkpoint_file now and then and at the end, returns the evaluation model.

    Under torchrun every process takes its share of each batch. What a step computes depends on the
    recipe, the data and the number of processes alone, so that an interrupted run, resumed, ends
    with the weights of an uninterrupted one. A first SIGINT or SIGTERM ends the step and saves.

    Raises:
        TrainingInterrupted: after saving.
        TrainingDiverged: the loss was not finite; the last checkpoint is as it was.
        DataError: an image cannot be read, a checkpoint not written, or the run to resume is
            another one.
    """
    check("checkpoint_every", checkpoint_every, whole(1))
    kind = torch.device(device).type
    synchronises = recipe.sync_batch_norm and world_size() > 1
    if synchronises and kind == "cpu":  # torch has it for GPUs alone
        raise ValueError(f"sync_batch_norm must be false for several processes on {kind}, got True")
    torch.manual_seed(recipe.seed)
    model = create(recipe.model, pretrained_backbone=pretrained and not resume)
    if initialise is not None and not resume:
        initialise(model)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = average_of(recipe, model)
    evaluation_model = model if average is None else cast(Detector, average.module)
    optimizers = build_optimizers(recipe, model)
    optimizer = optimizers["optimizer"]
    scaler = torch.amp.GradScaler(kind, enabled=recipe.precision == "float16")
    modules: dict[str, nn.Module] = {"model": model}
    if average is not None:
        modules["average"] = average
    others: dict[str, Resumable] = {
        name: part
        for name, part in (("validation", validation), ("log", log))
        if isinstance(part, Resumable)
    }

    constant = {
        "recipe": recipe.to_dict(),
        "categories": data.categories,
        "world_size": world_size(),
        "data": fingerprint(data),
    }
    start, kept = 0, {}
    if resume:
        checkpoint = load_checkpoint(checkpoint_file)
        check_same_run(checkpoint_file, checkpoint, recipe, constant, data.annotation_file)
        restore(checkpoint_file, checkpoint, modules, optimizers, scaler)
        start = checkpoint["step"]
        restore_others(checkpoint_file, checkpoint, others)
        if validation is None and "validation" in checkpoint:
            kept["validation"] = checkpoint["validation"]  # of BEST, which stays

    stream = training_stream(recipe, data)
    shares = Batches(recipe, start, rank(), world_size())
    loader = DataLoader(
        ErrorsAsSamples(stream),
        batch_sampler=shares,  # type: ignore[arg-type]
        collate_fn=collate_unless_error,
        num_workers=workers,
        pin_memory=kind == "cuda",
        generator=torch.Generator(),  # of its own, or it draws a seed from the global one
        worker_init_fn=ignore_interrupt,
    )

    def save(done: int, file: Path) -> None:
        if not all(p.isfinite().all() for p in model.parameters()):
            raise not_finite(recipe, stream, shares, done - 1, checkpoint_file)
        if rank() == 0:
            parts: dict[str, Any] = {**modules, **optimizers, "scaler": scaler, **others}
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(file, {**kept, **states, "step": done, **constant})

    def finish(done: int, figures: dict[str, float], stop: bool = False) -> None:
        """Evaluates, logs and saves what is due after a step."""
        best = False
        if validation is not None and not stop and validation.due(done, recipe.steps):
            share_buffers(evaluation_model)
            best = validation(done, evaluation_model)
            figures = figures | validation.figures
            model.train()
        if log is not None and rank() == 0 and figures:
            log(done, figures)
        if best:
            save(done, checkpoint_file.with_name(BEST))
        over = done == recipe.steps or (validation is not None and validation.exhausted)
        if stop or over or done % checkpoint_every == 0:
            save(done, checkpoint_file)
            if saved is not None and rank() == 0 and not stop:
                saved(done, evaluation_model.eval())
                model.train()

    if synchronises:
        synchronised(model)
    if recipe.compile:  # not before: the average is a copy to be evaluated
        model.network = torch.compile(model.network)  # type: ignore[method-assign]
        model.loss_step.compile()
    model.train()
    parallel: Any = DistributedDataParallel(model) if world_size() > 1 else model
    samples = iter(loader)
    progress = tqdm(
        total=recipe.steps,
        initial=start,
        desc="train",
        unit="step",
        mininterval=1.0,
        disable=rank() != 0,
    )
    with progress, stop_signals() as stop:
        if start and validation is not None and validation.due(start, recipe.steps):
            finish(start, {})  # the run was interrupted before this evaluation
        for step in range(start, recipe.steps):
            if validation is not None and validation.exhausted:
                break
            torch.manual_seed(mix(recipe.seed, 2, step, rank()))  # sizes are drawn in the model
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * lr_factor(recipe, step)
            report = StepReport(device, stop)
            for piece in range(recipe.accumulate):
                images, targets = to_device(or_raise(next(samples)), device)
                last = piece == recipe.accumulate - 1
                with (
                    contextlib.nullcontext() if last or parallel is model else parallel.no_sync(),
                    torch.autocast(
                        kind, PRECISIONS[recipe.precision], recipe.precision != "float32"
                    ),
                ):
                    losses: dict[str, Tensor] = parallel(images, targets)
                    losses = {name: loss / recipe.accumulate for name, loss in losses.items()}
                    report.add(losses)
                    if last:
                        report.send()
                    scaler.scale(torch.stack([*losses.values()]).sum()).backward()
            figures = report.receive()
            if figures is None:
                raise not_finite(recipe, stream, shares, step, checkpoint_file)
            if recipe.clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network_parameters(model), recipe.clip_norm)
            for each in optimizers.values():
                scaler.step(each)
                each.zero_grad(set_to_none=True)
            scaler.update()
            if average is not None:
                average.update_parameters(model)
            done = step + 1
            progress.update()
            progress.set_postfix(
                {name: f"{value:.3f}" for name, value in figures.items()}
                | speed(progress, recipe.batch_size)
                | memory(device),
                refresh=False,
            )
            interrupted = report.stop_requested and done < recipe.steps
            if begin is not None and step == start and rank() == 0:
                begin()
            finish(
                done,
                {**figures, "learning_rate": optimizer.param_groups[0]["lr"]},
                stop=interrupted,
            )
            if interrupted:
                raise TrainingInterrupted(f"interrupted after step {done} of {recipe.steps}")
    share_buffers(evaluation_model)
    return evaluation_model.eval()


@runtime_checkable
class Resumable(Protocol):
    """What has a state of its own in a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def resume(self, step: int, state: dict[str, Any] | None) -> None: ...


def restore(
    file: Path,
    checkpoint: dict[str, Any],
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
) -> None:
    missing = [n for n in (*modules, *optimizers, "scaler", "step") if n not in checkpoint]
    if missing:
        raise DataError(f"{file} holds no state of training to go on from: it has no {missing[0]}")
    check(f"{file}: its step", checkpoint["step"], whole(0, checkpoint["recipe"].steps))
    for name, module in modules.items():
        load_weights(module, checkpoint[name], file)
    try:
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint[name])
        scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{file} holds another optimizer's state ({error})") from None
    states = [item for optimizer in optimizers.values() for item in optimizer.state.items()]
    for parameter, state in states:
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape not in (parameter.shape, ()):
                raise DataError(
                    f"{file} holds another optimizer's state: {name} must have shape "
                    f"{tuple(parameter.shape)}, got {tuple(value.shape)}"
                )


def training_stream(recipe: Recipe, data: CocoDataset) -> TrainingStream:
    model, factors = recipe.model, recipe.scale_jitter
    return TrainingStream(
        data,
        recipe.steps * recipe.batch_size,
        recipe.seed,
        recipe.crop,
        recipe.crop_zoom,
        recipe.dihedral,
        recipe.photometric,
        ScaleJitter(factors, model.max_size, model.image_mean) if factors else None,
    )


class TrainingStopped(Exception):
    """Training ended before its last step; the message says why and what to do."""


class TrainingInterrupted(TrainingStopped):
    """By a signal; the checkpoint holds the last step. What to do about it, the command knows."""


class TrainingDiverged(TrainingStopped):
    """A loss or a weight was not finite."""


def restore_others(file: Path, checkpoint: dict[str, Any], parts: dict[str, Resumable]) -> None:
    for name, part in parts.items():
        state, fields = checkpoint.get(name), part.state_dict().keys()
        if state is not None and getattr(state, "keys", set)() != fields:
            raise DataError(f"{file} must have {', '.join(fields)} in its {name}")
    for name, part in parts.items():
        part.resume(checkpoint["step"], checkpoint.get(name))


class Batches(Sequence[list[int]]):
    """The samples of a rank from step `start` on, one list a forward pass, made when asked for."""

    def __init__(self, recipe: Recipe, start: int, rank: int, world_size: int) -> None:
        self.size, rest = divmod(recipe.batch_size, world_size * recipe.accumulate)
        if rest or not self.size:
            raise ValueError(
                f"batch_size must be a multiple of {world_size} processes x accumulate "
                f"{recipe.accumulate}, got {recipe.batch_size}"
            )
        self.rank, self.world_size, self.accumulate = rank, world_size, recipe.accumulate
        self.pieces = range(start * recipe.accumulate, recipe.steps * recipe.accumulate)

    def __len__(self) -> int:
        return len(self.pieces)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...

    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        pieces = self.pieces[index]
        return self._of(pieces) if isinstance(pieces, int) else [self._of(p) for p in pieces]

    def of_step(self, step: int) -> list[int]:
        first = step * self.accumulate
        return [n for piece in range(first, first + self.accumulate) for n in self._of(piece)]

    def _of(self, piece: int) -> list[int]:
        first = (piece * self.world_size + self.rank) * self.size
        return list(range(first, first + self.size))


class ErrorsAsSamples(Dataset):
    """Hands the errors of the user's files on: raised in a loading process they would arrive as a
    traceback of that process."""

    def __init__(self, stream: TrainingStream) -> None:
        self.stream = stream

    def __getitem__(self, n: int) -> Sample | DataError | ValueError:
        try:
            return self.stream[n]
        except (DataError, ValueError) as error:
            return error


def collate_unless_error(samples: list[Any]) -> Any:
    errors = [sample for sample in samples if isinstance(sample, Exception)]
    return errors[0] if errors else collate(samples)


def or_raise(batch: Any) -> Batch:
    if isinstance(batch, Exception):
        raise batch
    return cast(Batch, batch)


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the loading processes too, but the main one needs them to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_device(batch: Batch, device: str) -> Batch:
    images, targets = batch
    return [image.to(device, non_blocking=True) for image in images], [
        {name: value.to(device, non_blocking=True) for name, value in target.items()}
        for target in targets
    ]


class StepReport:
    """The losses of a step and whether to stop, the same on every rank.

    They are on their way to the host while the device works on the backward pass, so that reading
    them before the optimizer's step costs a GPU nothing.
    """

    def __init__(self, device: str, stop: list[int]) -> None:
        self.device, self.stop, self.stop_requested = device, stop, False
        self.losses: dict[str, Tensor] = {}
        self.event = torch.cuda.Event() if device.startswith("cuda") else None

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0) + loss.detach().float()

    def send(self) -> None:
        stop = torch.tensor(float(bool(self.stop))).to(self.device, non_blocking=True)
        values = torch.stack([*self.losses.values(), stop])
        if world_size() > 1:  # a loss that is not finite makes the sum so
            torch.distributed.all_reduce(values)
        self.values = values.to("cpu", non_blocking=True)
        if self.event is not None:
            self.event.record()

    def receive(self) -> dict[str, float] | None:
        """The losses, averaged over the ranks; None if one is not finite."""
        if self.event is not None:
            self.event.synchronize()
        *values, stop = self.values.tolist()
        self.stop_requested = stop > 0
        if not all(math.isfinite(value) for value in values):
            return None
        return {name: value / world_size() for name, value in zip(self.losses, values, strict=True)}


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM fills; a second one acts as it usually does."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def not_finite(
    recipe: Recipe,
    stream: TrainingStream,
    shares: Batches,
    step: int,
    checkpoint_file: Path,
) -> TrainingDiverged:
    """The error; writes which images this rank's share of the batch was made of."""
    files = [str(stream.image_path(n)) for n in shares.of_step(step)]
    suffix = f"-rank{rank()}" if world_size() > 1 else ""
    report = checkpoint_file.with_name(f"not-finite{suffix}.json")
    write_whole(report, json.dumps({"step": step + 1, "images": files}, indent=1) + "\n")
    return TrainingDiverged(
        f"the loss or the weights of step {step + 1} are not finite: the images of its batch are named in {report}, "
        "and the last checkpoint is as it was; a lower --learning-rate, a longer --warmup-steps or "
        "--clip-norm helps where the images are in order"
    )


def speed(progress: tqdm, batch_size: int) -> dict[str, str]:
    rate = progress.format_dict["rate"]  # steps a second; None at first
    return {"images/s": f"{rate * batch_size:.1f}"} if rate else {}


def memory(device: str) -> dict[str, str]:
    if not device.startswith("cuda"):
        return {}
    return {"GB": f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}"}


def keep_freed_memory() -> None:
    """Lets glibc's malloc reuse large blocks instead of returning each to the system.

    A training step on a CPU allocates the same hundreds of megabytes again and again; the page
    faults of fresh ones are a fifth of its time. Call it before torch starts its threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)


M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of <malloc.h>
