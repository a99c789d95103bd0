"""EVA in plain PyTorch: the oracle that the compiled operators are tested against.

The same functions as `eva_attn.functional`, on any device and for every floating dtype, differentiable twice;
they refuse what those refuse, in the same words. They build the dense [N, N + C] logits of the joint softmax
and so read like the formulas of Zheng et al., "Efficient Attention via Control Variates" (ICLR 2023). Half
precision is computed in float32; landmarks are rounded to the input's dtype once, outputs once.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, geometry
from .functional import draw_dropout_seed
from .geometry import Pair, Size

if TYPE_CHECKING:
    from .modules import LandmarkProjection

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _checked(function: _Function) -> _Function:
    """`function`, refusing what its namesake in `functional` refuses: that one runs first, on the meta
    device, except in compiled code."""
    operator, signature = getattr(functional, function.__name__), inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        device = next(iter(given.values())).device
        on_meta: dict[int, Any] = {}
        with torch.inference_mode():  # below autograd, which torch.func does not let an operator's pass
            for name, value in given.items():
                for x in value.parameters() if isinstance(value, nn.Module) else (value,):
                    if isinstance(x, Tensor):
                        if x.device != device:
                            raise ValueError(f"{name} must be on the query's device {device}, got {x.device}")
                        on_meta[id(x)] = torch.empty(x.shape, dtype=x.dtype, device="meta")
            operator(**copy.deepcopy(given, on_meta))
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


@_checked
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
    """See `eva_attn.eva_attention`."""
    key, value = functional.expand_heads(query, key, value)
    landmarks = chunk_summary(
        query,
        key,
        value,
        chunk_size=chunk_size,
        grid_size=grid_size,
        num_prefix_tokens=num_prefix_tokens,
        chunk_overlap=chunk_overlap,
        is_causal=is_causal,
        projection=projection,
        noise=noise,
        key_padding_mask=key_padding_mask,
        scale=scale,
    )
    return window_attention(
        query,
        key,
        value,
        *landmarks,
        window_size=window_size,
        chunk_size=chunk_size,
        grid_size=grid_size,
        num_prefix_tokens=num_prefix_tokens,
        overlap=overlap,
        chunk_overlap=chunk_overlap,
        is_causal=is_causal,
        relative_bias=relative_bias,
        landmark_bias=landmark_bias,
        key_padding_mask=key_padding_mask,
        exclude_window_landmarks=exclude_window_landmarks,
        log_count_bias=log_count_bias,
        dropout_p=dropout_p,
        scale=scale,
    )


@_checked
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
    """See `eva_attn.eva_attention_qkvpacked`."""
    query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
    return eva_attention(
        query,
        key,
        value,
        window_size=window_size,
        chunk_size=chunk_size,
        grid_size=grid_size,
        num_prefix_tokens=num_prefix_tokens,
        overlap=overlap,
        chunk_overlap=chunk_overlap,
        is_causal=is_causal,
        projection=projection,
        noise=noise,
        relative_bias=relative_bias,
        landmark_bias=landmark_bias,
        key_padding_mask=key_padding_mask,
        exclude_window_landmarks=exclude_window_landmarks,
        log_count_bias=log_count_bias,
        dropout_p=dropout_p,
        scale=scale,
    )


@_checked
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
    """See `eva_attn.functional.chunk_summary`. A chunk of padding alone has mean 0 and landmark value 0."""
    num_tokens = query.shape[2]
    grid = geometry.grid(grid_size, num_tokens, num_prefix_tokens)
    chunk = geometry.pair("chunk_size", chunk_size, grid_size, 1)
    reach = geometry.pair("chunk_overlap", chunk_overlap, grid_size, 0)
    scale = query.shape[3] ** -0.5 if scale is None else scale

    q, k, v = (_computed(x, key_padding_mask)[:, :, num_prefix_tokens:] for x in (query, key, value))
    member = _valid_members(
        grid, chunk, reach, num_prefix_tokens, key_padding_mask, query.device
    )  # [1 or B, C, n]
    divisor = mean_divisor or member.sum(-1)[:, None, :, None].clamp(min=1)
    mean = member.to(q.dtype)[:, None]
    landmark_key, landmark_query = mean @ k / divisor, mean @ q / divisor  # [B, H, C, D]
    tangent, key_only = functional.is_tangent(projection), False
    if projection is not None:
        key_only = projection.key is not None and projection.query is None
        landmark_key, landmark_query = (
            _project(landmark_key, projection.key),
            _project(landmark_query, projection.query),
        )

    if tangent:
        omega = landmark_query
    elif key_only:
        omega = torch.zeros_like(landmark_key)
    else:
        omega = (1.0 if is_causal else 0.5) * (landmark_query + landmark_key)
    if noise is not None:
        omega = omega + noise.detach().to(omega.dtype)
    logits = omega @ k.mT  # [B, H, C, n]
    if not tangent:
        logits = logits - k.square().sum(-1)[:, :, None, :] / 2
    weights = _softmax(scale * logits, member[:, None])
    landmark_value = weights @ v
    if tangent:
        entropy = -torch.xlogy(weights, weights.clamp(min=torch.finfo(weights.dtype).tiny)).sum(-1)
        return (weights @ k).to(query.dtype), landmark_value.to(query.dtype), entropy
    return landmark_key.to(query.dtype), landmark_value.to(query.dtype)


@_checked
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
    """See `eva_attn.functional.window_attention`."""
    num_tokens = query.shape[2]
    grid = geometry.grid(grid_size, num_tokens, num_prefix_tokens)
    window = geometry.pair("window_size", window_size, grid_size, 1)
    chunk = geometry.pair("chunk_size", chunk_size, grid_size, 1)
    reach = geometry.pair("overlap", overlap, grid_size, 0)
    chunk_reach = geometry.pair("chunk_overlap", chunk_overlap, grid_size, 0)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    position = torch.arange(num_tokens, device=query.device)

    q, k, v = (_computed(x, key_padding_mask) for x in (query, key, value))
    logits = scale * q @ k.mT  # [B, H, N, N]
    if relative_bias is not None:
        logits = logits + _offset_bias(relative_bias.to(q.dtype), grid, window, reach, num_prefix_tokens)
    in_window = _windows(grid, window, reach, query.device)  # [n, n]
    visible = F.pad(in_window, (num_prefix_tokens, 0, num_prefix_tokens, 0), value=True)[None]  # [1, N, N]
    if is_causal:
        visible = visible & (position <= position[:, None])
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None, :]

    if landmark_key is not None and landmark_value is not None:
        landmark_logits = scale * q @ landmark_key.to(q.dtype).mT  # [B, H, N, C]
        member = _valid_members(grid, chunk, chunk_reach, num_prefix_tokens, key_padding_mask, query.device)
        if landmark_bias is not None:
            landmark_logits = landmark_logits + landmark_bias.detach().to(q.dtype)[:, None, None, :]
        if landmark_entropy is not None:
            landmark_logits = landmark_logits + landmark_entropy.to(q.dtype)[:, :, None, :]
        if log_count_bias:
            landmark_logits = landmark_logits + member.sum(-1).to(q.dtype).log()[:, None, None, :]
        seen = member.any(-1)[:, None, :] & (position >= num_prefix_tokens)[:, None]  # [1 or B, N, C]
        if is_causal:
            seen = seen & (torch.arange(member.shape[1], device=query.device) < position[:, None] // chunk[1])
        if exclude_window_landmarks:
            outside = torch.einsum("bcj,ij->bic", member.float(), (~in_window).float()) > 0
            seen = seen & F.pad(outside, (0, 0, num_prefix_tokens, 0))
        visible = torch.cat([visible.expand(seen.shape[0], -1, -1), seen], -1)
        logits = torch.cat([logits, landmark_logits], -1)
        v = torch.cat([v, landmark_value.to(v.dtype)], 2)
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, :, None]

    weights = _softmax(logits, visible[:, None])
    if dropout_p > 0:
        uniform = philox_uniform(draw_dropout_seed(query.device), weights.shape)
        weights = weights.masked_fill(uniform < dropout_p, 0.0) / (1 - dropout_p)
    output = (weights @ v).to(query.dtype)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _computed(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """`x` [B, H, N, D] in the dtype of the computation, 0 at padding, whatever it holds there."""
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    return x if x.dtype == torch.float64 else x.float()


def _softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible entries; a row without any is 0 and passes no gradient."""
    visible = visible & ~logits.isneginf()
    logits = logits.masked_fill(~visible, -torch.inf)
    logits = logits.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return logits.softmax(-1).masked_fill(~visible, 0.0)


def _project(mean: Tensor, branch: Iterable[Any] | None) -> Tensor:
    """A_k or A_q: Linear, then LayerNorm where there is one, in the dtype of `mean`."""
    if branch is None:
        return mean
    linear, *norms = branch
    x = F.linear(mean, linear.weight.to(mean.dtype), linear.bias.to(mean.dtype))
    for norm in norms:
        x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return x


def _boxes(rows: Tensor, columns: Tensor) -> Tensor:
    """Outer product of the spans [a, height] and [b, width] along both axes: [a b, height width]."""
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _span(start: Tensor, length: int, reach: int, size: int) -> Tensor:
    """Which of `size` positions lie in [start - reach, start + length + reach): [len(start), size]."""
    position = torch.arange(size, device=start.device)
    return (position >= start[:, None] - reach) & (position < start[:, None] + length + reach)


def _windows(grid: Pair, window: Pair, overlap: Pair, device: torch.device) -> Tensor:
    """Whether key j lies in the (extended) window of query i: [n, n]."""
    spans = []
    for size, length, reach in zip(grid, window, overlap, strict=True):
        spans.append(_span(torch.arange(size, device=device) // length * length, length, reach, size))
    return _boxes(*spans)


def _valid_members(
    grid: Pair,
    chunk: Pair,
    overlap: Pair,
    num_prefix_tokens: int,
    key_padding_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Whether token j after the prefix is a member of chunk c and not padding: [1 or B, C, n]."""
    spans = []
    for size, length, reach in zip(grid, chunk, overlap, strict=True):
        spans.append(_span(torch.arange(0, size, length, device=device), length, reach, size))
    member = _boxes(*spans)[None]
    return member if key_padding_mask is None else member & ~key_padding_mask[:, None, num_prefix_tokens:]


def _offset_bias(
    relative_bias: Tensor, grid: Pair, window: Pair, overlap: Pair, num_prefix_tokens: int
) -> Tensor:
    """The bias of each pair of tokens from the table of offsets, 0 where one is a prefix token: [H or 1, N,
    N]."""
    if relative_bias.dim() == 2:
        relative_bias = relative_bias[:, None]
    index = []
    for size, length, reach in zip(grid, window, overlap, strict=True):
        position = torch.arange(size, device=relative_bias.device)
        far = length + reach - 1
        # Offsets beyond the table belong to pairs that no window joins.
        index.append((position - position[:, None]).clamp(-far, far) + far)
    bias = relative_bias[
        :, index[0][:, None, :, None], index[1][None, :, None, :]
    ]  # [H, height, width, height, width]
    return F.pad(bias.flatten(3).flatten(1, 2), (num_prefix_tokens, 0, num_prefix_tokens, 0))


def philox_uniform(seed: Tensor, shape: torch.Size) -> Tensor:
    """Uniform float64 numbers in [0, 1) for the entries (b, h, i, m) of `shape`, that dropout compares with
    its probability.

    Word m % 4 of Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with
    the 64-bit `seed` as key and the counter (m // 4, i, b H + h, 0), over 2^32.
    """
    batch, heads, rows, columns = shape
    counter = torch.meshgrid(
        *(torch.arange(size, device=seed.device) for size in (batch * heads, rows, (columns + 3) // 4)),
        indexing="ij",
    )
    words = philox4x32(seed, [counter[2], counter[1], counter[0], torch.zeros_like(counter[0])])
    return torch.stack(words, -1).flatten(2)[..., :columns].reshape(shape) * 2.0**-32


def philox4x32(seed: Tensor, counter: list[Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32: four 32-bit words, held in int64, from the four of `counter`."""
    low32 = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low32, (seed >> 32) & low32
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return [c0, c1, c2, c3]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of the product of 32-bit numbers, by halves, as the whole overflows int64."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & 0xFFFFFFFF
