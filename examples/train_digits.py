"""Trains one vision transformer on handwritten digits: `python -m examples.train_digits --attention eva`.

The order of images and the noise of a step follow from the seed and the step's number alone, so that a run
that was killed and goes on with `--resume` ends in the same weights as one that was not.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import digits
from .digits import Digits
from .running import DTYPES, Progress, Run, add_fields, autocast, from_parsed
from .vit import ATTENTION, VisionTransformer


@dataclass(frozen=True)
class Options:
    """What determines a run."""

    attention: str = "eva"
    patch_size: int = 2
    width: int = 64
    depth: int = 2
    heads: int = 2
    steps: int | None = field(default=None, metadata={"none": "as many as --epochs needs"})
    epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    held_out: int = 1000  # training images kept for the learning curve
    evaluations: int = 10
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


@dataclass
class Report:
    """What a run gave. Seconds count training steps alone."""

    parameters: int
    seconds: float
    losses: list[float]
    curve: list[tuple[int, float, float]]  # (step, seconds, accuracy on the held-out images)
    test_accuracy: float


def make_model(options: Options) -> VisionTransformer:
    """A fresh model on the run's device, the same for the same options."""
    torch.manual_seed(options.seed)
    return VisionTransformer(
        options.attention,
        patch_size=options.patch_size,
        width=options.width,
        depth=options.depth,
        heads=options.heads,
    ).to(options.device)


class Training(Run):
    """A run on digits."""

    RECORDS = (*Run.RECORDS, "losses")

    def __init__(self, options: Options, data: Digits) -> None:
        self.data = data
        self.steps_per_epoch = len(data) // options.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"batch_size: expected at most {len(data)} images, got {options.batch_size}")
        total_steps = options.steps or max(1, round(options.epochs * self.steps_per_epoch))
        super().__init__(options, make_model(options), total_steps, betas=(0.9, 0.98))
        self.losses: list[float] = []

    def advance(self) -> float:
        """One step; returns its loss."""
        start = time.perf_counter()
        images, labels = self._batch()
        self.start_step()
        loss = train_step(self.model, self.optimizer, images, labels, self.options.dtype).item()
        self.seconds += time.perf_counter() - start
        self.step += 1
        self.losses.append(loss)
        return loss

    def _batch(self) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if position == 0 or not hasattr(self, "_order"):
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self.data), generator=generator)
        chosen = self._order[position * self.options.batch_size : (position + 1) * self.options.batch_size]
        return self.data.images[chosen].to(self.device), self.data.labels[chosen].to(self.device)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    dtype: str,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Forward, backward and update; returns the loss."""
    model.train()
    optimizer.zero_grad()
    with autocast(images.device, dtype):
        logits = model(images)
    loss = loss_of(logits.float(), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, data: Digits, device: torch.device, dtype: str) -> float:
    """Share of the digits that the model reads right."""
    model.eval()
    correct = 0
    for images, labels in zip(data.images.split(250), data.labels.split(250), strict=True):
        with autocast(device, dtype):
            logits = model(images.to(device))
        correct += int((logits.argmax(-1).cpu() == labels).sum())
    return correct / len(data)


def train(
    options: Options,
    train_set: Digits,
    test_set: Digits,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> tuple[VisionTransformer, Report]:
    """Trains and tests a model; shows progress, and saves a checkpoint at each evaluation."""
    if not 0 < options.held_out < len(train_set):
        raise ValueError(f"held_out: expected 1 to {len(train_set) - 1} images, got {options.held_out}")
    run = Training(options, train_set[: -options.held_out])
    held_out = train_set[-options.held_out :]
    if resume and checkpoint is not None and checkpoint.exists():
        run.restore(checkpoint)
    evaluate_at = {round((i + 1) * run.total_steps / options.evaluations) for i in range(options.evaluations)}
    progress = Progress(options.attention, run.total_steps)
    while run.step < run.total_steps:
        loss = run.advance()
        if run.step in evaluate_at:
            read = accuracy(run.model, held_out, run.device, options.dtype)
            run.curve.append((run.step, run.seconds, read))
            if checkpoint is not None:
                run.save(checkpoint)
        known = f"{run.curve[-1][2]:7.2%}" if run.curve else "      -"
        progress.show(run.step, f"loss {loss:6.4f}  held-out {known}  {run.seconds:5.1f} s")
    progress.close()
    report = Report(
        parameters=sum(p.numel() for p in run.model.parameters()),
        seconds=run.seconds,
        losses=run.losses,
        curve=run.curve,
        test_accuracy=accuracy(run.model, test_set, run.device, options.dtype),
    )
    return run.model, report


def add_options(parser: argparse.ArgumentParser, defaults: Options, without: tuple[str, ...] = ()) -> None:
    """An argument for each field of `Options`, and those that say where to read and write."""
    add_fields(parser, defaults, {"attention": list(ATTENTION), "dtype": list(DTYPES)}, without)
    parser.add_argument("--data", type=Path, help="folder of mnist_train.csv and mnist_test.csv")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo"), help="for checkpoints (default: demo)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --output-dir, if any"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.train_digits", description=__doc__)
    add_options(parser, Options())
    parsed = parser.parse_args(arguments)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    options = from_parsed(Options, parsed)
    checkpoint = parsed.output_dir / f"{options.attention}.pt"
    _, report = train(options, *digits.load(parsed.data), checkpoint, parsed.resume)
    print(
        f"{options.attention}: {report.parameters:,} parameters, test accuracy {report.test_accuracy:.2%} "
        f"after {len(report.losses)} steps in {report.seconds:.1f} s; checkpoint {checkpoint}"
    )


if __name__ == "__main__":
    main()
