"""Writes the README's table from the committed records: `make report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- report -->", "<!-- /report -->"


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    records = [json.loads(path.read_text()) for path in sorted(results())]
    tables = "\n\n".join(table(record) for record in records)
    readme.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


def results() -> list[Path]:
    return list((ROOT / "benchmarks" / "results").glob("*.json"))


def table(record: dict[str, Any]) -> str:
    driver = f", driver {record['driver']}" if record["driver"] else ""
    rivals = [r for r in ("torchvision", "reference, compiled", "reference") if has(record, r)]
    lines = [
        f"{record['device']}{driver}, torch {record['torch']}, {record['date']}, "
        f"commit {record['commit']}; copying runs at {record['copy_gb_per_s']:.1f} GB/s:",
        "",
        "| | size | focalops, ms | of copy | extra MB | "
        + " | ".join(f"{rival}: times slower" for rival in rivals)
        + " |",
        "|---|---|--:|--:|--:|" + "--:|" * len(rivals),
    ]
    for row in record["rows"]:
        ours = row["timings"][OURS]
        cells = [row["op"], row["size"], f"{ours['median_ms']:.2f}", f"{ours['of_copy']:.2f}"]
        cells.append(f"{ours['peak_extra_mb']:.1f}")
        for rival in rivals:
            if timing := row["timings"].get(rival):
                cells.append(f"{timing['median_ms'] / ours['median_ms']:.1f}")
            else:
                cells.append(row["failures"].get(rival, ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def has(record: dict[str, Any], rival: str) -> bool:
    return any(rival in row["timings"] or rival in row["failures"] for row in record["rows"])


if __name__ == "__main__":
    main()
