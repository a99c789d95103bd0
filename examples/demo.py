"""Trains four small vision transformers that differ in attention alone, on handwritten digits: `make demo`.

Prints accuracy, time and memory side by side and draws `demo.png`. All take the same images in the same
order for the same number of steps. Time of attention is what a step takes beyond that of the same model
whose attention hands each token its own value; it is measured at the trained number of tokens and, with
patches of one pixel, at 784.
"""

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import harness

from . import digits
from .digits import SIDE
from .running import from_parsed, write_atomically
from .train_digits import (
    Options,
    Report,
    add_options,
    make_model,
    train,
    train_step,
)

NAMES = {"softmax": "softmax", "eva": "EVA", "window": "window only", "performer": "Performer"}
COLORS = {"softmax": "#333333", "eva": "#d1495b", "window": "#2e86ab", "performer": "#edae49"}
# As many steps as take a few minutes on two cores. Learning rate and deviation of the positions (vit.py)
# were chosen for softmax attention alone in 900 steps, by accuracy on 5,000 training images held out, mean of
# three seeds: 93.1 % with 0.004 and 0.5, less with every other of 0.0005, 0.001, ..., 0.016 and of 0.02, 0.1,
# 0.5.
DEFAULTS = Options(steps=500)


@dataclass
class Cost:
    """A training step of one model: milliseconds in all and of attention, bytes held beside the weights."""

    tokens: int
    batch_size: int
    step: float
    attention: float
    peak_bytes: int | None


def measure_costs(options: Options, patch_size: int, repeats: int) -> dict[str, Cost]:
    """Training steps of all kinds of attention, interleaved. Every step takes equally many tokens in all."""
    device = torch.device(options.device)
    tokens = (SIDE // patch_size) ** 2
    batch_size = max(1, options.batch_size * (SIDE // options.patch_size) ** 2 // tokens)
    options = replace(options, patch_size=patch_size, batch_size=batch_size)
    timings = harness.measure(step_calls(options), device, repeats=repeats, time_limit=15)
    peaks = harness.peak_memory(step_calls, options, device=device)
    without = timings["none"].seconds
    return {
        name: Cost(
            tokens=tokens,
            batch_size=batch_size,
            step=timings[name].median * 1e3,
            attention=statistics.median(a - b for a, b in zip(timings[name].seconds, without, strict=True))
            * 1e3,
            peak_bytes=peaks[name],
        )
        for name in NAMES
    }


def step_calls(options: Options) -> dict[str, harness.Call]:
    """A training step of each kind of attention and of none, on made-up images."""
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(options.batch_size, 1, SIDE, SIDE, generator=generator).to(options.device)
    labels = torch.randint(10, (options.batch_size,), generator=generator).to(options.device)
    return {name: _step_call(replace(options, attention=name), images, labels) for name in [*NAMES, "none"]}


def _step_call(options: Options, images: Tensor, labels: Tensor) -> harness.Call:
    model = make_model(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    return lambda: train_step(model, optimizer, images, labels, options.dtype)


def table(reports: dict[str, Report], costs: list[dict[str, Cost]]) -> str:
    header = ["attention", "parameters", "test accuracy", "training s"]
    for by_name in costs:
        at = f"@{by_name['eva'].tokens}"
        header += [f"step ms {at}", f"attention ms {at}", f"peak MiB {at}"]
    rows = []
    for name, report in reports.items():
        row = [NAMES[name], f"{report.parameters:,}", f"{report.test_accuracy:.2%}", f"{report.seconds:.1f}"]
        for cost in (by_name[name] for by_name in costs):
            peak = "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:.0f}"
            row += [f"{cost.step:.1f}", f"{cost.attention:.1f}", peak]
        rows.append(row)
    return harness.format_table(header, rows)


def draw(reports: dict[str, Report], costs: list[dict[str, Cost]], title: str, path: Path) -> None:
    """Accuracy against time, learning curves, and the time of attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for name, report in reports.items():
        _, seconds, accuracies = zip(*report.curve, strict=True)
        style = {"color": COLORS[name], "linewidth": 1.8}
        label = f"{NAMES[name]}, test {report.test_accuracy:.1%}"
        left.plot(seconds, accuracies, marker="o", markersize=3, label=label, **style)
        middle.plot(*_smooth(report.losses), label=NAMES[name], **style)
    best = max(accuracy for report in reports.values() for _, _, accuracy in report.curve)
    left.set(title="Accuracy on held-out digits", xlabel="training time, seconds")
    left.set(ylim=(0.5 if best > 0.9 else 0, 1), xlim=(0, None))
    left.yaxis.set_major_formatter(PercentFormatter(1))
    left.legend(frameon=False, loc="lower right")
    middle.set(title="Training loss", xlabel="step", yscale="log", xlim=(0, None))
    middle.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    middle.yaxis.set_major_formatter("{x:g}")
    middle.yaxis.set_minor_formatter(NullFormatter())
    middle.legend(frameon=False)

    width = 0.8 / len(reports)
    for i, name in enumerate(reports):
        positions = [group + (i - (len(reports) - 1) / 2) * width for group in range(len(costs))]
        bars = right.bar(
            positions, [by_name[name].attention for by_name in costs], 0.92 * width, color=COLORS[name]
        )
        right.bar_label(bars, fmt="%.0f", fontsize=9, padding=2)
    labels = [f"{c['eva'].tokens} tokens,\nbatch {c['eva'].batch_size}" for c in costs]
    right.set_xticks(range(len(costs)), labels)
    right.margins(y=0.08)
    right.set(title="Time of attention in a training step", ylabel="milliseconds")
    for axes in (left, middle):
        axes.grid(alpha=0.25)
    figure.suptitle(title, fontsize=9, color="#555555")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)


def _smooth(losses: list[float]) -> tuple[list[int], list[float]]:
    """Means over fortieths of the run, at the middle of each."""
    span = max(1, len(losses) // 40)
    starts = range(0, len(losses) - span + 1, span)
    return [start + span // 2 for start in starts], [statistics.fmean(losses[s : s + span]) for s in starts]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    add_options(parser, DEFAULTS, without=("attention",))
    parser.add_argument("--image", type=Path, default=Path("demo.png"), help="default: demo.png")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each model (default: 10)")
    parsed = parser.parse_args(arguments)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    options = from_parsed(Options, parsed)

    train_set, test_set = digits.load(parsed.data)
    tokens = (SIDE // options.patch_size) ** 2
    print(
        f"{len(train_set):,} digits to train on, {len(test_set):,} to test on, as {tokens} tokens; "
        f"width {options.width}, depth {options.depth}, heads {options.heads}; {options.batch_size} a step",
        file=sys.stderr,
    )
    reports = {}
    for name in NAMES:
        checkpoint = parsed.output_dir / f"{name}.pt"
        _, reports[name] = train(
            replace(options, attention=name), train_set, test_set, checkpoint, parsed.resume
        )
    print("measuring time and memory of a training step", file=sys.stderr)
    costs = [
        measure_costs(options, patch, parsed.repeats)
        for patch in sorted({options.patch_size, 1}, reverse=True)
    ]

    facts = harness.environment(torch.device(options.device))
    title = harness.headline(facts)
    print(f"\n{title}\n{table(reports, costs)}")
    print(f"Trained and tested at {tokens} tokens; at other numbers of tokens, steps are only timed.")
    draw(reports, costs, title, parsed.image)
    results = {
        **facts,
        "options": asdict(options),
        "reports": {name: asdict(report) for name, report in reports.items()},
        "costs": [{name: asdict(cost) for name, cost in by_name.items()} for by_name in costs],
    }
    harness.write_json(parsed.output_dir / "demo.json", results)
    print(f"\nplot: {parsed.image}; all numbers: {parsed.output_dir / 'demo.json'}")


if __name__ == "__main__":
    main()
