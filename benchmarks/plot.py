"""Pictures of what `benchmarks.attention` measured: `python -m benchmarks.plot results.json picture.png`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from . import harness
from .cases import CASES, SWEEP

DIRECTIONS = {"forward": "o", "forward + backward": "s"}
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def draw(content: dict[str, Any], path: Path) -> None:
    """Time of a token against the number of tokens, one panel a direction; beside them the roofline.

    Shows the first dtype and number of threads of `content`, which is what `--json` writes.
    """
    ceiling = content["ceilings"][0]
    results = [
        r for r in content["results"] if (r["dtype"], r["threads"]) == (ceiling["dtype"], ceiling["threads"])
    ]
    figure, panels = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    for panel, direction in zip(panels, DIRECTIONS, strict=False):
        time_of_a_token(panel, [r for r in results if r["direction"] == direction], ceiling)
        panel.set_title(direction)
    panels[0].legend()
    roofline(panels[2], results, ceiling)
    figure.suptitle(
        f"{content['device']}, {ceiling['dtype']}, torch {content['torch']}, eva_attn {content['commit']}, "
        f"{content['date']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tokens_of(result: dict[str, Any]) -> int:
    _, _, height, width, _ = result["shape"]
    return height * width


def time_of_a_token(axes: Axes, results: list[dict[str, Any]], ceiling: dict[str, float]) -> None:
    """Nanoseconds for a token of one head, and the memory floor; causal cases differ in more than tokens."""
    series: dict[str, list[tuple[int, float]]] = {}
    for r in results:
        if (CASES | SWEEP)[r["case"]].is_causal:
            continue
        batch, heads = r["shape"][:2]
        number = batch * heads * tokens_of(r)
        series.setdefault(r["peer"], []).append((tokens_of(r), r["milliseconds"] * 1e6 / number))
        floor = r["milliseconds"] / r["over_floor"]
        series.setdefault("memory floor", []).append((tokens_of(r), floor * 1e6 / number))
    for name, points in series.items():
        style = {"color": "black", "linestyle": ":"} if name == "memory floor" else {"marker": "o"}
        axes.loglog(
            *zip(*sorted(points), strict=True), label=name, linewidth=2 if name == "eva" else 1, **style
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("ns for a token of one head")
    axes.grid(alpha=0.3, which="both")


def roofline(axes: Axes, results: list[dict[str, Any]], ceiling: dict[str, float]) -> None:
    """GFLOP/s against operations per byte, both of the mathematics, under the machine's two limits."""
    colours: dict[str, str] = {}
    intensities = []
    for r in results:
        if r["peer"] not in ("eva", r["softmax"]):
            continue
        colour = colours.setdefault(r["peer"], f"C{len(colours)}")
        intensity = r["gflops"] / r["gbs"]
        intensities.append(intensity)
        first = axes.get_legend_handles_labels()[1].count(f"{r['peer']}, {r['direction']}") == 0
        label = f"{r['peer']}, {r['direction']}" if first else None
        axes.loglog(intensity, r["gflops"], DIRECTIONS[r["direction"]], color=colour, label=label)
        axes.annotate(r["case"], (intensity, r["gflops"]), fontsize=6)
    corner = ceiling["matmul_gflops"] / ceiling["copy_gbs"]
    reach = [min([*intensities, corner]) / 2, corner, max([*intensities, corner]) * 2]
    axes.loglog(reach, [min(x * ceiling["copy_gbs"], ceiling["matmul_gflops"]) for x in reach], color="black")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title("roofline: copy and matrix product")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def main(arguments: list[str] | None = None) -> None:
    harness.draw_json("plot", __doc__, "attention", draw, arguments)


if __name__ == "__main__":
    main()
