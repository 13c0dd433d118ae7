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
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from focalops.info import describe

from .config import BOX_LOSSES
from .data import CocoDataset, DataError, Id
from .detectors import create
from .draw import save_figure
from .efficientdet import SCALES, EfficientDetConfig
from .evaluate import category_ids, check_truth, compare, detect_all
from .measures import THIRDS, ap_of_thirds, loss_times, thirds
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
    weighs: bool = (
        False  # whether it is about rare and frequent samples, and losses that take their time
    )
    trades: bool = False  # whether it is about speed against accuracy


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
    """PISA's figures are of RetinaNet with R50 on COCO as mmdet has them, those of noisy anchors its authors'; EQL's and EQLv2's
    of Mask R-CNN with R50 on LVIS 1.0 as the latter's authors have them, and EFL's of its own pipeline there."""
    weightings = {
        "none": None,
        "isr": None,
        "isr_n": None,
        "carl": None,
        "pisa": "36.9 (none 35.6)",
        "cleanliness": "38.6 (none 36.5)",
        "unified": None,
        "unified_mean": None,
    }
    losses = {
        "eql": "18.6, rare 2.1 (none 16.1, 0.0)",
        "eqlv2": "23.7, rare 14.9 (none 16.1, 0.0)",
        "efl": "29.2",
    }
    variants = [
        Variant(name, with_model(recipe, weighting=name), papers_ap)
        for name, papers_ap in weightings.items()
    ]
    if recipe.model.num_classes > 1:  # they balance classes
        variants += [
            Variant(name, with_model(recipe, classification_loss=name), papers_ap)
            for name, papers_ap in losses.items()
        ]
    return variants


def assigner_variants(recipe: Recipe) -> list[Variant]:
    """ATSS' figures are of its table 1, a RetinaNet of one anchor a position with and without it, as is FCOS'; those of quality focal
    loss of Generalized Focal Loss' table on ATSS, TOOD's are of its whole, and SimOTA's of YOLOX' table 2."""
    papers = {
        ("iou", "focal"): 37.0,
        ("iou", "quality"): None,
        ("atss", "focal"): 39.3,
        ("atss", "quality"): "39.9 (focal 39.2)",
        ("fcos", "focal"): "37.8 (with its head)",
        ("simota", "quality"): "47.3 (before it 45.0; YOLOX)",
        ("task_aligned", "quality"): "42.5 (with its head)",
    }
    return [
        Variant(
            f"{assigner}, {loss}",
            with_model(recipe, assigner=assigner, classification_loss=loss),
            papers_ap,
        )
        for (assigner, loss), papers_ap in papers.items()
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
        "PISA, Noisy Anchors; COCO. EQL, EQLv2, EFL; LVIS",
        weighting_variants,
        weighs=True,
    ),
    "assigner": Study(
        "Which anchors should learn a box?",
        "ATSS, GFL, TOOD: R50; YOLOX; COCO",
        assigner_variants,
    ),
    "scale": Study(
        "How large should images be?",
        "R50, 400 to 800 pixels, COCO test-dev",
        scale_variants,
        trades=True,
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
    known = recipe
    if study.weighs:
        known = with_model(recipe, class_frequencies=data.class_frequencies())
    variants = study.variants(known)
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
    if study.weighs and len(ids) >= len(THIRDS):
        record["images of rare and common classes"] = bounds_of_thirds(data)
    claim_folder(out)
    for seed in range(seeds):
        for variant in variants:
            runs = record["runs"].setdefault(variant.name, {})
            if str(seed) not in runs:
                seeded = dataclasses.replace(variant.recipe, seed=seed)
                print(f"{name}: {variant.name}, seed {seed}")
                figures = _run(study, seeded, data, val, ids, out, device, pretrained)
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


def bounds_of_thirds(data: CocoDataset) -> list[int]:
    """The largest numbers of images of a rare class and of a common one."""
    frequencies = data.class_frequencies()
    rare, common, _ = thirds(frequencies).values()
    return [round(max(frequencies[n] for n in labels) * len(data)) for labels in (rare, common)]


def _run(
    study: Study,
    recipe: Recipe,
    data: CocoDataset,
    val: CocoDataset,
    ids: Sequence[Id | None],
    out: Path,
    device: str,
    pretrained: bool,
) -> dict[str, float]:
    start = time.perf_counter()
    has_thirds = study.weighs and len(ids) >= len(THIRDS)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix="run-") as scratch:
            checkpoint = Path(scratch, "checkpoint.pt")
            model = train(recipe, data, checkpoint, device=device, pretrained=pretrained)
    except TrainingDiverged:
        minutes = round((time.perf_counter() - start) / 60, 2)
        figures = (*FIGURES, *(f"AP_{name}" for name in THIRDS if has_thirds))
        return dict.fromkeys(figures, 0.0) | {"train_minutes": minutes, "diverged": True}
    trained = time.perf_counter()
    results = detect_all(model, recipe, ids, val) or []
    end = time.perf_counter()
    evaluation = compare(val.coco, results, recipe.max_detections)
    evaluation.summarize()
    return {
        **evaluation.figures(),
        **(ap_of_thirds(evaluation, ids, data.class_frequencies()) if has_thirds else {}),
        **(loss_times(model, recipe, data, device) if study.weighs else {}),
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
    all_runs = [run for runs in record["runs"].values() for run in runs.values()]
    minutes = sum(run["train_minutes"] for run in all_runs)
    recipe = record["recipe"]
    compared = any(variant.papers_ap is not None for variant in papers.values())
    bounds = record.get("images of rare and common classes")
    figures = ["AP", "AP50", *(f"AP_{name}" for name in THIRDS if bounds)]
    columns = [*(figure.replace("_", ", ") for figure in figures), "seconds an image"]
    columns += ["parameters", "multiply-adds"] * study.costs
    columns += ["loss, ms", "of the step"] * study.weighs
    columns += ["paper, AP"] * compared
    columns += ["paper, parameters", "paper, multiply-adds"] * study.costs
    of_thirds = (
        " Rare, common and frequent are the thirds of the classes by the number of training images that have one: at most "
        f"{bounds[0]}, at most {bounds[1]}, more."
        if bounds
        else ""
    )
    of_times = " The loss and the step are timed with their gradients, without the optimizer."
    lines = [
        f"**{study.question}** {record['device']}, torch {record['torch']}, {record['date']}, commit "
        f"{record['commit']}: {recipe['steps']} steps of {recipe['batch_size']} images of "
        f"{record['train']}, {seeds} seeds, evaluated on {record['val']}; {minutes:.0f} minutes of "
        f"training. Mean ± standard deviation, in %; the time of an image is that of the quickest run. The paper: {study.paper}.{of_thirds}{of_times * study.weighs}",
        "",
        f"| | {' | '.join(columns)} |",
        "|---|" + "--:|" * len(columns),
    ]
    for name, runs in record["runs"].items():
        cells = [name]
        diverged = sum(run["diverged"] for run in runs.values())
        if diverged:
            cells[0] += f" (diverged with {diverged} of {len(runs)} seeds)"
        for figure in figures:
            known = {seed: run for seed, run in runs.items() if figure in run}
            if not known:  # an older record
                cells.append("")
                continue
            mean, spread = mean_and_spread(known, figure)
            of_seeds = f" ± {100 * spread:.1f}" if len(known) > 1 else ""
            cells.append(f"{100 * mean:.1f}{of_seeds}")
        times = [run["seconds_an_image"] for run in runs.values() if not run["diverged"]]
        cells.append(seconds(min(times)) if times else "")
        if study.costs:
            cells += cost_cells(cost_of(runs))
        if study.weighs:
            cells += loss_cells(runs)
        if compared:
            papers_ap = papers[name].papers_ap if name in papers else None
            cells.append("" if papers_ap is None else str(papers_ap))
        if study.costs:
            cells += cost_cells(papers[name].papers_cost if name in papers else None)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def loss_cells(runs: dict[str, dict[str, float]]) -> list[str]:
    """Of the quickest run: what else the machine does adds to the others."""
    timed = [run for run in runs.values() if "loss_seconds" in run]
    if not timed:
        return ["", ""]
    loss, step = (min(run[name] for run in timed) for name in ("loss_seconds", "step_seconds"))
    return [f"{1000 * loss:.1f}", f"{100 * loss / step:.1f} %"]


def seconds(time: float) -> str:
    return f"{time:.2f}" if time >= 1 else f"{time:.3f}"


def cost_of(runs: dict[str, dict[str, float]]) -> Cost:
    """The same with every seed."""
    run = next(iter(runs.values()))
    return Cost(run["parameters"], run["multiply_adds"])


def cost_cells(cost: Cost | None) -> list[str]:
    return ["", ""] if cost is None else [f"{cost.parameters:.1f} M", f"{cost.multiply_adds:.2g} G"]


def draw(path: Path, study: Study, record: dict[str, Any], papers: dict[str, Variant]) -> None:
    """AP50 and AP of each variant, and AP of rare to frequent classes, beside the paper's AP where it has one."""
    names = list(record["runs"])
    all_runs = [run for runs in record["runs"].values() for run in runs.values()]
    measures = ["AP50", "AP", *(f"AP_{name}" for name in THIRDS)]
    places = list(range(len(names)))[::-1]
    compared = {
        name: variant.papers_ap for name, variant in papers.items() if variant.papers_ap is not None
    }
    width = 14 if study.trades else 10
    figure = Figure(figsize=(width, 1.6 + 0.42 * len(names)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    left, *right = figure.subfigures(
        1, 1 + study.trades, squeeze=False, width_ratios=(2, 1)[: 1 + study.trades]
    )[0]
    for part in right:
        draw_speeds(part.subplots(), record)
    ours, *theirs = left.subplots(1, 2 if compared else 1, sharey=True, squeeze=False)[0]
    for color, measure in zip(("C0", "C1", "C3", "C4", "C5"), measures, strict=True):
        if not all(measure in run for run in all_runs):
            continue
        figures = [mean_and_spread(record["runs"][name], measure) for name in names]
        means, spreads = (
            [100 * value for value in values] for values in zip(*figures, strict=True)
        )
        ours.errorbar(
            means,
            places,
            xerr=spreads,
            fmt="o",
            color=color,
            capsize=3,
            label=measure.replace("_", ", "),
        )
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
        axes.set(title=textwrap.fill(f"paper, AP ({study.paper})", 52))
        if not axes.lines:
            axes.set_xticks([])
    for axes in (ours, *theirs):
        axes.grid(alpha=0.3)
    figure.suptitle(study.question)
    save_figure(path, figure)


def draw_speeds(axes: Axes, record: dict[str, Any]) -> None:
    """AP over the time of an image."""
    for name, runs in record["runs"].items():
        time = 1000 * min(run["seconds_an_image"] for run in runs.values())
        mean, spread = (100 * value for value in mean_and_spread(runs, "AP"))
        axes.errorbar(time, mean, yerr=spread, fmt="o", color="C1", capsize=3)
        axes.annotate(name, (time, mean), xytext=(5, 4), textcoords="offset points")
    axes.margins(x=0.2, y=0.2)
    axes.set(xlim=(0, None), ylim=(0, None), title="here, AP over ms an image")
    axes.grid(alpha=0.3)


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
