"""What every training script needs: a run that can go on after a kill, its options on the command line,
precision, a progress bar.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

O = TypeVar("O")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


class Run:
    """A model with its optimizer, at a step of its run.

    `options` is a dataclass of what determines the run, with at least learning_rate, weight_decay, seed and
    device.
    """

    RECORDS: ClassVar[tuple[str, ...]] = ("step", "seconds", "curve")  # what a checkpoint holds besides

    def __init__(self, options: Any, model: nn.Module, total_steps: int, betas: tuple[float, float]) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.model = model
        self.total_steps = total_steps
        self.step = 0
        self.seconds = 0.0
        self.curve: list[tuple[int, float, float]] = []  # (step, seconds, score on what is held out)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        on_cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": options.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=torch.tensor(options.learning_rate, device=self.device) if on_cuda else options.learning_rate,
            betas=betas,
            fused=on_cuda or None,
            capturable=on_cuda,
        )

    def start_step(self) -> None:
        """Sets the learning rate and torch's seed of this step."""
        torch.manual_seed(self.options.seed * 1_000_003 + self.step)
        rate = self.options.learning_rate * self._schedule()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # where a CUDA graph reads it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _schedule(self) -> float:
        """Factor of the learning rate: a linear rise over a tenth of the steps, then half a cosine."""
        rise = max(1, self.total_steps // 10)
        if self.step < rise:
            return (self.step + 1) / rise
        done = (self.step - rise) / max(1, self.total_steps - rise)
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))

    def save(self, path: Path) -> None:
        """Writes the checkpoint. A kill at any moment leaves the old one or the new one, whole."""
        content = {
            "options": asdict(self.options),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in self.RECORDS},
        }
        write_atomically(path, lambda file: torch.save(content, file))

    def restore(self, path: Path) -> None:
        """Goes back to a checkpoint. ValueError where that is of a run with other options."""
        content = torch.load(path, map_location=self.device, weights_only=True)
        ours, theirs = asdict(self.options), content["options"]
        if differing := [name for name in ours if ours[name] != theirs.get(name)]:
            raise ValueError(
                f"{path} is of another run: "
                + ", ".join(f"{name} {theirs.get(name)!r} there, {ours[name]!r} here" for name in differing)
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        for name in self.RECORDS:
            setattr(self, name, content[name])
        self.curve = [tuple(point) for point in self.curve]


class GraphedStep:
    """Calls `step(*tensors)`; on CUDA as a graph from the fourth call on, so that no kernel waits for Python.

    Shapes stay those of the first call. What a replay returns is overwritten by the next.
    """

    EAGER_CALLS = 3  # in which libraries choose kernels and the optimizer makes its state

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step = step
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        if not tensors[0].is_cuda:
            return self._step(*tensors)
        self._calls += 1
        if self._calls <= self.EAGER_CALLS:
            return self._beside(tensors)
        if self._graph is None:
            self._inputs = [x.clone() for x in tensors]
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = self._step(*self._inputs)
        for own, x in zip(self._inputs, tensors, strict=True):
            own.copy_(x)
        self._graph.replay()
        return self._output

    def _beside(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """On another stream than the default one, as a capture will be."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            output = self._step(*tensors)
        current.wait_stream(stream)
        return output


def add_fields(
    parser: argparse.ArgumentParser,
    defaults: Any,
    choices: dict[str, list[str]],
    without: tuple[str, ...] = (),
) -> None:
    """An argument for each field of the dataclass `defaults`.

    A field that defaults to None is an int, and its metadata say under "none" what None means.
    """
    for field in fields(defaults):
        if field.name in without:
            continue
        default = getattr(defaults, field.name)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int if field.default is None else type(default),
            default=default,
            choices=choices.get(field.name),
            help=f"default: {field.metadata['none'] if default is None else default}",
        )


def from_parsed(kind: type[O], parsed: argparse.Namespace) -> O:
    """The dataclass `kind` from what `add_fields` added."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(parsed).items() if name in names})


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Has `write` fill a new binary file that takes the place of `path` once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name
    finally:
        os.close(directory)


class Progress:
    """A bar on the terminal, redrawn in place; where there is no terminal, a line for every tenth."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.on_terminal = sys.stderr.isatty()
        self.shown_at = 0.0

    def show(self, step: int, text: str) -> None:
        filled = 24 * step // self.total
        line = f"{self.label:<10} {'█' * filled}{'░' * (24 - filled)} {step:>5}/{self.total}  {text}"
        if self.on_terminal:
            if step == self.total or time.monotonic() > self.shown_at + 0.1:
                self.shown_at = time.monotonic()
                print(f"\r{line}", end="", file=sys.stderr, flush=True)
        elif step * 10 // self.total != (step - 1) * 10 // self.total:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.on_terminal:
            print(file=sys.stderr)
