"""Bits per byte of several seeds: `python -m benchmarks.byte_lm FILE...`, of `examples.byte_lm --json` each.

Means and standard deviations over seeds, at each evaluation, by attention.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.byte_lm import Options

from . import harness

FREE = ("attention", "seed")  # what runs may differ in


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By attention, with the facts of the first run, and every commit; ValueError if other options differ."""
    first, *_ = runs
    options = shared_options(first)
    for run in runs:
        if shared_options(run) != options:
            raise ValueError(f"runs differ in more than {' and '.join(FREE)}: {run['options']}")
    by_attention: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["options"]["seed"]):
        by_attention.setdefault(run["options"]["attention"], []).append(run)
    defaults = asdict(Options())
    changed = {name: value for name, value in options.items() if value != defaults[name]}
    flags = (f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
    return {
        **{name: first[name] for name in ("date", "device", "eva_attn", "torch", "python", "system")},
        "commit": ", ".join(sorted({run["commit"] for run in runs})),
        "command": " ".join(["python -m examples.byte_lm --attention ATTENTION --seed SEED", *flags]),
        "options": options,
        "trained_bytes": first["bytes"],
        "results": [summary(name, by_attention[name]) for name in sorted(by_attention)],
    }


def shared_options(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run["options"].items() if name not in FREE}


def summary(attention: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one attention; its curves are [step, seconds, bits per byte] by seed."""
    points = zip(*(run["curve"] for run in runs), strict=True)
    scores = {step[0][0]: [bits for _, _, bits in step] for step in points}
    return {
        "attention": attention,
        "parameters": runs[0]["parameters"],
        "seeds": [run["options"]["seed"] for run in runs],
        "steps": list(scores),
        "mean": [round(statistics.fmean(s), 4) for s in scores.values()],
        "deviation": [round(statistics.stdev(s), 4) if len(s) > 1 else 0.0 for s in scores.values()],
        "curves": [[[step, round(s, 1), round(bits, 4)] for step, s, bits in run["curve"]] for run in runs],
    }


def table(results: list[dict[str, Any]]) -> str:
    header = ["attention", "parameters", "seeds", *(f"step {step:,}" for step in results[0]["steps"])]
    rows = [
        [
            r["attention"],
            f"{r['parameters']:,}",
            str(len(r["seeds"])),
            *(
                f"{mean:.3f} ± {deviation:.3f}"
                for mean, deviation in zip(r["mean"], r["deviation"], strict=True)
            ),
        ]
        for r in results
    ]
    return harness.format_table(header, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.byte_lm", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args(arguments)
    content = merge([json.loads(path.read_text()) for path in options.runs])
    print(f"{harness.headline(content)}\n\n{table(content['results'])}")
    if options.json:
        harness.write_json(options.json, content)


if __name__ == "__main__":
    main()
