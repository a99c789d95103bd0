"""What a replacement did, in words."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import geometry
from ..modules import _EVA


@dataclass(frozen=True)
class Replaced:
    """One module that attends by EVA now: its name, the class that it had, and the settings in use."""

    name: str
    kind: str
    settings: str


@dataclass(frozen=True)
class Left:
    """One module that attends as before: its name, its class, and why."""

    name: str
    kind: str
    reason: str


class ReplacementReport(list[str]):
    """The names of the modules that were replaced; prints as a table of what was replaced, and what was not.

    `replaced` holds a `Replaced` and `left` a `Left` for each module.
    """

    def __init__(self, replaced: list[Replaced], left: list[Left]) -> None:
        super().__init__(entry.name for entry in replaced)
        self.replaced = replaced
        self.left = left

    def __str__(self) -> str:
        text = f"EVA in {_count(len(self.replaced), 'module')}"
        text += _table([(entry.name, entry.kind, entry.settings) for entry in self.replaced])
        if self.left:
            text += f"\nleft as they were: {_count(len(self.left), 'module')}"
            text += _table([(entry.name, entry.kind, entry.reason) for entry in self.left])
        return text


def describe(eva: Any) -> str:
    """The settings of a module with EVA that decide what it computes; the class of another."""
    if not isinstance(eva, _EVA):
        return kind_of(eva)
    grid = eva.grid_size
    words = []
    if eva.is_causal:
        words.append("causal")
    words.append(f"window {_size(eva.window_size, grid)}")
    if eva.overlap:
        words.append(f"overlap {_size(eva.overlap, grid)}")
    chunk = eva.chunk_size
    if chunk is None and grid is not None:
        chunk = geometry.default_chunk_size(grid, eva.num_landmarks, True)
    if chunk is None:
        words.append(f"chunks for {eva.num_landmarks} landmarks")
    elif grid is None:
        words.append(f"chunk {chunk}")
    else:
        rows, columns = geometry.chunk_grid(grid, geometry.pair("chunk_size", chunk, grid, 1))
        words.append(f"chunk {_size(chunk, grid)}, {_count(rows * columns, 'landmark')}")
    if grid is not None:
        words.append(f"grid {_size(grid, grid)}")
    else:
        words.append("sequence" if isinstance(eva.window_size, int) else "grid of each batch")
    if eva.num_prefix_tokens:
        words.append(_count(eva.num_prefix_tokens, "prefix token"))
    words.append(f"{eva.landmark_projection.kind} projection")
    return ", ".join(words)


def kind_of(module: nn.Module) -> str:
    """The library and class of a module."""
    kind = type(module)
    return f"{kind.__module__.partition('.')[0]} {kind.__qualname__}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _size(size: Any, grid: Any) -> str:
    if isinstance(size, int):
        return f"{size} x {size}" if grid is not None else str(size)
    return f"{size[0]} x {size[1]}"


def _table(rows: list[tuple[str, str, str]]) -> str:
    """Aligned columns; rows that differ only by numbers in their names are one, with their count."""
    counts = Counter((re.sub(r"\d+", "*", name), kind, words) for name, kind, words in rows)
    names = {(re.sub(r"\d+", "*", name), kind, words): name for name, kind, words in rows}
    lines = [(names[row] if count == 1 else f"{row[0]} ({count})", *row[1:]) for row, count in counts.items()]
    widths = [max((len(line[i]) for line in lines), default=0) for i in (0, 1)]
    return "".join(f"\n  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines)
