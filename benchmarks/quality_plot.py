"""The picture of what `benchmarks.quality` measured: `python -m benchmarks.quality_plot JSON PICTURE`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from . import harness

COLORS = {
    "softmax": "#333333",
    "EVA": "#d1495b",
    "window only": "#2e86ab",
    "landmarks only": "#7cb518",
    "Performer": "#edae49",
}
LANDMARKS = ("EVA, 16 landmarks", "EVA", "EVA, 196 landmarks")  # joined by a line where all are there


def draw(content: dict[str, Any], path: Path) -> None:
    """A row for each task: accuracy against time to train and to infer, and of all variants."""
    tasks = content["tasks"]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, rows = plt.subplots(
        len(tasks), 3, figsize=(15, 4.6 * len(tasks)), layout="constrained", squeeze=False
    )
    for (name, task), (left, middle, right) in zip(tasks.items(), rows, strict=True):
        against_time(left, task, "training_s")
        against_time(middle, task, "inference_us")
        all_variants(right, task["results"])
        left.set(title=f"{name}: {task['tokens']:,} tokens", xlabel="seconds to train", xscale="log")
        middle.set(title=f"{name}: {seeds_of(task)}", xlabel="microseconds to infer an image", xscale="log")
        for axes in (left, middle):
            axes.set_ylabel("test accuracy")
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.25, which="both")
    rows[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{content['device']}, torch {content['torch']}, eva_attn {content['commit']}, {content['date']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def seeds_of(task: dict[str, Any]) -> str:
    """How many runs the means and deviations are of."""
    fewest, most = (limit(len(row["scores"][0]) for row in task["results"]) for limit in (min, max))
    return f"{most} seeds" if fewest == most > 1 else f"{fewest} to {most} seeds" if most > 1 else "one seed"


def against_time(axes: Axes, task: dict[str, Any], time: str) -> None:
    """Final accuracy with its deviation; while training, thin lines of accuracy on held-out images."""
    results = {row["variant"]: row for row in task["results"]}
    joined = [results[name] for name in LANDMARKS if name in results]
    if len(joined) == len(LANDMARKS):
        axes.plot([r[time] for r in joined], [r["mean"][0] for r in joined], ":", color=COLORS["EVA"])
        for row, label in zip(joined, ("16", "49", "196"), strict=True):
            at = row[time], row["mean"][0]
            style = {"color": COLORS["EVA"]}
            axes.annotate(label, at, (5, -11), textcoords="offset points", fontsize=8, **style)
            axes.errorbar(*at, row["deviation"][0] or None, fmt="o", markersize=4, capsize=3, **style)
    for name, color in COLORS.items():
        if name not in results:
            continue
        row = results[name]
        axes.errorbar(
            row[time],
            row["mean"][0],
            row["deviation"][0] or None,
            fmt="o",
            color=color,
            capsize=3,
            label=name,
        )
        if time == "training_s":
            steps, accuracies = zip(*row["curve"], strict=True)
            axes.plot(
                [s * row["step_ms"] / 1e3 for s in steps], accuracies, color=color, alpha=0.4, linewidth=1
            )


def all_variants(axes: Axes, results: list[dict[str, Any]]) -> None:
    """Accuracy of every variant, dots for seeds."""
    for i, row in enumerate(reversed(results)):
        color = COLORS.get(row["variant"], COLORS["EVA"])
        axes.plot(row["scores"][0], [i] * len(row["scores"][0]), ".", color=color, alpha=0.4)
        axes.errorbar(row["mean"][0], i, xerr=row["deviation"][0] or None, fmt="o", color=color, capsize=3)
    axes.set_yticks(range(len(results)), [row["variant"] for row in reversed(results)], fontsize=8)
    axes.set_xlabel("test accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.grid(alpha=0.25, axis="x")


def main(arguments: list[str] | None = None) -> None:
    harness.draw_json("quality_plot", __doc__, "quality", draw, arguments)


if __name__ == "__main__":
    main()
