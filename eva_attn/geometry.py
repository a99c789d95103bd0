"""Integers and index tensors that describe windows and chunks: no attention here.

A 1-D sequence is a grid of height 1, so that everything inward of the public functions is 2-D. Sizes may be
`torch.SymInt`.
"""

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Pair: TypeAlias = tuple[int, int]
Size: TypeAlias = int | Pair


def pair(name: str, value: Size, grid_size: Pair | None, height: int) -> Pair:
    """`value` as (height, width): an int means both on a grid, and (`height`, `value`) without one.

    ValueError for a pair without a grid or for another length, TypeError for anything but integers.
    """
    if isinstance(value, (int, torch.SymInt)):
        return (height, value) if grid_size is None else (value, value)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected an int or (height, width), got {value!r}")
    if grid_size is None:
        raise ValueError(f"{name}: expected an int, as no grid_size is given, got {value!r}")
    return _two_ints(name, value)


def grid(grid_size: Pair | None, num_tokens: int, num_prefix_tokens: int) -> Pair:
    """The grid that the tokens after the prefix lie on: (1, their number) for a sequence."""
    if grid_size is None:
        return 1, num_tokens - num_prefix_tokens
    if not isinstance(grid_size, (tuple, list)):
        raise TypeError(f"grid_size: expected (height, width) or None, got {grid_size!r}")
    return _two_ints("grid_size", grid_size)


def _two_ints(name: str, value: Pair) -> Pair:
    if len(value) != 2:
        raise ValueError(f"{name}: expected (height, width), got {value!r}")
    height, width = value
    if not (isinstance(height, (int, torch.SymInt)) and isinstance(width, (int, torch.SymInt))):
        raise TypeError(f"{name}: expected two ints, got {value!r}")
    return height, width


def chunk_grid(grid_size: Pair, chunk_size: Pair) -> Pair:
    """Number of chunks along height and width; the last of each may be smaller."""
    (height, width), (chunk_height, chunk_width) = grid_size, chunk_size
    return (height + chunk_height - 1) // chunk_height, (width + chunk_width - 1) // chunk_width


def default_chunk_size(grid_size: Pair, num_landmarks: int, two_d: bool) -> int:
    """n // num_landmarks for n tokens, its integer root (for both ways) if `two_d`, and at least 1."""
    length = grid_size[0] * grid_size[1] // num_landmarks
    if two_d:
        # Exact below 2**52, as the root of a float64 is correctly rounded.
        length = torch.sym_int(torch.sym_sqrt(length))
    if isinstance(length, int):
        return max(1, length)
    return torch.sym_max(1, length)  # type: ignore[return-value]  # a SymInt counts as an int


def chunk_token_counts(
    grid_size: Pair, chunk_size: Pair, chunk_overlap: Pair, padding: Tensor | None, device: torch.device
) -> Tensor:
    """Number of valid tokens of each chunk, int64 [C], or [B, C] with `padding` [B, height, width]."""
    (top, bottom), (left, right) = (
        _spans(*axis, device=device) for axis in zip(grid_size, chunk_size, chunk_overlap, strict=True)
    )
    if padding is None:
        return ((bottom - top)[:, None] * (right - left)).flatten()
    sums = F.pad((~padding).cumsum(1).cumsum(2), (1, 0, 1, 0))  # [B, height + 1, width + 1]
    rows = sums[:, bottom] - sums[:, top]
    return (rows[:, :, right] - rows[:, :, left]).flatten(1)


def _spans(size: int, chunk: int, overlap: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First token and one past the last of every chunk along one axis."""
    start = torch.arange((size + chunk - 1) // chunk, device=device) * chunk
    return (start - overlap).clamp(min=0), (start + (chunk + overlap)).clamp(max=size)


def t5_num_buckets(reach: int) -> int:
    """Number of T5 buckets for windows that reach `reach` = window + overlap tokens far."""
    return min(max(reach // 2, 16), 64)


def t5_buckets(offset: Tensor, num_buckets: int, max_distance: int, is_causal: bool = False) -> Tensor:
    """T5's bucket of each offset = key - query (Raffel et al., 2020).

    One for each small distance; then they widen with its logarithm, up to `max_distance`.
    Bidirectional buckets are halved between past and future; causal ones are all for the past. In float32, as
    the original.
    """
    if is_causal:
        base, distance = torch.zeros_like(offset), (-offset).clamp(min=0)
    else:
        num_buckets //= 2
        base, distance = (offset > 0) * num_buckets, offset.abs()
    exact = num_buckets // 2
    # Where all distances are below `exact` the logarithmic part is unused: both bounds only keep it finite.
    ratio = torch.log(distance.clamp(min=exact).float() / exact) / math.log(
        max(max_distance, exact + 1) / exact
    )
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return base + torch.where(distance < exact, distance, far)
