"""FLOP counts of the operators, for `torch.utils.flop_counter`.

As in torch's own formulas, these are products of matrices alone, a multiplication and an addition each, with
scores computed again in backward passes, and as if there were no masks, causality or borders of grids.
Importing this registers them.
"""

from typing import Any, TypeAlias

import torch
from torch.utils.flop_counter import register_flop_formula

from .geometry import Pair, chunk_grid

Shape: TypeAlias = torch.Size
_BACKWARD = 5  # products of a backward pass for each two of a forward pass


def _joint(
    query: Shape, num_landmarks: int, grid_size: Pair, window_size: Pair, overlap: Pair, prefix: int
) -> int:
    """Scores, and weighted sums of values: 2 products for every query [B, H, N, D] and what it sees."""
    batch, heads, num_tokens, head_dim = query
    height, width = (
        torch.sym_min(size, window + 2 * beyond)
        for size, window, beyond in zip(grid_size, window_size, overlap, strict=True)
    )
    pairs = (num_tokens - prefix) * (height * width + prefix + num_landmarks) + prefix * num_tokens
    return 2 * 2 * batch * heads * head_dim * pairs  # type: ignore[return-value]  # a SymInt counts as an int


def _summary(query: Shape, grid_size: Pair, chunk_size: Pair, chunk_overlap: Pair, products: int) -> int:
    """Weights, and weighted sums of values, of tangents also of keys: products for every token of a chunk."""
    batch, heads, _, head_dim = query
    rows, columns = (
        size + 2 * beyond * chunks
        for size, beyond, chunks in zip(
            grid_size, chunk_overlap, chunk_grid(grid_size, chunk_size), strict=True
        )
    )
    return 2 * products * batch * heads * head_dim * rows * columns


def _projection(query: Shape, num_landmarks: int, *weights: Shape | None) -> int:
    """One product with each weight [D, D] for every landmark."""
    batch, heads, _, head_dim = query
    return 2 * batch * heads * num_landmarks * head_dim**2 * sum(weight is not None for weight in weights)


def _num_landmarks(grid_size: Pair, chunk_size: Pair) -> int:
    rows, columns = chunk_grid(grid_size, chunk_size)
    return rows * columns


def _unpacked(qkv: Shape) -> Shape:
    """[B, N, 3, H, D] -> the shape of queries [B, H, N, D]."""
    batch, num_tokens, _, heads, head_dim = qkv
    return torch.Size((batch, heads, num_tokens, head_dim))


def _summary_flops(
    query: Shape,
    *,
    grid_size: Pair,
    chunk_size: Pair,
    chunk_overlap: Pair = (0, 0),
    key_weight: Shape | None = None,
    query_weight: Shape | None = None,
    tangent: bool = False,
    backward: bool = False,
    **_: Any,
) -> int:
    members = _summary(query, grid_size, chunk_size, chunk_overlap, 3 if tangent else 2)
    projection = _projection(query, _num_landmarks(grid_size, chunk_size), key_weight, query_weight)
    return members * _BACKWARD // 2 + 2 * projection if backward else members + projection


def _window_flops(
    query: Shape,
    num_landmarks: int,
    *,
    grid_size: Pair,
    window_size: Pair,
    overlap: Pair = (0, 0),
    num_prefix_tokens: int = 0,
    backward: bool = False,
    **_: Any,
) -> int:
    forward = _joint(query, num_landmarks, grid_size, window_size, overlap, num_prefix_tokens)
    return forward * _BACKWARD // 2 if backward else forward


def _attention_flops(query: Shape, **options: Any) -> int:
    num_landmarks = _num_landmarks(options["grid_size"], options["chunk_size"])
    return _summary_flops(query, **options) + _window_flops(query, num_landmarks, **options)


def _by_name(op: Any, num_inputs: int, options: tuple[Any, ...]) -> dict[str, Any]:
    """Options that an operator was given by position, after its inputs."""
    names = [argument.name for argument in op.default._schema.arguments[num_inputs:]]
    return dict(zip(names, options, strict=False))


@register_flop_formula(torch.ops.eva_attn.eva_attention)
def _eva_attention(
    query: Shape, key: Shape, value: Shape, *options: Any, out_shape: Any = None, **named: Any
) -> int:
    return _attention_flops(query, **_by_name(torch.ops.eva_attn.eva_attention, 3, options), **named)


@register_flop_formula(torch.ops.eva_attn.eva_attention_backward)
def _eva_attention_backward(
    grad: Shape, query: Shape, *saved: Any, out_shape: Any = None, **options: Any
) -> int:
    return _attention_flops(query, backward=True, **options)


@register_flop_formula(torch.ops.eva_attn.eva_attention_qkvpacked)
def _eva_attention_qkvpacked(qkv: Shape, *options: Any, out_shape: Any = None, **named: Any) -> int:
    options_by_name = _by_name(torch.ops.eva_attn.eva_attention_qkvpacked, 1, options)
    return _attention_flops(_unpacked(qkv), **options_by_name, **named)


@register_flop_formula(torch.ops.eva_attn.eva_attention_qkvpacked_backward)
def _eva_attention_qkvpacked_backward(
    grad: Shape, qkv: Shape, *saved: Any, out_shape: Any = None, **options: Any
) -> int:
    return _attention_flops(_unpacked(qkv), backward=True, **options)


@register_flop_formula(torch.ops.eva_attn.chunk_summary)
def _chunk_summary(query: Shape, key: Shape, value: Shape, *, out_shape: Any = None, **options: Any) -> int:
    return _summary_flops(query, **options)


@register_flop_formula(torch.ops.eva_attn.chunk_summary_backward)
def _chunk_summary_backward(
    grad_key: Shape,
    grad_value: Shape,
    grad_entropy: Shape,
    query: Shape,
    *saved: Any,
    out_shape: Any = None,
    **options: Any,
) -> int:
    return _summary_flops(query, backward=True, **options)


@register_flop_formula(torch.ops.eva_attn.window_attention)
def _window_attention(
    query: Shape,
    key: Shape,
    value: Shape,
    landmark_key: Shape | None = None,
    landmark_value: Shape | None = None,
    *,
    out_shape: Any = None,
    **options: Any,
) -> int:
    return _window_flops(query, 0 if landmark_key is None else landmark_key[2], **options)


@register_flop_formula(torch.ops.eva_attn.window_attention_backward)
def _window_attention_backward(
    grad: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    landmark_key: Shape | None,
    *saved: Any,
    out_shape: Any = None,
    **options: Any,
) -> int:
    return _window_flops(query, 0 if landmark_key is None else landmark_key[2], backward=True, **options)


@register_flop_formula(torch.ops.eva_attn.decode_step)
def _decode_step(
    query: Shape,
    key: Shape,
    value: Shape,
    window_key: Shape,
    window_value: Shape,
    landmark_key: Shape,
    *state: Any,
    chunk_size: int,
    key_weight: Shape | None = None,
    query_weight: Shape | None = None,
    landmark_entropy: Shape | None = None,
    out_shape: Any = None,
    **options: Any,
) -> int:
    """Of a state that is full, and with a chunk's share of closing it."""
    batch, heads, _, head_dim = query
    joint = 2 * 2 * batch * heads * head_dim * (window_key[2] + landmark_key[2])
    products = 2 if landmark_entropy is None else 3
    summary = (
        2 * products * batch * heads * head_dim
        + _projection(query, 1, key_weight, query_weight) // chunk_size
    )
    return joint + summary
