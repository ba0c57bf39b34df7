"""Draws the picture of the README, docs/speed.svg, from docs/speed.csv: tokens per second over depth, stock and FASA.

    python docs/speed.py                            draw what is measured
    python docs/speed.py a.json b.json              first write it anew, from what `fasa-edge bench --json` printed

`make speed` measures and draws.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

CSV = Path(__file__).with_name("speed.csv")
SVG = CSV.with_suffix(".svg")

COLUMNS = ("model", "threads", "method", "budget", "depth", "median_ts", "min_ts", "max_ts")
LABELS = {  # in the order of the legend; what else is measured is in the CSV alone
    "fasa": "FASA, {budget} cells",
    "dense": "stock llama.cpp",
    "dense, flash attention": "stock, flash attention",
}
STYLES = {
    "fasa": {"color": "#c2410c", "lw": 2.5, "marker": "o"},
    "dense": {"color": "#475569", "lw": 1.5, "marker": "s", "ms": 4},
    "dense, flash attention": {"color": "#94a3b8", "lw": 1.5, "marker": "^", "ms": 4},
}


def measured(paths: list[str]) -> list[dict[str, object]]:
    """The rows of the CSV, from files of JSON."""
    return [
        {
            "model": Path(row["model_filename"]).name.removesuffix(".gguf").removesuffix("-fasa"),
            "threads": row["n_threads"],
            "method": "dense, flash attention" if row["method"] == "dense" and row["flash_attn"] else row["method"],
            "budget": row["budget"] or "",
            "depth": row["n_depth"],
            "median_ts": round(row["median_ts"], 2),
            "min_ts": round(min(row["samples_ts"]), 2),
            "max_ts": round(max(row["samples_ts"]), 2),
        }
        for path in paths
        for row in json.loads(Path(path).read_text(encoding="utf-8"))
        if row["n_gen"]
    ]


def draw(rows: list[dict[str, str]]) -> Figure:
    """A panel for each model: medians, and their range where it is known."""
    models = list(dict.fromkeys((row["model"], row["threads"]) for row in rows))
    figure = Figure(figsize=(4.5 * len(models), 3.4), layout="constrained")
    for axes, (model, threads) in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for method, label in LABELS.items():
            points = [row for row in rows if (row["model"], row["method"]) == (model, method)]
            if not points:
                continue
            depths, medians = ([float(row[key]) for row in points] for key in ("depth", "median_ts"))
            axes.plot(depths, medians, label=label.format(**points[0]), **STYLES[method])
            if all(row["min_ts"] for row in points):
                low, high = ([float(row[key]) for row in points] for key in ("min_ts", "max_ts"))
                axes.fill_between(depths, low, high, color=STYLES[method]["color"], alpha=0.12, lw=0)
        axes.set_title(f"{model}, {threads} threads", fontsize=10)
        axes.set(xlabel="tokens in the cache", ylabel="tokens/s")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda depth, _: f"{depth:,.0f}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Write the CSV if there is something new, then draw it."""
    if sys.argv[1:]:
        rows = measured(sys.argv[1:])
        with CSV.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with CSV.open(newline="", encoding="utf-8") as file:
        figure = draw(list(csv.DictReader(file)))
    # the same figures give the same file, and letters are text
    matplotlib.rcParams.update({"svg.hashsalt": CSV.name, "svg.fonttype": "none"})
    figure.savefig(SVG, metadata={"Date": None})


if __name__ == "__main__":
    main()
