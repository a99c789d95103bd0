"""Attention functions: what an operator needs is put together here, and computed in `torch.ops.eva_attn`."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _direct, geometry
from .geometry import Pair, Size

if TYPE_CHECKING:
    from .modules import LandmarkProjection

_Op = Callable[..., Any]
# Each also as a function that torch knows nothing of, and that takes less than half of the host's time.
_EVA_ATTENTION: tuple[_Op, _Op] = (torch.ops.eva_attn.eva_attention.default, _direct.eva_attention)
_EVA_ATTENTION_QKVPACKED: tuple[_Op, _Op] = (
    torch.ops.eva_attn.eva_attention_qkvpacked.default,
    _direct.eva_attention_qkvpacked,
)
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_WEIGHT_NAMES = [
    f"{branch}_{name}"
    for branch in ("key", "query")
    for name in ("weight", "bias", "norm_weight", "norm_bias")
]
_NO_WEIGHTS: list[Tensor | None] = [None] * len(_WEIGHT_NAMES)
_SIZE_NAMES = (
    "grid_size",
    "window_size",
    "chunk_size",
    "overlap",
    "chunk_overlap",
    "num_prefix_tokens",
    "is_causal",
)
_ATTENTION_NAMES = (
    "relative_bias",
    "landmark_bias",
    "key_padding_mask",
    "dropout_seed",
    "dropout_p",
    "exclude_window_landmarks",
    "scale",
)

_DEVICES_WITH_KERNELS = {"cpu", "cuda", "meta"}


def _lacks_kernels(x: Tensor) -> bool:
    """Whether `x` is for `reference`: on a device without kernels, said once, or in an export to ONNX."""
    if not _has_kernels(x):
        _warn_of_plain(x.device.type)
        return True
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return is_traced and torch.onnx.is_in_onnx_export()


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda or x.device.type in _DEVICES_WITH_KERNELS


@functools.cache
def _warn_of_plain(device_type: str) -> None:
    warnings.warn(
        f"eva_attn has no kernels for {device_type}, and computes in plain PyTorch, with memory quadratic in "
        "the number of tokens",
        stacklevel=5,
    )


def eva_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_size: Size,
    chunk_size: Size,
    grid_size: Pair | None = None,
    num_prefix_tokens: int = 0,
    overlap: Size = 0,
    chunk_overlap: Size = 0,
    is_causal: bool = False,
    projection: "LandmarkProjection | None" = None,
    noise: Tensor | None = None,
    relative_bias: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    exclude_window_landmarks: bool = False,
    log_count_bias: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """EVA: one softmax over the keys of the query's window and the landmarks of all chunks.

    Source: Zheng, Yuan, Wang, Kong, "Efficient Attention via Control Variates", ICLR 2023, arXiv:2302.04542.
    Time and memory are linear in the number of tokens for a fixed number of landmarks. Accumulates in
    float32, for float64 input in float64.

    Args:
        query, key, value: [B, H, N, D], any strides; float32, float64, bfloat16 or float16. Attention runs
            within one sequence. Key and value may have fewer heads than query, each then for as many of its
            heads in a row (grouped-query attention); one head is read where it lies, more are copied.
        window_size: tokens of a window; (height, width) on a grid, where an int means both. Windows tile the
            tokens after the prefix.
        chunk_size: tokens that one landmark stands for, in the same form; C chunks tile the tokens after the
            prefix.
        grid_size: (height, width) of the tokens after the prefix, row-major. None: a sequence.
        num_prefix_tokens: leading tokens (class, registers) that attend to all tokens, that all attend to,
            and that are in no chunk.
        overlap: how many tokens further than its window a query sees on every side (causal: before it only).
        chunk_overlap: how many tokens further than its chunk a landmark summarises on every side.
        is_causal: a query sees no later key and only landmarks of chunks that ended before its own.
        projection: makes landmarks from the means of chunks; None leaves the means as they are ("identity").
            "tangent" makes them tangents of the chunk's log mass, see `LandmarkProjection`.
        noise: [B, H, C, D], added to the mean mu of the random features; None = 0. Gets no gradient.
        relative_bias: [H or 1, 2 (w + e) - 1], on a grid [H or 1, 2 (w_h + e_h) - 1, 2 (w_w + e_w) - 1], with
            w the window and e the overlap: added to the logits of window keys by offset = key - query,
            ascending.
        landmark_bias: [B, C], added to the logits of landmarks; -inf drops one. Gets no gradient.
        key_padding_mask: bool [B, N], True = padding: attended to by nobody, in no summary, output 0,
            whatever it holds. A sequence padded at its end comes out as it would alone if `chunk_overlap` is
            0; otherwise a chunk of padding alone that reaches valid tokens keeps its landmark.
        exclude_window_landmarks: drop a landmark where the query's window holds all the tokens that it stands
            for.
        log_count_bias: add the logarithm of the number of tokens that a landmark stands for to its logits;
            not with tangents, whose entropy stands in its place.
        dropout_p: probability of dropping each weight after the softmax, in [0, 1).
        scale: factor of the scores; None = D**-0.5.

    `noise`, `relative_bias` and `landmark_bias` have query's dtype or float32.

    Returns:
        [B, H, N, D] of query's dtype, a view of [B, N, H, D] memory. A query that may attend to nothing gets
        zeros.

    Raises:
        ValueError: a shape or value that is not supported, by name. TypeError: likewise a type or dtype.
    """
    if query.dim() != 4:
        raise ValueError(f"query: expected [B, H, N, D], got shape {tuple(query.shape)}")
    key, value = expand_heads(query, key, value)
    if log_count_bias:
        refuse_counts(log_count_bias, is_tangent(projection))
    sizes, attention = _options(
        query.shape[0],
        query.shape[2],
        query,
        window_size,
        chunk_size,
        grid_size,
        num_prefix_tokens,
        overlap,
        chunk_overlap,
        is_causal,
        relative_bias,
        landmark_bias,
        key_padding_mask,
        exclude_window_landmarks,
        log_count_bias,
        dropout_p,
        scale,
    )
    return _attend(_EVA_ATTENTION, (query, key, value), sizes, projection, noise, attention)


def eva_attention_qkvpacked(
    qkv: Tensor,
    *,
    window_size: Size,
    chunk_size: Size,
    grid_size: Pair | None = None,
    num_prefix_tokens: int = 0,
    overlap: Size = 0,
    chunk_overlap: Size = 0,
    is_causal: bool = False,
    projection: "LandmarkProjection | None" = None,
    noise: Tensor | None = None,
    relative_bias: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    exclude_window_landmarks: bool = False,
    log_count_bias: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """`eva_attention` of query, key and value packed as `qkv` [B, N, 3, H, D].

    The gradient comes back packed as well, so that neither way copies. Arguments and errors are those of
    `eva_attention`.
    """
    if qkv.dim() != 5:
        raise ValueError(f"qkv: expected [B, N, 3, H, D], got shape {tuple(qkv.shape)}")
    if log_count_bias:
        refuse_counts(log_count_bias, is_tangent(projection))
    sizes, attention = _options(
        qkv.shape[0],
        qkv.shape[1],
        qkv,
        window_size,
        chunk_size,
        grid_size,
        num_prefix_tokens,
        overlap,
        chunk_overlap,
        is_causal,
        relative_bias,
        landmark_bias,
        key_padding_mask,
        exclude_window_landmarks,
        log_count_bias,
        dropout_p,
        scale,
    )
    return _attend(_EVA_ATTENTION_QKVPACKED, (qkv,), sizes, projection, noise, attention)


def chunk_summary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_size: Size,
    grid_size: Pair | None = None,
    num_prefix_tokens: int = 0,
    chunk_overlap: Size = 0,
    is_causal: bool = False,
    projection: "LandmarkProjection | None" = None,
    noise: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    mean_divisor: int = 0,
) -> tuple[Tensor, ...]:
    """The first half of `eva_attention`: landmark keys and values, each [B, H, C, D] of query's dtype, and of
    tangents their entropy [B, H, C], float32 (float64 for float64).

    `mean_divisor` stands in for the number of valid tokens in the means of every chunk; 0 = that number.
    Other arguments and errors are those of `eva_attention`.
    """
    if query.dim() != 4:
        raise ValueError(f"query: expected [B, H, N, D], got shape {tuple(query.shape)}")
    options = {
        "grid_size": geometry.grid(grid_size, query.shape[2], num_prefix_tokens),
        "chunk_size": geometry.pair("chunk_size", chunk_size, grid_size, 1),
        "chunk_overlap": geometry.pair("chunk_overlap", chunk_overlap, grid_size, 0),
        "num_prefix_tokens": num_prefix_tokens,
        "is_causal": is_causal,
        "noise": noise,
        "key_padding_mask": key_padding_mask,
        "scale": scale,
        "mean_divisor": mean_divisor,
    }
    tensors, tangent = (query, key, value), is_tangent(projection)
    if _lacks_kernels(query):
        return _plain("chunk_summary", tensors, {**options, "projection": projection})
    options |= {"tangent": tangent, **projection_arguments(projection)}
    landmark_key, landmark_value, *_, landmark_entropy = _call(
        torch.ops.eva_attn.chunk_summary, tensors, options
    )
    if tangent:
        return landmark_key, landmark_value, landmark_entropy
    return landmark_key, landmark_value


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmark_key: Tensor | None = None,
    landmark_value: Tensor | None = None,
    landmark_entropy: Tensor | None = None,
    *,
    window_size: Size,
    chunk_size: Size = 1,
    grid_size: Pair | None = None,
    num_prefix_tokens: int = 0,
    overlap: Size = 0,
    chunk_overlap: Size = 0,
    is_causal: bool = False,
    relative_bias: Tensor | None = None,
    landmark_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    exclude_window_landmarks: bool = False,
    log_count_bias: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """The second half of `eva_attention`: attention to the window and to landmarks [B, H, C, D] of chunks of
    `chunk_size`.

    Without landmarks, plain window attention. `landmark_entropy` [B, H, C], in query's dtype or float32, is
    added to the logits of landmarks and gets a gradient. Other arguments, result and errors are those of
    `eva_attention`.
    """
    if query.dim() != 4:
        raise ValueError(f"query: expected [B, H, N, D], got shape {tuple(query.shape)}")
    refuse_counts(log_count_bias, landmark_entropy is not None)
    sizes, attention = _options(
        query.shape[0],
        query.shape[2],
        query,
        window_size,
        chunk_size,
        grid_size,
        num_prefix_tokens,
        overlap,
        chunk_overlap,
        is_causal,
        relative_bias,
        landmark_bias,
        key_padding_mask,
        exclude_window_landmarks,
        log_count_bias and landmark_key is not None,
        dropout_p,
        scale,
    )
    options = dict(zip(_SIZE_NAMES + _ATTENTION_NAMES, sizes + attention, strict=True))
    options["landmark_entropy"] = landmark_entropy
    tensors = (query, key, value, landmark_key, landmark_value)
    if _lacks_kernels(query):
        return _plain("window_attention", tensors, options)
    return _call(torch.ops.eva_attn.window_attention, tensors, options)[0]


def _attend(
    ops: tuple[_Op, _Op],
    tensors: Sequence[Tensor],
    sizes: tuple[Any, ...],
    projection: "LandmarkProjection | None",
    noise: Tensor | None,
    attention: tuple[Any, ...],
) -> Tensor:
    """The output of both halves by one of `ops`, whose other arguments are in the schema's order."""
    op, direct = ops
    first = tensors[0]
    is_eager = _is_eager(first)
    if not is_eager and _lacks_kernels(first):
        options = dict(zip(_SIZE_NAMES + _ATTENTION_NAMES, sizes + attention, strict=True))
        options |= {"projection": projection, "noise": noise}
        return _plain("eva_attention" if len(tensors) == 3 else "eva_attention_qkvpacked", tensors, options)
    weights, norm_eps = _projection_weights(projection)
    if is_eager or not _is_distributed(first):
        # By position: to parse two dozen names takes longer than to launch a kernel.
        arguments = (*tensors, *sizes, *weights, noise, *attention, norm_eps, 0, is_tangent(projection))
        return direct(*arguments) if is_eager else op(*arguments)[0]
    names = (*_SIZE_NAMES, *_WEIGHT_NAMES, "noise", *_ATTENTION_NAMES, "norm_eps", "tangent")
    values = (*sizes, *weights, noise, *attention, norm_eps, is_tangent(projection))
    options = dict(zip(names, values, strict=True))
    # What comes beside the output is not laid out by batch and head.
    return _call(lambda *x, **named: op(*x, **named)[:1], tensors, options)[0]


def _plain(name: str, tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Any:
    """`reference`'s function of that name, which draws a dropout seed itself."""
    from . import reference

    options.pop("dropout_seed", None)
    return getattr(reference, name)(*tensors, **options)


def _call(op: Callable[..., Any], tensors: Sequence[Any], options: dict[str, Any]) -> Sequence[Tensor]:
    """`op`, on the share of each process where the first of `tensors` is a DTensor."""
    if _is_distributed(tensors[0]):
        from .distributed import call_on_shards

        return call_on_shards(op, tensors, options)
    return op(*tensors, **options)


def _is_eager(x: Tensor) -> bool:
    """Whether kernels take `x` and nobody looks at calls of functions on it: no compiler, mode or class."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN_TENSORS
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.jit.is_tracing()
        and _has_kernels(x)
    )


def _is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor, whose class takes long to import."""
    return hasattr(x, "device_mesh")


def expand_heads(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """`tensors` [B, fewer heads, N, D] with the heads of `query`, each head for those in a row.

    Others are left for the operator to refuse.
    """
    heads = query.shape[1]

    def expand(x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] in (0, heads) or heads % x.shape[1]:
            return x
        return x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)

    return [expand(x) for x in tensors]


def draw_noise(shape: Sequence[int], grid_size: Pair, chunk_size: Pair, device: torch.device) -> Tensor:
    """Of random features in training: N(0, 1), float32 [B, H, C, D], for queries of `shape` [B, H, N, D]."""
    batch, heads, _, head_dim = shape
    rows, columns = geometry.chunk_grid(grid_size, chunk_size)
    return torch.randn(batch, heads, rows * columns, head_dim, device=device, dtype=torch.float32)


def rotary_embedding(x: Tensor, position: Tensor | None = None, *, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding of queries or keys: [B, H, N, D], D even, in its shape and dtype.

    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864. Channels i and i + D / 2 are a pair, as in Llama,
    and turn by position * base ** (-2 i / D), in float32 (float64 for float64 input).

    Args:
        position: integers [N] or [B, N], of each token; None = 0 to N - 1.
    """
    half, odd = divmod(x.shape[-1], 2)
    if x.dim() != 4 or odd:
        raise ValueError(f"x: expected [B, H, N, D] with an even D, got shape {tuple(x.shape)}")
    if position is None:
        position = torch.arange(x.shape[2], device=x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = position.to(dtype).unsqueeze(-1) * frequency
    if position.dim() == 2:
        angle = angle.unsqueeze(1)  # [B, 1, N, D / 2]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def draw_dropout_seed(device: torch.device) -> Tensor:
    """The seed of one call's dropout: an int64 scalar on `device`, from its generator."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def _options(
    batch: int,
    num_tokens: int,
    query: Tensor,
    window_size: Size,
    chunk_size: Size,
    grid_size: Pair | None,
    num_prefix_tokens: int,
    overlap: Size,
    chunk_overlap: Size,
    is_causal: bool,
    relative_bias: Tensor | None,
    landmark_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    exclude_window_landmarks: bool,
    log_count_bias: bool,
    dropout_p: float,
    scale: float | None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The operators' form of the arguments of joint attention, as `_SIZE_NAMES` and `_ATTENTION_NAMES` list
    them: all geometry as on a grid, counts in `landmark_bias`."""
    grid = geometry.grid(grid_size, num_tokens, num_prefix_tokens)
    chunk = geometry.pair("chunk_size", chunk_size, grid_size, 1)
    chunk_reach = geometry.pair("chunk_overlap", chunk_overlap, grid_size, 0)
    if log_count_bias:
        landmark_bias = _add_log_counts(
            landmark_bias,
            batch,
            num_tokens,
            query,
            grid,
            chunk,
            chunk_reach,
            num_prefix_tokens,
            key_padding_mask,
        )
    if relative_bias is not None and grid_size is None and relative_bias.dim() == 2:
        relative_bias = relative_bias.unsqueeze(1)
    sizes = (
        grid,
        geometry.pair("window_size", window_size, grid_size, 1),
        chunk,
        geometry.pair("overlap", overlap, grid_size, 0),
        chunk_reach,
        num_prefix_tokens,
        is_causal,
    )
    attention = (
        relative_bias,
        landmark_bias,
        key_padding_mask,
        draw_dropout_seed(query.device) if dropout_p > 0 else None,
        dropout_p,
        exclude_window_landmarks,
        scale,
    )
    return sizes, attention


def _add_log_counts(
    landmark_bias: Tensor | None,
    batch: int,
    num_tokens: int,
    query: Tensor,
    grid: Pair,
    chunk: Pair,
    chunk_overlap: Pair,
    num_prefix_tokens: int,
    key_padding_mask: Tensor | None,
) -> Tensor | None:
    """`landmark_bias` plus the logarithm of the number of valid tokens of each chunk: [B, C].

    Arguments that cannot be counted with are left to the operator, which refuses them by name.
    """
    height, width = grid
    if (
        chunk[0] < 1
        or chunk[1] < 1
        or height < 0
        or width < 0
        or height * width + num_prefix_tokens != num_tokens
    ):
        return landmark_bias
    padding = None
    if key_padding_mask is not None:
        if (
            key_padding_mask.dtype != torch.bool
            or key_padding_mask.shape != (batch, num_tokens)
            or key_padding_mask.device != query.device
        ):
            return landmark_bias
        padding = key_padding_mask[:, num_prefix_tokens:].reshape(batch, height, width)
    counts = geometry.chunk_token_counts(grid, chunk, chunk_overlap, padding, query.device)
    log_counts = counts.to(torch.float64 if query.dtype == torch.float64 else torch.float32).log()
    log_counts = log_counts.expand(batch, log_counts.shape[-1])
    if landmark_bias is None:
        return log_counts
    if (
        landmark_bias.shape != log_counts.shape
        or not landmark_bias.is_floating_point()
        or landmark_bias.device != query.device
    ):
        return landmark_bias
    return landmark_bias + log_counts


def projection_arguments(projection: "LandmarkProjection | None") -> dict[str, Any]:
    """The operators' arguments for a projection, by name."""
    weights, norm_eps = _projection_weights(projection)
    return {**dict(zip(_WEIGHT_NAMES, weights, strict=True)), "norm_eps": norm_eps}


def _projection_weights(projection: "LandmarkProjection | None") -> tuple[list[Tensor | None], float]:
    """Weights in the order of `_WEIGHT_NAMES`, and the LayerNorms' epsilon."""
    if projection is None:
        return _NO_WEIGHTS, 1e-5
    if not isinstance(projection, torch.nn.Module):
        raise TypeError(f"projection: expected a LandmarkProjection or None, got {projection!r}")
    weights: list[Tensor | None] = []
    norm_eps = 1e-5
    # From their registries, unless something else stands in for them, as a parametrization does: ten of
    # `Module`'s own searches take as long as to launch a kernel.
    modules = projection._modules
    try:
        branches: tuple[Any, Any] = (modules["key"], modules["query"])
    except KeyError:
        branches = projection.key, projection.query
    for branch in branches:
        if branch is None:
            weights += (None, None, None, None)
            continue
        for layer in branch._modules.values():
            parameters = layer._parameters
            try:
                weights += (parameters["weight"], parameters["bias"])
            except KeyError:
                weights += (layer.weight, layer.bias)
        if len(branch._modules) > 1:
            norm_eps = layer.eps
        else:
            weights += (None, None)
    return weights, norm_eps


def is_tangent(projection: "LandmarkProjection | None") -> bool:
    """Whether landmarks are tangents, which have no projection."""
    return getattr(projection, "kind", None) == "tangent"


def refuse_counts(log_count_bias: bool, tangent: bool) -> None:
    """ValueError for counts of tokens beside the entropy of tangents."""
    if log_count_bias and tangent:
        raise ValueError(
            "log_count_bias: expected False with projection = 'tangent', whose entropy stands in for it"
        )
