"""Where the loss goes: the paper's figure 4 (Lin et al., 2017)."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from focalops.info import describe

from .data import TrainingStream, collate
from .detector import Detector
from .draw import save_figure
from .losses import IGNORED
from .losses.classification import rows_of
from .outputs import write_whole

DISTRIBUTION = "distribution"
GAMMAS = (0.0, 0.5, 1.0, 2.0)


@torch.no_grad()
def probabilities_of_the_truth(
    model: Detector, stream: TrainingStream, images: int, device: str
) -> tuple[Tensor, Tensor]:
    """p_t of the positive and of the negative logits of `images` samples, float32 on the CPU."""
    model.train()  # the anchors' targets are found only there
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    positives, negatives = [], []
    for index in range(images):
        batch, targets = collate([stream[index]])
        transformed, resized = model.transform(
            [image.to(device) for image in batch],
            [{name: value.to(device) for name, value in t.items()} for t in targets],
        )
        outputs, anchors = model.outputs(transformed.tensors)
        classes = model.loss_step.match(outputs, anchors, resized).classes[0]
        rows = rows_of(outputs.cls_logits, model.config.num_classes)[0]
        kept = classes != IGNORED
        truth = classes[kept, None] == torch.arange(rows.shape[1], device=rows.device)
        p = rows[kept].float().sigmoid()
        positives.append(p[truth].cpu())
        negatives.append(1 - p[~truth].cpu())
    model.eval()
    return torch.cat(positives), torch.cat(negatives)


def cumulative_share(p_t: Tensor, gamma: float) -> Tensor:
    """The share of the focal loss that the easiest 0, 1, ..., 1000 thousandths of the samples have."""
    losses = -((1 - p_t.double()) ** gamma) * p_t.double().clamp(min=1e-12).log()
    sums = torch.cat((losses.new_zeros(1), losses.sort().values.cumsum(0)))
    places = torch.linspace(0, len(losses), 1001).round().long()
    return sums[places] / sums[-1].clamp(min=1e-300)


def run_distribution(
    model: Detector, stream: TrainingStream, out: Path, source: str, images: int, device: str
) -> Path:
    """DISTRIBUTION.md and .png; the paper reads from its figure that the hardest fifth of the positives
    has about half of their loss whatever gamma is, and that with gamma 2 nearly all of the negatives'
    loss comes from a small fraction of them."""
    positives, negatives = probabilities_of_the_truth(model, stream, images, device)
    rows = []
    for gamma in GAMMAS:
        of_positives = cumulative_share(positives, gamma)
        of_negatives = cumulative_share(negatives, gamma)
        rows.append(
            f"| {gamma:g} | {100 * (1 - of_positives[800]):.0f} % | "
            f"{100 * (1 - of_negatives[990]):.0f} % | {100 * (1 - of_negatives[999]):.0f} % |"
        )
    table, where = out / f"{DISTRIBUTION}.md", describe(torch.device(device))
    write_whole(
        table,
        f"**Where does the loss go?** {source}: {len(positives):,} positive and {len(negatives):,} "
        f"negative logits of {images} samples; {where['device']}, {where['date']}.\n\n"
        "| gamma | of the positives' loss, the hardest fifth has | of the negatives', the hardest "
        "1 % | the hardest 0.1 % |\n|--:|--:|--:|--:|\n" + "\n".join(rows) + "\n",
    )
    draw(out / f"{DISTRIBUTION}.png", positives, negatives, f"{source} (the paper's figure 4)")
    return table


def draw(path: Path, positives: Tensor, negatives: Tensor, source: str) -> None:
    """The cumulative share of the loss by gamma, of p_t of the positive and of the negative logits."""
    figure = Figure(figsize=(10, 4.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    share = torch.linspace(0, 1, 1001)
    axes_of = figure.subplots(1, 2)
    for axes, what, p_t in zip(
        axes_of, ("positive", "negative"), (positives, negatives), strict=True
    ):
        for gamma in GAMMAS:
            axes.plot(share, cumulative_share(p_t, gamma), label=f"gamma = {gamma:g}")
        axes.set(
            xlabel=f"share of the {what}s, easiest first", ylabel="share of their loss", ylim=(0, 1)
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Cumulative normalised loss, {source}")
    save_figure(path, figure)
