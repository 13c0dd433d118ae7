"""The papers' studies as commands: python -m models study NAME.

Lin et al., "Focal Loss for Dense Object Detection", 2017, compare losses, anchors and image scales on
COCO; Tan et al., "EfficientDet: Scalable and Efficient Object Detection", 2020, ways to fuse features and
sizes of a whole detector. Each study here trains the variants of one comparison with several seeds on any
data set and puts them in a table and a picture beside the paper's own figures. A run that is done is kept
in the record, so that an interrupted study goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from focalops.info import describe

from .config import BOX_LOSSES
from .data import CocoDataset, DataError, Id, TrainingStream, collate
from .detector import Detector
from .detectors import create
from .draw import save_figure
from .efficientdet import SCALES, EfficientDetConfig
from .evaluate import category_ids, check_truth, detect_all, evaluate
from .losses import IGNORED
from .losses.classification import rows_of
from .outputs import claim, claim_folder, write_whole
from .recipes import Recipe, with_model
from .train import TrainingDiverged, train

FIGURES = ("AP", "AP50", "AP75")
ASPECT_RATIOS = {1: (1.0,), 2: (0.5, 2.0), 3: (0.5, 1.0, 2.0)}


class Cost(NamedTuple):
    parameters: float  # millions
    multiply_adds: float  # billions: of the convolutions, for one image


@dataclass(frozen=True)
class Variant:
    name: str
    recipe: Recipe
    papers_ap: float | str | None = None  # where the paper has no figure for it: None
    papers_cost: Cost | None = None


@dataclass(frozen=True)
class Study:
    question: str
    paper: str  # what it trained, or what it has instead of a figure for each variant
    variants: Callable[[Recipe], list[Variant]]
    recipe: str | None = None  # the default in place of the data's
    costs: bool = False  # whether it is about what a variant costs


def loss_variants(recipe: Recipe) -> list[Variant]:
    def focal(gamma: float, alpha: float, prior: float = 0.01) -> Recipe:
        return with_model(
            recipe,
            classification_loss="focal",
            gamma=gamma,
            alpha=alpha,
            prior_probability=prior,
        )

    star = {"classification_loss": "focal_star", "alpha": 0.25}
    return [
        Variant("CE", focal(0, -1), 30.2),
        Variant("CE, no prior", focal(0, -1, prior=0.5), "diverges"),
        Variant("balanced CE, alpha .75", focal(0, 0.75), 31.1),
        Variant("FL, gamma .5, alpha .5", focal(0.5, 0.5), 32.9),
        Variant("FL, gamma 1, alpha .25", focal(1, 0.25), 33.7),
        Variant("FL, gamma 2, alpha .25", focal(2, 0.25), 34.0),
        Variant("FL, gamma 2, no prior", focal(2, 0.25, prior=0.5)),
        Variant("FL, gamma 5, alpha .25", focal(5, 0.25), 32.2),
        Variant("FL*, gamma 2, beta 1", with_model(recipe, **star, gamma=2.0, beta=1.0), 33.8),
        Variant("FL*, gamma 4, beta 0", with_model(recipe, **star, gamma=4.0, beta=0.0), 33.9),
        Variant("OHEM", with_model(recipe, classification_loss="ohem"), "32.8 (R101; FL 36.0)"),
        Variant("hinge", with_model(recipe, classification_loss="hinge"), "unstable"),
    ]


def anchor_variants(recipe: Recipe) -> list[Variant]:
    """Scales spread evenly over what the recipe's cover on each level."""
    papers = {(1, 1): 30.3, (3, 3): 34.0}
    variants = []
    for scales, ratios in ((1, 1), (2, 1), (3, 1), (1, 3), (2, 3), (3, 3)):
        sizes = tuple(spread(min(level), max(level), scales) for level in recipe.model.anchor_sizes)
        variants.append(
            Variant(
                f"{scales} x {ratios}",
                with_model(recipe, anchor_sizes=sizes, aspect_ratios=ASPECT_RATIOS[ratios]),
                papers.get((scales, ratios)),
            )
        )
    return variants


def spread(low: float, high: float, count: int) -> tuple[int, ...]:
    """Numbers evenly apart in the logarithm, the ends among them; one: the middle."""
    if count == 1:
        return (round(math.sqrt(low * high)),)
    return tuple(round(low * (high / low) ** (i / (count - 1))) for i in range(count))


def box_loss_variants(recipe: Recipe) -> list[Variant]:
    return [Variant(loss, with_model(recipe, box_loss=loss)) for loss in BOX_LOSSES]


def weighting_variants(recipe: Recipe) -> list[Variant]:
    """Of RetinaNet with R50, PISA's figures as mmdet has them, those of noisy anchors as their authors do."""
    papers = {
        "none": None,
        "isr": None,
        "carl": None,
        "pisa": "36.9 (none 35.6)",
        "cleanliness": "38.6 (none 36.5)",
    }
    return [
        Variant(weighting, with_model(recipe, weighting=weighting), papers_ap)
        for weighting, papers_ap in papers.items()
    ]


def scale_variants(recipe: Recipe) -> list[Variant]:
    """Images resized so much that 1 is what the recipe has; training and detection alike."""
    papers = {0.5: 30.5, 0.625: 32.5, 0.75: 34.3, 0.875: 35.1, 1.0: 35.7}  # 400 .. 800 pixels
    variants = []
    for scale, papers_ap in papers.items():
        if recipe.crop is None:
            sizes = recipe.model.min_size or min(800, recipe.model.max_size)
            resized = with_model(
                recipe,
                min_size=tuple(round(size * scale) for size in sizes)
                if isinstance(sizes, tuple)
                else round(sizes * scale),
                max_size=round(recipe.model.max_size * scale),
            )
        else:  # windows as large as the crops, so that one size serves both
            resized = dataclasses.replace(
                with_model(recipe, min_size=round(recipe.crop * scale)),
                window=recipe.crop,
                window_overlap=recipe.crop // 4,
            )
        variants.append(Variant(f"{scale:g}", resized, papers_ap))
    return variants


def fusion_variants(recipe: Recipe) -> list[Variant]:
    """The paper's tables 5, whose BiFPN without weights is a sum, and 6, of three detectors."""
    check_efficientdet(recipe)
    papers = {
        "softmax": "33.96, 43.78, 48.79",
        "fast": "33.85, 43.77, 48.74; 1.26 to 1.31 times as fast as softmax",
        "sum": "43.94 (fast 44.39)",
        "unbounded": None,
    }
    return [
        Variant(fusion, with_model(recipe, fusion=fusion), papers_ap)
        for fusion, papers_ap in papers.items()
    ]


def scaling_variants(recipe: Recipe) -> list[Variant]:
    """The first three published sizes, or lite's, their images as much smaller as the recipe's are than the first's."""
    model = check_efficientdet(recipe)
    if not model.letterbox:
        raise ValueError("letterbox must be true to scale the images with the model, got False")
    family = "lite" if "efficientnet_lite" in model.backbone else "d"
    papers = {  # table 2
        0: (34.6, Cost(3.9, 2.5)),
        1: (40.5, Cost(6.6, 6.1)),
        2: (43.9, Cost(8.1, 11)),
    }
    variants = []
    for phi, (papers_ap, papers_cost) in papers.items():
        scale = SCALES[f"{family}{phi}"]
        size = 32 * round(model.max_size * scale.size / SCALES[f"{family}0"].size / 32)
        scaled = with_model(
            recipe,
            backbone=re.sub(
                r"efficientnet_[^.]+", f"efficientnet_{scale.backbone}", model.backbone
            ),
            pyramid_channels=scale.pyramid_channels,
            cells=scale.cells,
            head_depth=scale.head_depth,
            min_size=size,
            max_size=size,
        )
        name = f"phi {phi}: {scale.backbone}, {size} pixels"
        variants.append(Variant(name, scaled, papers_ap, papers_cost))
    return variants


def check_efficientdet(recipe: Recipe) -> EfficientDetConfig:
    if not isinstance(recipe.model, EfficientDetConfig):
        raise ValueError(
            f"the recipe's model must be an EfficientDet for this study, got {recipe.model.kind}"
        )
    return recipe.model


SEEDS = "seeds"
STUDIES = {
    "loss": Study("Which classification loss?", "R50, 600 pixels, COCO minival", loss_variants),
    "anchors": Study(
        "How many anchors at a position (scales x aspect ratios)?",
        "R50, 600 pixels, COCO minival",
        anchor_variants,
    ),
    "box_loss": Study("Which box loss?", "smooth L1 alone", box_loss_variants),
    "weighting": Study(
        "Which anchors should count more?",
        "PISA, Noisy Anchors; COCO",
        weighting_variants,
    ),
    "scale": Study(
        "How large should images be?", "R50, 400 to 800 pixels, COCO test-dev", scale_variants
    ),
    "fusion": Study(
        "How should a pyramid's features be fused?",
        "tables 5 and 6, COCO val",
        fusion_variants,
        recipe="efficientdet_trees",
    ),
    "scaling": Study(
        "What does a larger model on larger images bring?",
        "D0 to D2, 512 to 768 pixels, COCO test-dev",
        scaling_variants,
        recipe="efficientdet_small",
        costs=True,
    ),
    SEEDS: Study(
        "How far apart are the seeds?",
        "one seed",
        lambda recipe: [Variant("the recipe", recipe)],
    ),
}
DISTRIBUTION = "distribution"


# ---- Running ------------------------------------------------------------------------------------


def run_study(
    name: str,
    recipe: Recipe,
    data: CocoDataset,
    val: CocoDataset,
    out: Path,
    *,
    seeds: int = 3,
    device: str = "cpu",
    pretrained: bool = True,
    overwrite: bool = False,
) -> Path:
    """Trains what the record does not hold yet; writes NAME.json, NAME.md and NAME.png. Returns the table."""
    study = STUDIES[name]
    if name != SEEDS:  # the paper compares detections of one view
        recipe = dataclasses.replace(recipe, symmetries=False)
    variants = study.variants(recipe)
    check_truth(val)
    ids = category_ids(data.categories, val)
    record_file = out / f"{name}.json"
    settings = {
        "study": name,
        "recipe": recipe.to_dict(),
        "train": _name(data),
        "val": _name(val),
        "pair of annotation files": [_digest(data), _digest(val)],
        "start of the backbone": "ImageNet" if pretrained else "random",
    }
    table, picture = out / f"{name}.md", out / f"{name}.png"
    if not record_file.exists():  # else they are the record's own
        claim([record_file, table, picture], overwrite=overwrite)
    record = _open_record(record_file, settings, device)
    claim_folder(out)
    for seed in range(seeds):
        for variant in variants:
            runs = record["runs"].setdefault(variant.name, {})
            if str(seed) not in runs:
                seeded = dataclasses.replace(variant.recipe, seed=seed)
                print(f"{name}: {variant.name}, seed {seed}")
                figures = _run(seeded, data, val, ids, out, device, pretrained)
                runs[str(seed)] = figures | (cost(seeded)._asdict() if study.costs else {})
                write_whole(record_file, json.dumps(record, indent=1) + "\n")
    papers = {variant.name: variant for variant in variants}
    write_whole(table, to_table(study, record, papers))
    (draw_costs if study.costs else draw)(picture, study, record, papers)
    return table


def _name(data: CocoDataset) -> str:
    """Such as trees/train, or coco/instances_train2017."""
    *_, folder, annotations, file = data.annotation_file.absolute().parts
    return f"{folder if annotations == 'annotations' else annotations}/{Path(file).stem}"


def _digest(data: CocoDataset) -> str:
    """Of the annotation file: other data may have its name."""
    return hashlib.sha256(data.annotation_file.read_bytes()).hexdigest()


def _open_record(path: Path, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """The runs so far; an older record says less of them, and goes on where nothing contradicts it."""
    settings = json.loads(json.dumps(settings))  # tuples as lists
    if not path.exists():
        return {**settings, **describe(torch.device(device)), "runs": {}}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        runs = record["runs"]
        if "recipe" in record:  # as it is written today
            recipe = Recipe.from_dict(record["recipe"])
            record["recipe"] = json.loads(json.dumps(recipe.to_dict()))
        is_record = all(key in run for r in runs.values() for run in r.values() for key in FIGURES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_record = False
    if not is_record:
        raise DataError(f"{path} is no record of a study: choose another --out")
    changed = [key for key, value in settings.items() if record.get(key, value) != value]
    if changed:
        raise ValueError(
            f"{path} holds runs of another {' and '.join(changed)}: choose another --out"
        )
    return record


def _run(
    recipe: Recipe,
    data: CocoDataset,
    val: CocoDataset,
    ids: Sequence[Id | None],
    out: Path,
    device: str,
    pretrained: bool,
) -> dict[str, float]:
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix="run-") as scratch:
            checkpoint = Path(scratch, "checkpoint.pt")
            model = train(recipe, data, checkpoint, device=device, pretrained=pretrained)
    except TrainingDiverged:
        minutes = round((time.perf_counter() - start) / 60, 2)
        return dict.fromkeys(FIGURES, 0.0) | {"train_minutes": minutes, "diverged": True}
    trained = time.perf_counter()
    results = detect_all(model, recipe, ids, val) or []
    end = time.perf_counter()
    return {
        **evaluate(val.coco, results, recipe.max_detections),
        "train_minutes": round((trained - start) / 60, 2),
        "seconds_an_image": round((end - trained) / len(val), 4),
        "diverged": False,
    }


def cost(recipe: Recipe) -> Cost:
    """Of the model, on an image that fills the square of its letterbox."""
    size = recipe.model.max_size
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = create(recipe.model).eval()
        before = counter.get_total_flops()  # constructors look at what their backbones give
        model.network(torch.zeros(1, 3, size, size))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters / 1e6, (counter.get_total_flops() - before) / 2 / 1e9)


# ---- Table and picture --------------------------------------------------------------------------


def mean_and_spread(runs: dict[str, dict[str, float]], figure: str) -> tuple[float, float]:
    """Over the seeds; the spread is the sample's standard deviation."""
    values = [run[figure] for run in runs.values()]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def to_table(study: Study, record: dict[str, Any], papers: dict[str, Variant]) -> str:
    seeds = max(len(runs) for runs in record["runs"].values())
    minutes = sum(run["train_minutes"] for runs in record["runs"].values() for run in runs.values())
    recipe = record["recipe"]
    compared = any(variant.papers_ap is not None for variant in papers.values())
    lines = [
        f"**{study.question}** {record['device']}, torch {record['torch']}, {record['date']}, commit "
        f"{record['commit']}: {recipe['steps']} steps of {recipe['batch_size']} images of "
        f"{record['train']}, {seeds} seeds, evaluated on {record['val']}; {minutes:.0f} minutes of "
        f"training. Mean ± standard deviation, in %. The paper: {study.paper}.",
        "",
        "| | AP | AP50 | seconds an image |"
        + " parameters | multiply-adds |" * study.costs
        + " paper, AP |" * compared
        + " paper, parameters | paper, multiply-adds |" * study.costs,
        "|---|--:|--:|--:|" + "--:|" * (4 * study.costs + compared),
    ]
    for name, runs in record["runs"].items():
        cells = [name]
        diverged = sum(run["diverged"] for run in runs.values())
        if diverged:
            cells[0] += f" (diverged with {diverged} of {len(runs)} seeds)"
        for figure in ("AP", "AP50"):
            mean, spread = mean_and_spread(runs, figure)
            of_seeds = f" ± {100 * spread:.1f}" if len(runs) > 1 else ""
            cells.append(f"{100 * mean:.1f}{of_seeds}")
        times = [run["seconds_an_image"] for run in runs.values() if not run["diverged"]]
        cells.append(seconds(statistics.mean(times)) if times else "")
        if study.costs:
            cells += cost_cells(cost_of(runs))
        if compared:
            papers_ap = papers[name].papers_ap if name in papers else None
            cells.append("" if papers_ap is None else str(papers_ap))
        if study.costs:
            cells += cost_cells(papers[name].papers_cost if name in papers else None)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def seconds(time: float) -> str:
    return f"{time:.2f}" if time >= 1 else f"{time:.3f}"


def cost_of(runs: dict[str, dict[str, float]]) -> Cost:
    """The same with every seed."""
    run = next(iter(runs.values()))
    return Cost(run["parameters"], run["multiply_adds"])


def cost_cells(cost: Cost | None) -> list[str]:
    return ["", ""] if cost is None else [f"{cost.parameters:.1f} M", f"{cost.multiply_adds:.2g} G"]


def draw(path: Path, study: Study, record: dict[str, Any], papers: dict[str, Variant]) -> None:
    """AP50 and AP of each variant, beside the paper's AP where it has one."""
    names = list(record["runs"])
    places = list(range(len(names)))[::-1]
    compared = {
        name: variant.papers_ap for name, variant in papers.items() if variant.papers_ap is not None
    }
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(names)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    ours, *theirs = figure.subplots(1, 2 if compared else 1, sharey=True, squeeze=False)[0]
    for color, measure in (("C0", "AP50"), ("C1", "AP")):
        figures = [mean_and_spread(record["runs"][name], measure) for name in names]
        means, spreads = (
            [100 * value for value in values] for values in zip(*figures, strict=True)
        )
        ours.errorbar(means, places, xerr=spreads, fmt="o", color=color, capsize=3, label=measure)
    ours.set(yticks=places, yticklabels=names, xlim=(0, None), title=f"here ({record['val']})")
    ours.legend()
    for axes in theirs:
        for name, value in compared.items():
            place = places[names.index(name)]
            if isinstance(value, str):
                left = axes.get_yaxis_transform()  # x as a share of the width
                axes.text(0.04, place, value, va="center", fontsize=9, transform=left)
            else:
                axes.plot(value, place, "s", color="C2")
        axes.set(title=f"paper, AP ({study.paper})")
        if not axes.lines:
            axes.set_xticks([])
    for axes in (ours, *theirs):
        axes.grid(alpha=0.3)
    figure.suptitle(study.question)
    save_figure(path, figure)


def draw_costs(
    path: Path, study: Study, record: dict[str, Any], papers: dict[str, Variant]
) -> None:
    """AP50 and AP over the multiply-adds of an image, beside the paper's."""
    figure = Figure(figsize=(10, 4.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    ours, theirs = figure.subplots(1, 2)
    runs = record["runs"]
    costs = [cost_of(of_variant).multiply_adds for of_variant in runs.values()]
    for color, measure in (("C0", "AP50"), ("C1", "AP")):
        figures = [mean_and_spread(of_variant, measure) for of_variant in runs.values()]
        means, spreads = (
            [100 * value for value in values] for values in zip(*figures, strict=True)
        )
        ours.errorbar(costs, means, yerr=spreads, fmt="o-", color=color, capsize=3, label=measure)
    for name, place, height in zip(runs, costs, means, strict=True):
        label(ours, name.partition(":")[0], place, height)
    ours.set(title=f"here ({record['val']})", ylabel="%", ylim=(0, None))
    ours.legend()
    known = {name: v for name, v in papers.items() if v.papers_cost is not None}
    places = [v.papers_cost.multiply_adds for v in known.values() if v.papers_cost is not None]
    heights = [float(v.papers_ap or 0) for v in known.values()]
    theirs.plot(places, heights, "s-", color="C2")
    for name, place, height in zip(known, places, heights, strict=True):
        label(theirs, name.partition(":")[0], place, height)
    theirs.set(title=f"paper, AP ({study.paper})")
    for axes, ticks in ((ours, costs), (theirs, places)):
        axes.set(xscale="log", xlabel="multiply-adds of an image, billions")
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.15, y=0.15)
        axes.grid(alpha=0.3)
    figure.suptitle(study.question)
    save_figure(path, figure)


def label(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(0, -14), textcoords="offset points", ha="center")


# ---- Where the loss goes (the paper's figure 4) --------------------------------------------------

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
    rows, curves = [], {}
    for gamma in GAMMAS:
        of_positives = cumulative_share(positives, gamma)
        of_negatives = cumulative_share(negatives, gamma)
        curves[gamma] = (of_positives, of_negatives)
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
    figure = Figure(figsize=(10, 4.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    share = torch.linspace(0, 1, 1001)
    for column, (axes, what) in enumerate(
        zip(figure.subplots(1, 2), ("positive", "negative"), strict=True)
    ):
        for gamma in GAMMAS:
            axes.plot(share, curves[gamma][column], label=f"gamma = {gamma:g}")
        axes.set(
            xlabel=f"share of the {what}s, easiest first", ylabel="share of their loss", ylim=(0, 1)
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Cumulative normalised loss, {source} (the paper's figure 4)")
    save_figure(out / f"{DISTRIBUTION}.png", figure)
    return table
