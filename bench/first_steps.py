"""Draw docs/method/first-steps.png: short runs with C of embeddings and with C of directions.

The runs are those in bench/results/first-steps.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "bench" / "results" / "first-steps.json"
PANELS = {
    "norm_spread": r"$|z|$: 95th percentile / median",
    "prediction_norm": r"$|Wz| \, / \, |z|$, median",
    "gradient": r"gradient $|z| \, |g|$, median",
    "mean_share": r"share of the mean, $|\bar z|^2 / \overline{|z|^2}$",
    "effective_rank": "effective rank of C",
    "knn_top1": "k-NN top-1, validation",
}
COLOURS = {"embeddings": ("#D55E00", "#E69F00", "#CC79A7"), "directions": ("#0072B2", "#56B4E9")}
DASHES = ("-", "--", "-.")


def kept_runs() -> list[dict[str, Any]]:
    """Return IsoLoss runs without EMA on the image folder: SGD 0.1, warm-up 1.5 to 15 epochs."""
    recorded = json.loads(KEPT.read_text(encoding="utf-8"))
    chosen = [
        run
        for run in recorded["runs"]
        if run["optimizer"] == "sgd"
        and (run["method"], run["ema"], run["lr"]) == ("isoloss", False, 0.1)
        and run["epochs"] == 15
        and "stem" not in run["data"]
        # overlaps the other two
        and (run["correlation"], run["warmup_epochs"]) != ("directions", 5)
    ]
    for run in chosen:
        columns = zip(*run["records"], strict=True)
        run |= dict(zip(recorded["columns"], columns, strict=True))
        run["title"] = f"C of {run['correlation']}, warm-up {run['warmup_epochs']:g} epochs"
    return chosen


def draw(runs: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    drawn = {"embeddings": 0, "directions": 0}
    for run in runs:
        place = drawn[run["correlation"]]
        drawn[run["correlation"]] += 1
        style = {"color": COLOURS[run["correlation"]][place], "linestyle": DASHES[place]}
        for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
            x, y = run["step"], run.get(name)
            if name == "knn_top1":
                x = [epoch * run["steps_per_epoch"] for epoch, _ in run[name]]
                y = [top1 for _, top1 in run[name]]
            axis.plot(x, y, label=run["title"], **style)
            axis.set_title(label, fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[3:]:
        axis.set_xlabel("step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "method" / "first-steps.png")
    args = parser.parse_args()
    draw(kept_runs()).savefig(args.output, dpi=110)
    print(args.output)


if __name__ == "__main__":
    main()
