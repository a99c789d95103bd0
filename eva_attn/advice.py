"""Which window and landmarks to take, or softmax: by measured times where there are any."""

import copy
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from . import geometry
from .functional import eva_attention
from .geometry import Pair
from .integrations import replace_attention

# By kind of tokens: (window, landmarks); causal (window, chunk), as their number grows with the sequence.
SETTINGS = {
    "grid": ((7, 49), (7, 196), (14, 49), (14, 196)),
    "sequence": ((64, 64), (64, 256), (256, 64), (256, 256)),
    "causal": ((128, 64), (256, 64), (256, 128), (512, 128)),
}
MEASURED = Path(__file__).with_name("measured")

_WORTH = 1.2  # times faster, from which on an approximation is worth considering
_PASSES = ("forward", "training")

Rows: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class AttentionShape:
    """Self-attention of `tokens` in `heads` of `head_dim`, as many as `layers` times in a model."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    grid_size: Pair | None = None
    num_prefix_tokens: int = 0
    is_causal: bool = False
    layers: int = 1

    @property
    def kind(self) -> str:
        """What times are comparable: prefix tokens can take other kernels."""
        prefixed = "prefixed " if self.num_prefix_tokens else ""
        return prefixed + self._layout

    @property
    def _layout(self) -> str:
        return "causal" if self.is_causal else "sequence" if self.grid_size is None else "grid"

    def settings(self) -> list[tuple[int, int]]:
        """Those of `SETTINGS` that differ from softmax here."""
        grid = self.grid_size or (1, self.tokens)
        return [
            (window, number)
            for window, number in SETTINGS[self._layout]
            if window < max(grid) and self._chunk_size(number) > 1
        ]

    def geometry(self, setting: tuple[int, int]) -> dict[str, Any]:
        """The arguments of `eva_attention` for a setting."""
        window, number = setting
        return {
            "window_size": window,
            "chunk_size": self._chunk_size(number),
            "grid_size": self.grid_size,
            "num_prefix_tokens": self.num_prefix_tokens,
            "is_causal": self.is_causal,
        }

    def _chunk_size(self, number: int) -> int:
        if self.is_causal:
            return number
        grid = self.grid_size or (1, self.tokens)
        return geometry.default_chunk_size(grid, number, self.grid_size is not None)

    def __str__(self) -> str:
        tokens = (
            f"{self.tokens:,} tokens" if self.grid_size is None else "{} x {} tokens".format(*self.grid_size)
        )
        if self.num_prefix_tokens:
            tokens += f" and {self.num_prefix_tokens} before them"
        text = f"batch {self.batch}, {self.heads} heads of {self.head_dim}, {tokens}"
        return text + ", causal" * self.is_causal + f", in {self.layers} layers" * (self.layers > 1)


@dataclass(frozen=True)
class Choice:
    """One kind of attention. `options` are for `replace_attention` or `EVAttention`; None for softmax.

    `flops` of a forward pass, as `torch.utils.flop_counter` counts them; `saved_bytes` kept for the backward
    pass; `milliseconds` of a forward pass, and of one with its backward, None where nothing was measured.
    """

    name: str
    options: dict[str, int] | None
    flops: int
    saved_bytes: int
    milliseconds: tuple[float | None, float | None]


@dataclass(frozen=True)
class Advice:
    """Softmax and choices of EVA for one shape; prints as a table with a verdict."""

    shape: AttentionShape
    device: str
    dtype: torch.dtype
    measured: str | None  # where and when the times were, None without any
    choices: list[Choice]

    @property
    def best(self) -> Choice | None:
        """The choice to take for its time in training; None where no times are known."""
        softmax, *others = self.choices
        if softmax.milliseconds[1] is None:
            return None
        timed = [(x.milliseconds[1], i) for i, x in enumerate(others) if x.milliseconds[1] is not None]
        if not timed or softmax.milliseconds[1] / min(timed)[0] < _WORTH:
            return softmax
        return others[min(timed)[1]]

    def __str__(self) -> str:
        header = ["", "GFLOP", "saved MiB", "forward ms", "", "training ms", ""]
        rows = [header, *(self._row(choice) for choice in self.choices)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        dtype = str(self.dtype).removeprefix("torch.")
        return "\n".join(
            [f"{self.shape}; {dtype} on {self.device}", *map(str.rstrip, lines), self._verdict()]
        )

    def _row(self, choice: Choice) -> list[str]:
        cells = [choice.name, f"{choice.flops / 1e9:.3g}", f"{choice.saved_bytes / 2**20:.4g}"]
        for own, softmax in zip(choice.milliseconds, self.choices[0].milliseconds, strict=True):
            cells.append("-" if own is None else f"{own:.3g}")
            cells.append("" if own is None or softmax is None else f"{softmax / own:.2g}x")
        return cells

    def _verdict(self) -> str:
        softmax, *others = self.choices
        if not others:
            return "Take softmax: these are too few tokens for any choice here to differ from it."
        if self.measured is None:
            return (
                f"No times were measured on {self.device} in this dtype, and operations do not tell which is "
                "faster: python -m benchmarks.choices measures them."
            )
        if self.best is None:
            return f"This shape is outside what was measured ({self.measured})."
        source = f"(times between those measured on {self.measured}, for batches that fill the device)"
        if self.best is softmax:
            return f"Take softmax: it is exact, and no choice here trains {_WORTH} times as fast. {source}"
        ratio = softmax.milliseconds[1] / self.best.milliseconds[1]  # type: ignore[operator]
        return f"Fastest in training: EVA, {self.best.name}, {ratio:.2g} times softmax. {source}"


def advise(
    model_or_shape: nn.Module | tuple[int, int, int, int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int = 1,
    num_tokens: int | None = None,
    grid_size: Pair | None = None,
    is_causal: bool = False,
    table: Path | None = None,
) -> "AdviceReport":
    """What softmax and EVA cost, for choices of window and landmarks; prints as tables.

    Times are interpolated, in logarithms of tokens and head dimension, between those that
    `python -m benchmarks.choices` measured; none are guessed beyond them. EVA is timed with a
    linear-layernorm projection, without relative bias, and on grids with no or one prefix token. Softmax is
    `scaled_dot_product_attention` by its fastest backend.

    Args:
        model_or_shape: a model that `replace_attention` knows, which is left as it is, or the shape
            [B, H, N, D] of queries.
        device: a device of this machine, or part of the name of one in a table, such as "H100".
        dtype: None: float32 on this machine's CPU, bfloat16 elsewhere.
        batch_size: of a model's inputs.
        num_tokens: of a model's sequences.
        grid_size: (height, width) of the N tokens of a shape.
        is_causal: causal attention of a shape.
        table: file that `benchmarks.choices` wrote, in place of those in the package.

    Returns:
        A list of an `Advice` for each shape of attention in the model.

    ValueError for arguments that are not supported, by name.
    """
    dtype = dtype or (torch.float32 if str(device).lower().startswith("cpu") else torch.bfloat16)
    if isinstance(model_or_shape, nn.Module):
        if grid_size is not None or is_causal:
            raise ValueError("grid_size, is_causal: expected for a shape alone, as a model says it itself")
        shapes = _shapes_of(model_or_shape, batch_size, num_tokens)
    else:
        shapes = [_shape(model_or_shape, grid_size, is_causal)]
    name, content = _table(device, dtype, table)
    rows = content["results"] if content else []
    measured = f"{content['device']}, {content['date']}" if content else None
    return AdviceReport(
        Advice(shape, name, dtype, measured, list(_choices(shape, dtype, rows))) for shape in shapes
    )


class AdviceReport(list[Advice]):
    """The advice for each shape; prints as its tables."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))


def device_name(device: torch.device) -> str:
    """The machine in words: model, and on a CPU its cores and torch's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _shape(shape: Any, grid_size: Pair | None, is_causal: bool) -> AttentionShape:
    if not isinstance(shape, (tuple, list, torch.Size)) or len(shape) != 4:
        raise ValueError(f"model_or_shape: expected a module or [B, H, N, D], got {shape!r}")
    if any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"model_or_shape: expected positive sizes [B, H, N, D], got {tuple(shape)}")
    batch, heads, tokens, head_dim = shape
    if grid_size is not None:
        if is_causal:
            raise ValueError("grid_size: expected None for causal attention")
        height, width = geometry.grid(grid_size, tokens, 0)
        if min(height, width) < 1 or height * width != tokens:
            raise ValueError(f"grid_size: expected (height, width) of {tokens} tokens, got {grid_size}")
    return AttentionShape(batch, heads, tokens, head_dim, grid_size, 0, is_causal)


def _shapes_of(model: nn.Module, batch_size: int, num_tokens: int | None) -> list[AttentionShape]:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    # Parameters are not copied.
    replaced = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    found: Counter[AttentionShape] = Counter()
    for name in replace_attention(replaced):
        module = replaced.get_submodule(name)
        eva: Any = getattr(module, "eva", module)
        tokens = num_tokens
        if eva.grid_size is not None:
            tokens = math.prod(eva.grid_size)
        elif not isinstance(eva.window_size, int):
            raise ValueError(f"model_or_shape: {name} has a grid of each batch: give the shape [B, H, N, D]")
        elif tokens is None:
            raise ValueError("num_tokens: expected the length of the model's sequences, got None")
        found[
            AttentionShape(
                batch_size,
                eva.num_heads,
                tokens,
                eva.head_dim,
                eva.grid_size,
                eva.num_prefix_tokens,
                eva.is_causal,
            )
        ] += 1
    return [AttentionShape(**{**vars(shape), "layers": count}) for shape, count in found.items()]


def _choices(shape: AttentionShape, dtype: torch.dtype, rows: Rows) -> Iterator[Choice]:
    batch, heads, head_dim = shape.batch, shape.heads, shape.head_dim
    whole = (batch, heads, shape.tokens + shape.num_prefix_tokens, head_dim)
    # Queries, keys, values and output, and in float32 the logarithm of each row's sum.
    saved = math.prod(whole[:3]) * (4 * head_dim * dtype.itemsize + 4)
    times = _milliseconds(shape, None, rows)
    yield Choice("softmax", None, sdpa_flop_count(whole, whole, whole), saved, times)
    for setting in shape.settings():
        window, number = setting
        side = str(window) if shape.grid_size is None else f"{window} x {window}"
        words = f"chunk {number}" if shape.is_causal else f"{number} landmarks"
        options = {"window_size": window, "chunk_size" if shape.is_causal else "num_landmarks": number}
        flops, saved = _count(shape, setting, whole, dtype)
        times = _milliseconds(shape, setting, rows)
        yield Choice(f"window {side}, {words}", options, flops, saved, times)


def _count(
    shape: AttentionShape, setting: tuple[int, int], whole: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, int]:
    """Operations of EVA forward, and bytes that it keeps for its backward pass; nothing is computed."""
    query, key, value = (torch.empty(whole, dtype=dtype, device="meta", requires_grad=True) for _ in range(3))
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return x

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        out = eva_attention(query, key, value, **shape.geometry(setting))
    total = sum(kept.values())
    del out
    return counter.get_total_flops(), total


def _table(
    device: torch.device | str, dtype: torch.dtype, path: Path | None
) -> tuple[str, dict[str, Any] | None]:
    """The device's name, and what was measured on it in `dtype`."""
    files = [path] if path is not None else sorted(MEASURED.glob("*.json"))
    tables = [json.loads(file.read_text()) for file in files]
    try:
        name = device_name(torch.device(device))
    except (RuntimeError, AssertionError):  # no device of this machine
        known = [x["device"] for x in tables]
        name = next((x for x in known if str(device).lower() in x.lower()), "")
        if not name:
            raise ValueError(
                f"device: expected one of this machine or part of one of {known}, got {device!r}"
            ) from None
    wanted = str(dtype).removeprefix("torch.")
    return name, next((x for x in tables if (x["device"], x["dtype"]) == (name, wanted)), None)


def _milliseconds(
    shape: AttentionShape, setting: tuple[int, int] | None, rows: Rows
) -> tuple[float | None, float | None]:
    """Of a forward pass, and of one with its backward, for all heads and sequences."""
    wanted = None if setting is None else list(setting)
    rows = [row for row in rows if row["kind"] == shape.kind and row["setting"] == wanted]
    times = []
    for name in _PASSES:
        by_head_dim = []
        for head_dim in sorted({row["head_dim"] for row in rows}):
            points = [(row["tokens"], row[name]) for row in rows if row["head_dim"] == head_dim]
            if (time := _interpolate(points, shape.tokens)) is not None:
                by_head_dim.append((head_dim, time))
        time = _interpolate(by_head_dim, shape.head_dim)
        times.append(None if time is None else time * shape.batch * shape.heads)
    return times[0], times[1]


def _interpolate(points: list[tuple[int, float]], x: int) -> float | None:
    """Between the two nearest points, linear in logarithms; None beyond the outermost."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points, strict=False):
        if x0 <= x <= x1:
            weight = 0.0 if x0 == x1 else math.log(x / x0) / math.log(x1 / x0)
            return y0 * (y1 / y0) ** weight
    return None
