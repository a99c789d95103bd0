"""What attention is compared with: peers on the same numbers, each as its own user would call it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import eva_attn

from .cases import Case, eva_flops, softmax_flops, window_flops

DENSE_BYTES = 2**30  # of the dense formula's logits [B, H, N, N + C] in float32: not beyond this


@dataclass(frozen=True)
class Peer:
    """A way to compute attention: `function()` gives the output, differentiable in `leaves`.

    `flops(case, backward)` counts the operations of the mathematics, a head of one sequence.
    """

    function: Callable[[], Tensor]
    leaves: list[Tensor]
    flops: Callable[[Case, bool], float]


def softmax_backends(device_type: str, dtype: torch.dtype) -> dict[str, SDPBackend | None]:
    """Softmax by the backends of `scaled_dot_product_attention`, None being its own choice; the first is what
    all peers are compared with.
    """
    if device_type == "cuda" and dtype.itemsize == 2:
        return {
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "flash-attention-2": SDPBackend.FLASH_ATTENTION,
        }
    return {"sdpa": None}


def make_peers(
    case: Case, device: torch.device, dtype: torch.dtype, chosen: list[str] | None = None
) -> dict[str, Peer]:
    """The peers that can compute `case` on `device`, all or the chosen ones.

    EVA has a linear-layernorm projection and, on grids, a trained bias per offset, as in the paper's vision
    models.
    """
    generator = torch.Generator().manual_seed(0)
    batch, heads = case.batch_and_heads(device.type)
    packed = torch.randn(batch, case.tokens, 3, heads, case.head_dim, generator=generator).to(device, dtype)
    bias: Tensor | None = None
    if not case.is_sequence:
        bias = (
            (torch.randn(case.bias_shape(heads), generator=generator) / 2).to(device, dtype).requires_grad_()
        )
    projection = eva_attn.LandmarkProjection(case.head_dim, device=device, dtype=dtype)
    packed.requires_grad_()
    query, key, value = (x.transpose(1, 2).contiguous().requires_grad_() for x in packed.detach().unbind(2))
    split = [query, key, value]
    biases = [] if bias is None else [bias]
    trained = [*biases, *projection.parameters()]
    geometry = case.geometry()
    if device.type == "cuda":
        torch.compiler.reset()  # past a number of shapes compiled code falls back to eager

    peers = {
        "eva": Peer(
            lambda: eva_attn.eva_attention_qkvpacked(
                packed, projection=projection, relative_bias=bias, **geometry
            ),
            [packed, *trained],
            eva_flops,
        ),
        **{
            name: Peer(softmax_attention(query, key, value, case.is_causal, backend), split, softmax_flops)
            for name, backend in softmax_backends(device.type, dtype).items()
        },
        "window only": Peer(
            lambda: eva_attn.functional.window_attention(
                query,
                key,
                value,
                relative_bias=bias,
                **{k: v for k, v in geometry.items() if k != "chunk_size"},
            ),
            [*split, *biases],
            window_flops,
        ),
    }
    if not case.is_causal:
        augmented = augmented_sdpa if device.type == "cpu" else torch.compile(augmented_sdpa, dynamic=False)
        peers["augmented sdpa"] = Peer(
            lambda: augmented(query, key, value, case.grid, case.window, case.chunk, projection, bias),
            [*split, *trained],
            eva_flops,
        )
    if 4 * batch * heads * case.tokens * (case.tokens + case.landmarks) <= DENSE_BYTES:
        peers["dense formula"] = Peer(
            lambda: eva_attn.reference.eva_attention(
                query, key, value, projection=projection, relative_bias=bias, **geometry
            ),
            [*split, *trained],
            eva_flops,
        )
    if device.type == "cuda" and case.tokens <= 2**14:  # its block mask is made through an N x N one
        peers["flex_attention window"] = Peer(flex_window(case, query, key, value), split, window_flops)
    return {name: peer for name, peer in peers.items() if chosen is None or name in chosen}


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, backend: SDPBackend | None
) -> Callable[[], Tensor]:
    """`scaled_dot_product_attention` by one backend, or by the one it chooses itself."""

    def call() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    return call if backend is None else sdpa_kernel(backend)(call)


def augmented_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    chunk: tuple[int, int],
    projection: eva_attn.LandmarkProjection,
    relative_bias: Tensor | None,
) -> Tensor:
    """EVA as one writes it without a kernel: gather windows, append the landmarks to their keys, call SDPA.

    q, k, v [B, H, N, D]; windows and chunks tile the grid; projection of kind "linear-layernorm".
    """
    assert projection.key is not None
    assert projection.query is not None
    batch, heads, _, dim = query.shape
    scale = dim**-0.5
    q, k, v = (blocks(x, grid, chunk) for x in (query, key, value))  # [B, H, C, r, D]
    landmark_key, landmark_query = projection.key(k.mean(3)), projection.query(q.mean(3))
    omega = (landmark_key + landmark_query).unsqueeze(3) / 2
    weights = (scale * ((k * omega).sum(-1) - k.square().sum(-1) / 2)).softmax(-1)
    landmark_value = (weights.unsqueeze(3) @ v).squeeze(3)  # [B, H, C, D]

    q, k, v = (blocks(x, grid, window) for x in (query, key, value))  # [B, H, G, w, D]
    windows = q.shape[2]

    def for_each_window(landmarks: Tensor) -> Tensor:
        return landmarks.unsqueeze(2).expand(-1, -1, windows, -1, -1)

    k = torch.cat([k, for_each_window(landmark_key)], 3)
    v = torch.cat([v, for_each_window(landmark_value)], 3)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B G, H, ., D]
    bias = None
    if relative_bias is not None:
        bias = F.pad(pairwise_bias(relative_bias, window), (0, landmark_key.shape[2])).unsqueeze(
            0
        )  # [1, H, w, w + C]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    out = out.reshape(batch, rows, columns, heads, *window, dim).permute(0, 3, 1, 4, 2, 5, 6)
    return out.reshape(batch, heads, grid[0] * grid[1], dim)


def blocks(x: Tensor, grid: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """[B, H, height width, D] -> [B, H, number of blocks, tokens of a block, D]."""
    (height, width), (rows, columns) = grid, block
    x = x.unflatten(2, (height // rows, rows, width // columns, columns))
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def pairwise_bias(relative_bias: Tensor, window: tuple[int, int]) -> Tensor:
    """[H, offsets...] -> [H, w, w], one value for each pair of a window's tokens."""
    rows, columns = (torch.arange(size, device=relative_bias.device) for size in window)
    dy = (rows - rows[:, None] + window[0] - 1)[:, None, :, None]
    dx = (columns - columns[:, None] + window[1] - 1)[None, :, None, :]
    table = relative_bias if relative_bias.dim() == 3 else relative_bias.unsqueeze(1)
    return table[:, dy, dx].flatten(3).flatten(1, 2)


def flex_window(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """Attention to the window alone, by `flex_attention` and its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (_, width), (rows, columns) = case.grid, case.window

    def same_window(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = (i // width // rows == j // width // rows) & (i % width // columns == j % width // columns)
        return same & (j <= i) if case.is_causal else same

    mask = create_block_mask(same_window, None, None, case.tokens, case.tokens, device=query.device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, key, value, block_mask=mask)
