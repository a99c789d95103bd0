"""What every training script needs: precision, checkpoints that survive a kill, a progress bar."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


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
