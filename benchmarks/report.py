"""Writes the tables of README.md and docs/ from the committed records, and draws the chart of speeds: `make report`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness import OURS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHART = RESULTS / "speed.png"
RIVAL = "torchvision"  # of the chart
# A part of a page that is written here: <!-- report --> has every record of results/, <!-- report ops/ --> those of
# results/ops/, and <!-- report: OP, WORDS OF THE SIZE; ... --> of the first record just these rows.
PART = re.compile(
    r"(<!-- report(?: (?P<folder>\S+/))?(?:: (?P<rows>[^>]+))? -->\n).*?(<!-- /report -->)",
    re.DOTALL,
)


def main() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        written = PART.sub(lambda part: f"{part[1]}{tables(part)}\n{part[4]}", text)
        if written != text:
            page.write_text(written)
    draw(results()[0], CHART)


def tables(part: re.Match[str]) -> str:
    records = results(part["folder"] or "")
    if part["rows"] is None:
        return "\n\n".join(table(record) for record in records)
    chosen = [row_of(records[0], choice) for choice in part["rows"].split(";")]
    return table({**records[0], "rows": chosen}, brief=True)


def results(folder: str = "") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))]


def row_of(record: dict[str, Any], choice: str) -> dict[str, Any]:
    op, *words = (word.strip() for word in choice.split(","))
    for row in record["rows"]:
        if row["op"] == op and all(word in row["size"] for word in words):
            return row
    raise SystemExit(f"no row of the record is of {choice.strip()!r}")


def table(record: dict[str, Any], brief: bool = False) -> str:
    """With `brief` without what needs an explanation."""
    driver = f", driver {record['driver']}" if record["driver"] else ""
    copying = "" if brief else f"; copying runs at {record['copy_gb_per_s']:.1f} GB/s"
    figures = ["focalops, ms"] if brief else ["focalops, ms", "of copy", "extra MB"]
    columns = slower_columns(record["rows"])
    header = ["", "size", *figures, *(f"{name}: times slower" for name in columns)]
    lines = [
        f"{record['device']}{driver}, torch {record['torch']}, {record['date']}, "
        f"commit {record['commit']}{copying}:",
        "",
        "| " + " | ".join(header) + " |",
        "|---|---|" + "--:|" * (len(header) - 2),
    ]
    for row in record["rows"]:
        ours = row["timings"][OURS]
        cells = [row["op"], row["size"], f"{ours['median_ms']:.2f}"]
        if not brief:
            cells += [f"{ours['of_copy']:.2f}", f"{ours['peak_extra_mb']:.1f}"]
        cells += [cell(row) for cell in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def slower_columns(rows: list[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """A column a rival; of more than two other packages one column has all, by name."""
    names = [name for row in rows for name in (*row["timings"], *row["failures"])]
    known = dict.fromkeys(name for name in names if name != OURS)
    references = [name for name in ("reference, compiled", "reference") if name in known]
    others = [name for name in known if name not in references]

    def all_others(row: dict[str, Any]) -> str:
        return "; ".join(f"{name} {slower(row, name)}" for name in others if slower(row, name))

    def of(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: slower(row, name)

    if len(others) > 2:
        return {"others": all_others} | {name: of(name) for name in references}
    return {name: of(name) for name in (*others, *references)}


def slower(row: dict[str, Any], rival: str) -> str:
    if timing := row["timings"].get(rival):
        return f"{timing['median_ms'] / row['timings'][OURS]['median_ms']:.1f}"
    return row["failures"].get(rival, "")


def draw(record: dict[str, Any], path: Path) -> None:
    """How many times as long torchvision takes, and the best that torch.compile makes of it or of the reference; the first
    size of each op."""
    rows: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        if RIVAL in row["timings"]:
            rows.setdefault(row["op"], row)
    places = range(len(rows))
    figure = Figure(figsize=(9, 0.5 * len(rows) + 1.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, offset in ((RIVAL, 0.19), ("the best of torch.compile", -0.19)):
        values = [slowness(row, name) for row in rows.values()]
        bars = axes.barh([place - offset for place in places], values, height=0.36, label=name)
        labels = [f"{value:.0f} x" if value else "" for value in values]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    names = [f"{op}\n{row['size']}" for op, row in rows.items()]
    axes.set_yticks(places, names, fontsize=8)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(1, 400))
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.set_xlabel("time over that of focalops (logarithmic)")
    axes.legend(fontsize=8, loc="lower right")
    title = f"{record['device']}, torch {record['torch']}, {record['date']}"
    axes.set_title(f"{title}: median times", fontsize=10)
    figure.savefig(path)


def slowness(row: dict[str, Any], name: str) -> float:
    """0 where it was not measured."""
    timings = row["timings"]
    names = [name] if name == RIVAL else [rival for rival in timings if "compiled" in rival]
    times = [timings[rival]["median_ms"] for rival in names]
    return min(times, default=0) / timings[OURS]["median_ms"]


if __name__ == "__main__":
    main()
