"""The authors' modules: their arguments, their parameter names, what their code computes.

Source: the PyTorch code that accompanies Zheng, Yuan, Wang, Kong, "Efficient Attention via Control Variates",
ICLR 2023, arXiv:2302.04542. It departs from `eva_attn.eva_attention` in padding, chunk means, and relative
position biases; `docs/checkpoints.md` lists where. What the operators cover goes through them, the rest is
plain PyTorch.
"""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import geometry
from .geometry import Pair

# The authors' logit of what is masked. It is finite: a row with all masked becomes the mean of its values.
_MASKED = -5e4


def build(name: str, kwargs: Mapping[str, Any] | str) -> nn.Module:
    """The authors' module `name` from their constructor arguments; loads their state dict with `strict=True`.

    Args:
        name: "EVA", "LocalAttention", "KernelizedAttention" or "CausalEVAttention".
        kwargs: their arguments, with their defaults, or the same as JSON; `attn_args` is a mapping.

    Returns:
        A module with `forward(x, *, key_padding_mask=None, noise=None)`, whose output has x's shape.
        x: [B, N, dim]; with `attn_2d` [B, height, width, dim]; for CausalEVAttention [N, B, dim].
        key_padding_mask: bool or uint8 [B, N], nonzero = padding.
        noise: EVA, CausalEVAttention: [B, H, C, D], added to the mean mu of the random features; None draws
            it from N(0, 1) in training and is 0 otherwise. KernelizedAttention: [H, M, D], the random
            features themselves; None draws them in training and is the buffer `eval_proj` otherwise.

    Raises:
        ValueError: another name; an argument or input that fails in the authors' code or is not offered.
        TypeError: an argument that the module does not have, or lacks, or one of another type.
    """
    if name not in _MODULES:
        raise ValueError(f"name: expected one of {', '.join(map(repr, _MODULES))}, got {name!r}")
    if isinstance(kwargs, str):
        kwargs = json.loads(kwargs)
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs: expected a mapping or JSON of one, got {kwargs!r}")
    module = _MODULES[name]
    _check_names(f"{name}: kwargs", kwargs, module)
    return module(**kwargs)


class _SelfAttention(nn.Module):
    """Packed projection, heads, output projection."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, fp32: bool
    ) -> None:
        super().__init__()
        _check_heads("dim", dim, num_heads)
        # Both are accepted and without effect in the authors' code.
        _check_probability("attn_drop", attn_drop)
        _check_bool("fp32", fp32)
        _check_bool("qkv_bias", qkv_bias)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = _init_linear(nn.Linear(dim, 3 * dim, bias=qkv_bias))
        self.proj = _init_linear(nn.Linear(dim, dim))
        self.proj_drop = nn.Dropout(_check_probability("proj_drop", proj_drop))

    def _packed(self, x: Tensor) -> Tensor:
        """[B, ..., dim] -> [B, N, 3, H, D]."""
        tokens = x.shape[1:-1].numel()
        return self.qkv(x).reshape(x.shape[0], tokens, 3, self.num_heads, self.head_dim)

    def _output(self, out: Tensor, shape: torch.Size) -> Tensor:
        """[B, H, N, D] -> `shape`."""
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(shape)))


class LocalAttention(_SelfAttention):
    """Softmax attention within windows: of `window_size` tokens, with `attn_2d` of as many both ways."""

    relative_position_index: Tensor
    offset_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 2,
        attn_2d: bool = False,
        overlap_window: bool = False,
        use_rpe: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        fp32: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, attn_drop, proj_drop, fp32)
        w = _check_positive("window_size", window_size)
        self.attn_2d = _check_bool("attn_2d", attn_2d)
        self.use_rpe = _check_bool("use_rpe", use_rpe)
        e = max(1, w // 2) if _check_bool("overlap_window", overlap_window) else 0
        self.window: Pair = (w, w) if attn_2d else (1, w)
        self.overlap: Pair = (e, e) if attn_2d else (0, e)
        if use_rpe and attn_2d:
            rows = 2 * (w + e - 1) * (w + 2 * e + 1) + 1
            self.local_relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
            # Rows of the table by query - key, for the pairs of a window and for all offsets. Their stride,
            # w + 2e, is less than the 2 (w + e) - 1 offsets of an axis, so that distinct offsets share rows.
            queries, keys = torch.arange(w), torch.arange(-e, w + e)
            steps = (queries[:, None] - keys) + (w + e - 1)
            index = steps[:, None, :, None] * (w + 2 * e) + steps[None, :, None, :]
            self.register_buffer("relative_position_index", index.reshape(w * w, -1))
            steps = torch.arange(2 * (w + e) - 2, -1, -1)
            self.register_buffer("offset_index", steps[:, None] * (w + 2 * e) + steps, persistent=False)
        elif use_rpe:
            self.local_relative_position_bias_table = nn.Parameter(torch.empty(num_heads, w, w + 2 * e))
        if use_rpe:
            nn.init.trunc_normal_(self.local_relative_position_bias_table, std=0.02)

    def forward(
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        if noise is not None:
            raise ValueError(f"noise: expected None, as {type(self).__name__} has no random features")
        _check_input(x, self.dim, (3, 4))
        height, width = self._square(x) if self.attn_2d else (1, x.shape[1:-1].numel())
        padding = _check_padding(key_padding_mask, x.shape[0], height * width)
        qkv = self._packed(x)
        # The operators know no padding that attends, and bias by offset alone.
        if padding is None and self._has_offset_bias():
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
            out = torch.ops.eva_attn.window_attention(
                query,
                key,
                value,
                grid_size=(height, width),
                window_size=self.window,
                overlap=self.overlap,
                relative_bias=self._op_bias(),
            )[0]
        else:
            missing = -width % self.window[1]
            # Padded after the projection, unlike EVA.
            qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, missing))
            grid = (height, width + missing)
            out = self._plain(*_split(qkv, grid), _padding_grid(padding, x, grid, missing))
        return self._output(out[:, :, : height * width], x.shape)

    def _plain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor,
        landmarks: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, H, height, width, D] of whole windows, padding [B, 1, height, width, 1] -> [B, H, N, D]."""
        return _attend(
            query,
            key,
            value,
            landmarks,
            window=self.window,
            before=self.overlap,
            after=self.overlap,
            bias=self._window_bias(),
            masked=_blocks(padding, self.window, self.overlap, self.overlap, value=True).mT,
            scale=self.scale,
        )

    def _square(self, x: Tensor) -> Pair:
        side = int(math.sqrt(x.shape[1:-1].numel()))
        if (x.dim() == 4 and x.shape[1] != x.shape[2]) or (x.dim() == 3 and side * side != x.shape[1]):
            raise ValueError(f"x: expected a square grid, got shape {tuple(x.shape)}")
        return _check_grid((side, side), self.window)

    def offset_bias(self) -> Tensor | None:
        """The relative position bias by offset key - query, ascending; None where there is none.

        [H, 2 (w + e) - 1], with `attn_2d` [H, 2 (w + e) - 1, 2 (w + e) - 1], for windows of w with overlap e:
        what `EVAttention(relative_bias="table")` has. ValueError where offsets do not determine it.
        """
        if not self._has_offset_bias():
            raise ValueError(
                "offset_bias: this module's bias depends on positions within a window, not on offsets"
            )
        if not self.use_rpe:
            return None
        return self.local_relative_position_bias_table[self.offset_index].permute(2, 0, 1)

    def _has_offset_bias(self) -> bool:
        return self.attn_2d or not self.use_rpe

    def _op_bias(self) -> Tensor | None:
        """`offset_bias` as the operators take it, with a height in 1-D too."""
        bias = self.offset_bias()
        return bias.unsqueeze(1) if bias is not None and bias.dim() == 2 else bias

    def _window_bias(self) -> Tensor | None:
        """[H, I, J] by query and key of a window."""
        if not self.use_rpe:
            return None
        if not self.attn_2d:
            return self.local_relative_position_bias_table
        return self.local_relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class EVA(LocalAttention):
    """EVA on a sequence, with `attn_2d` on a grid. With `overlap_window` chunks overlap as far as windows."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 2,
        num_landmarks: int = 49,
        attn_2d: bool = False,
        overlap_window: bool = False,
        adaptive_proj: str = "default",
        use_rpe: bool = False,
        use_t5_rpe: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        fp32: bool = False,
    ) -> None:
        if use_rpe and use_t5_rpe:
            raise ValueError("use_rpe, use_t5_rpe: expected at most one of them, got both")
        super().__init__(
            dim,
            num_heads,
            window_size=window_size,
            attn_2d=attn_2d,
            overlap_window=overlap_window,
            use_rpe=use_rpe,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            fp32=fp32,
        )
        self.num_landmarks = _check_positive("num_landmarks", num_landmarks)
        self.adaptive_mu_k = _projection(self.head_dim, adaptive_proj, ("default", "no-ln", "none"))
        self.adaptive_mu_q: nn.Sequential | None = None
        if adaptive_proj != "none":
            self.adaptive_mu_q = _projection(self.head_dim, adaptive_proj, ("default", "no-ln"))
        self.rel_pos_bias: _T5Bias | None = None
        if _check_bool("use_t5_rpe", use_t5_rpe):
            w, e = self.window[1], self.overlap[1]
            queries, keys = (w * w, (w + 2 * e) ** 2) if attn_2d else (w, w + 2 * e)
            self.rel_pos_bias = _T5Bias(queries, keys, num_heads, w + e, self.scale)

    def forward(
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        _check_input(x, self.dim, (4,) if self.attn_2d else (3,))
        height, width = _check_grid(x.shape[1:3], self.window) if self.attn_2d else (1, x.shape[1])
        padding = _check_padding(key_padding_mask, x.shape[0], height * width)
        missing = -width % self.window[1]
        grid = (height, width + missing)
        chunk = self._chunk_size(grid)
        num_chunks = (grid[0] // chunk[0]) * (grid[1] // chunk[1])
        noise = _noise(noise, (x.shape[0], self.num_heads, num_chunks, self.head_dim), x, self.training)
        # The operators' chunks cover the tokens there are; the authors' also those added, but no remainder.
        same_chunks = math.prod(geometry.chunk_grid((height, width), chunk)) == num_chunks
        if padding is None and self._has_offset_bias() and same_chunks:
            out = torch.ops.eva_attn.eva_attention_qkvpacked(
                self._packed(x),
                grid_size=(height, width),
                window_size=self.window,
                chunk_size=chunk,
                overlap=self.overlap,
                chunk_overlap=self.overlap,
                noise=noise,
                relative_bias=self._op_bias(),
                mean_divisor=(chunk[0] + 2 * self.overlap[0]) * (chunk[1] + 2 * self.overlap[1]),
                **_projection_arguments(self.adaptive_mu_k, self.adaptive_mu_q),
            )[0]
        else:
            packed = self._packed(x if self.attn_2d else F.pad(x, (0, 0, 0, missing)))
            tokens = (*_split(packed, grid), _padding_grid(padding, x, grid, missing))
            landmarks = _summarise(
                *tokens,
                chunk=chunk,
                overlap=self.overlap,
                project_key=self.adaptive_mu_k,
                project_query=self.adaptive_mu_q,
                mu_factor=0.5,
                noise=noise,
                scale=self.scale,
            )
            out = self._plain(*tokens, landmarks)
        return self._output(out[:, :, : height * width], x.shape)

    def _chunk_size(self, grid: Pair) -> Pair:
        tokens = grid[0] * grid[1] // self.num_landmarks
        chunk = (int(math.sqrt(tokens)),) * 2 if self.attn_2d else (1, tokens)
        if tokens < 1:
            raise ValueError(
                f"num_landmarks: expected at most the {grid[0] * grid[1]} tokens, got {self.num_landmarks}"
            )
        # With overlap the authors' code leaves out the chunks that do not fit; without, it fails.
        if chunk[0] > min(grid) or (not self.overlap[1] and (grid[0] % chunk[0] or grid[1] % chunk[1])):
            raise ValueError(
                f"num_landmarks: chunks must tile the tokens, got chunks of {chunk[0]} x {chunk[1]} for "
                f"num_landmarks={self.num_landmarks} on {grid[0]} x {grid[1]} tokens"
            )
        return chunk

    def offset_bias(self) -> Tensor | None:
        bias = super().offset_bias()
        return bias if self.rel_pos_bias is None else self.rel_pos_bias()

    def _has_offset_bias(self) -> bool:
        return super()._has_offset_bias() and not (self.attn_2d and self.rel_pos_bias is not None)

    def _window_bias(self) -> Tensor | None:
        return super()._window_bias() if self.rel_pos_bias is None else self.rel_pos_bias.spread()


class CausalEVAttention(nn.Module):
    """Causal EVA on a sequence, time first. With `overlap_window` a window reaches one window back."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        attn_args: Mapping[str, Any],
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        self_attention: bool = False,
        q_noise: float = 0.0,
        qn_block_size: int = 8,
    ) -> None:
        super().__init__()
        _check_heads("embed_dim", embed_dim, num_heads)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width not in (None, embed_dim):
                raise ValueError(
                    f"{name}: expected embed_dim = {embed_dim} (self-attention) or None, got {width}"
                )
        if q_noise > 0:
            raise ValueError(f"q_noise: quantization noise is not offered: expected 0, got {q_noise}")
        # Without effect here: self-attention is all there is, and the block size is of quantization noise.
        _check_bool("self_attention", self_attention)
        _check_positive("qn_block_size", qn_block_size)
        if not isinstance(attn_args, Mapping):
            raise TypeError(f"attn_args: expected a mapping, got {attn_args!r}")
        _check_names("CausalEVAttention: attn_args", attn_args, self._set_attn_args)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5
        self.dropout = _check_probability("dropout", dropout)
        _check_bool("bias", bias)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self._set_attn_args(**attn_args)
        self._init_weights()

    def _set_attn_args(
        self,
        *,
        window_size: int = 4,
        chunk_size: int | None = None,
        num_chunks: int | None = None,
        causal: bool = False,
        overlap_window: bool = False,
        adaptive_proj: str = "default",
        use_t5_rpe: bool = False,
    ) -> None:
        if causal is not True:
            raise ValueError(f"attn_args['causal']: only True is offered, got {causal!r}")
        w = _check_positive("attn_args['window_size']", window_size)
        self.window_size = w
        self.overlap = w if _check_bool("attn_args['overlap_window']", overlap_window) else 0
        if chunk_size is not None:
            r = _check_positive("attn_args['chunk_size']", chunk_size)
            if w % r:
                raise ValueError(f"attn_args['chunk_size']: expected a divisor of window_size = {w}, got {r}")
        elif num_chunks is None:
            raise ValueError("attn_args: expected chunk_size or num_chunks, got neither")
        else:
            _check_positive("attn_args['num_chunks']", num_chunks)
        self.chunk_size, self.num_chunks = chunk_size, num_chunks
        self.adaptive_mu_q = _projection(self.head_dim, adaptive_proj, ("qk", "no-ln"))
        self.adaptive_mu_k = _projection(self.head_dim, adaptive_proj, ("qk", "no-ln"))
        self.rel_pos_bias: _T5Bias | None = None
        if _check_bool("attn_args['use_t5_rpe']", use_t5_rpe):
            reach = w + self.overlap
            self.rel_pos_bias = _T5Bias(w, reach, 1, reach, self.scale, is_causal=True)

    def _init_weights(self) -> None:
        for module in (self.q_proj, self.k_proj, self.v_proj, self.adaptive_mu_q, self.adaptive_mu_k):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        _check_input(x, self.embed_dim, (3,), batch_axis=1)
        x = x.transpose(0, 1)
        batch, num_tokens, _ = x.shape
        padding = _check_padding(key_padding_mask, batch, num_tokens)
        missing = -num_tokens % self.window_size
        length = num_tokens + missing
        r = self._chunk_size(length)
        noise = _noise(noise, (batch, self.num_heads, length // r, self.head_dim), x, self.training)
        padding = _padding_grid(padding, x, (1, length), missing)
        out = self._plain(F.pad(x, (0, 0, 0, missing)), padding, r, noise)
        return self.out_proj(out[:, :, :num_tokens].transpose(1, 2).flatten(2)).transpose(0, 1)

    def _plain(self, x: Tensor, padding: Tensor, chunk_size: int, noise: Tensor | None) -> Tensor:
        """[B, N, dim] of whole windows, padding [B, 1, 1, N, 1] -> [B, H, N, D]."""
        query, key, value = (
            project(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2).unsqueeze(2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        landmarks = _summarise(
            query,
            key,
            value,
            padding,
            chunk=(1, chunk_size),
            overlap=(0, 0),
            project_key=self.adaptive_mu_k,
            project_query=self.adaptive_mu_q,
            mu_factor=1.0,
            noise=noise,
            scale=self.scale,
        )
        w, window, before, none = self.window_size, (1, self.window_size), (0, self.overlap), (0, 0)
        padded_query = _blocks(padding, window, none, none)
        padded_key = _blocks(padding, window, before, none, value=True).mT
        future = torch.ones(w, w + self.overlap, dtype=torch.bool, device=x.device).triu(1 + self.overlap)
        chunk = torch.arange(x.shape[1] // chunk_size, device=x.device)
        own_chunk = torch.arange(x.shape[1], device=x.device).reshape(-1, w, 1) // chunk_size
        return _attend(
            query,
            key,
            value,
            landmarks,
            window=window,
            before=before,
            after=none,
            bias=None if self.rel_pos_bias is None else self.rel_pos_bias.spread(),
            masked=padded_query | padded_key | future,
            landmark_masked=chunk >= own_chunk,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def _chunk_size(self, length: int) -> int:
        if self.chunk_size is not None:
            return self.chunk_size
        assert self.num_chunks is not None  # one of the two is given
        r = length // self.num_chunks
        if r < 1 or length % r:
            raise ValueError(
                f"attn_args['num_chunks']: chunks must tile the tokens, got chunks of {r} for "
                f"num_chunks={self.num_chunks} on {length} tokens (in whole windows of {self.window_size})"
            )
        return r


class KernelizedAttention(_SelfAttention):
    """Attention with `approx_attn_dim` positive random features (Performer), linear in the tokens."""

    eval_proj: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        approx_attn_dim: int = 64,
        proj_method: str = "favorp",
        cos_weighting: bool = False,
        sample_scheme: str = "default",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        fp32: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, attn_drop, proj_drop, fp32)
        for name, value, offered in (
            ("proj_method", proj_method, "favorp"),
            ("cos_weighting", cos_weighting, False),
            ("sample_scheme", sample_scheme, "default"),
        ):
            if value != offered:
                raise ValueError(f"{name}: only {offered!r} is offered, got {value!r}")
        m, d = _check_positive("approx_attn_dim", approx_attn_dim), self.head_dim
        # Rows orthogonal within each block of D, with the lengths of normal vectors.
        rows = torch.linalg.qr(torch.randn(num_heads, -(-m // d), d, d)).Q.flatten(1, 2)[:, :m]
        self.register_buffer("eval_proj", rows * torch.randn(num_heads, m, d).norm(dim=-1, keepdim=True))

    def forward(
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        _check_input(x, self.dim, (3, 4))
        padding = _check_padding(key_padding_mask, x.shape[0], x.shape[1:-1].numel())
        noise = _noise(noise, tuple(self.eval_proj.shape), x, self.training)
        features = self.eval_proj if noise is None else noise
        query, key, value = self._packed(x).permute(2, 0, 3, 1, 4).unbind()
        query_features = self._features(query, features, stabiliser_axes=(-1,))
        key_features = self._features(key, features, stabiliser_axes=(-2, -1))
        if padding is not None:
            key_features = key_features.masked_fill(padding[:, None, :, None], 0)
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        query_features, key_features = query_features.to(dtype), key_features.to(dtype)
        numerator = query_features @ (key_features.mT @ value.to(dtype))
        denominator = query_features @ key_features.sum(-2).unsqueeze(-1)
        return self._output((numerator / denominator.clamp(min=0.01)).to(value.dtype), x.shape)

    def _features(self, x: Tensor, features: Tensor, stabiliser_axes: tuple[int, ...]) -> Tensor:
        """[B, H, N, D], [H, M, D] -> [B, H, N, M]."""
        projected = (x * self.head_dim**-0.25) @ features.to(x.dtype).mT
        half_norm = x.square().sum(-1, keepdim=True) * (self.scale / 2)
        stabiliser = projected.detach().amax(stabiliser_axes, keepdim=True)
        return features.shape[1] ** -0.5 * torch.exp(projected - half_norm - stabiliser) + 1e-4


class _T5Bias(nn.Module):
    """T5's relative position bias by difference j - i of `queries` queries i and `keys` keys j.

    Both count from 0. Under overlap key 0 lies before query 0, so that the difference is not the true offset.
    """

    buckets: Tensor

    def __init__(
        self, queries: int, keys: int, num_heads: int, reach: int, scale: float, is_causal: bool = False
    ) -> None:
        super().__init__()
        num_buckets = geometry.t5_num_buckets(reach)
        exact = num_buckets // (2 if is_causal else 4)
        differences = torch.arange(1 - queries, keys)
        farthest = queries - 1 if is_causal else max(queries, keys) - 1
        if reach <= exact <= farthest:
            raise ValueError(
                f"use_t5_rpe: expected window_size + overlap above {exact}, got {reach}, where distances "
                f"up to {farthest} have no bucket"
            )
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)
        self.keys = keys
        self.scale = scale
        buckets = geometry.t5_buckets(differences, num_buckets, reach, is_causal)
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self) -> Tensor:
        """[H, queries + keys - 1], by difference, ascending from 1 - queries."""
        return self.relative_attention_bias(self.buckets).mT * self.scale

    def spread(self) -> Tensor:
        """[H, queries, keys]."""
        return self().unfold(1, self.keys, 1).flip(1)


def _summarise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor,
    *,
    chunk: Pair,
    overlap: Pair,
    project_key: nn.Module,
    project_query: nn.Module | None,
    mu_factor: float,
    noise: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Landmark keys and values [B, H, C, D] of [B, H, height, width, D], padding [B, 1, height, width, 1].

    What is padding or outside the grid is 0 in means, counts in their divisor, and has no weight in values.
    """
    masked = _blocks(padding, chunk, overlap, overlap, value=True)
    query, key, value = (
        _blocks(t, chunk, overlap, overlap).masked_fill(masked, 0) for t in (query, key, value)
    )
    landmark_key = project_key(key.mean(-2))
    omega = torch.zeros_like(landmark_key)
    if project_query is not None:
        omega = mu_factor * (project_query(query.mean(-2)) + landmark_key)
    if noise is not None:
        omega = omega + noise.to(omega.dtype)
    logits = scale * ((key @ omega.unsqueeze(-1)).squeeze(-1) - key.square().sum(-1) / 2)
    weights = logits.masked_fill(masked.squeeze(-1), _MASKED).softmax(-1)
    return landmark_key, (weights.unsqueeze(-2) @ value).squeeze(-2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: tuple[Tensor, Tensor] | None,
    *,
    window: Pair,
    before: Pair,
    after: Pair,
    bias: Tensor | None,
    masked: Tensor,
    scale: float,
    landmark_masked: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention to a window's keys and to all landmarks: [B, H, height, width, D] -> [B, H, N, D].

    I queries and J keys a window. bias: [H or 1, I, J]; masked: broadcasts to [B, H, G, I, J];
    landmark_masked: to [B, H, G, I, C].
    """
    height, width = query.shape[2:4]
    query = _blocks(query, window, (0, 0), (0, 0))
    key, value = (_blocks(t, window, before, after) for t in (key, value))
    logits = scale * (query @ key.mT)
    if bias is not None:
        logits = logits + bias.unsqueeze(1)
    logits = logits.masked_fill(masked, _MASKED)
    if landmarks is None:
        out = logits.softmax(-1) @ value
    else:
        landmark_key, landmark_value = (t.unsqueeze(2) for t in landmarks)
        landmark_logits = scale * (query @ landmark_key.mT)
        if landmark_masked is not None:
            landmark_logits = landmark_logits.masked_fill(landmark_masked, _MASKED)
        weights = F.dropout(torch.cat([logits, landmark_logits], -1).softmax(-1), dropout_p)
        local, far = weights.split([logits.shape[-1], landmark_logits.shape[-1]], -1)
        out = local @ value + far @ landmark_value
    out = out.unflatten(3, window).unflatten(2, (height // window[0], width // window[1]))
    return out.transpose(3, 4).flatten(2, 5)


def _split(qkv: Tensor, grid: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3, H, D] -> thrice [B, H, height, width, D]."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unflatten(3, grid).unbind()
    return query, key, value


def _blocks(x: Tensor, size: Pair, before: Pair, after: Pair, value: float = 0) -> Tensor:
    """The blocks that tile a grid, each with margins around it: [B, H, height, width, D] -> [B, H, G, J, D].

    `value` stands outside the grid; blocks that do not fit are left out.
    """
    x = F.pad(x, (0, 0, before[1], after[1], before[0], after[0]), value=value)
    for axis in (0, 1):
        x = x.unfold(2 + axis, before[axis] + size[axis] + after[axis], size[axis])
    return x.movedim(4, -1).flatten(4, 5).flatten(2, 3)


def _padding_grid(padding: Tensor | None, x: Tensor, grid: Pair, missing: int) -> Tensor:
    """[B, N] -> [B, 1, height, width, 1], with the `missing` tokens of the last window as padding."""
    if padding is None:
        padding = torch.zeros(x.shape[0], grid[0] * grid[1] - missing, dtype=torch.bool, device=x.device)
    return F.pad(padding, (0, missing), value=True).reshape(x.shape[0], 1, *grid, 1)


def _noise(noise: Tensor | None, shape: tuple[int, ...], x: Tensor, training: bool) -> Tensor | None:
    if noise is None and training:
        noise = torch.randn(shape, dtype=x.dtype, device=x.device)
    if noise is None:
        return None
    _check_shape("noise", noise, shape)
    return noise.detach()


def _projection(head_dim: int, kind: str, kinds: tuple[str, ...]) -> nn.Sequential:
    """What makes landmark keys of mean keys, or landmark queries of mean queries."""
    if kind not in kinds:
        raise ValueError(f"adaptive_proj: expected one of {', '.join(map(repr, kinds))}, got {kind!r}")
    layers: list[nn.Module] = [_init_linear(nn.Linear(head_dim, head_dim))]
    if kind != "no-ln":
        layers.append(nn.LayerNorm(head_dim))
    return nn.Sequential(*layers)


def _projection_arguments(project_key: nn.Sequential, project_query: nn.Sequential | None) -> dict[str, Any]:
    """The operators' arguments for both projections."""
    arguments: dict[str, Any] = {}
    for name, layers in (("key", project_key), ("query", project_query)):
        for part, layer in zip(("", "_norm"), layers or (), strict=False):
            arguments[f"{name}{part}_weight"], arguments[f"{name}{part}_bias"] = layer.weight, layer.bias
    return arguments


def _init_linear(linear: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def _check_names(where: str, given: Mapping[str, Any], function: Any) -> None:
    """That `given` names parameters of `function` only, and all that have no default."""
    parameters = inspect.signature(function).parameters
    supported = ", ".join(parameters)
    for name in given:
        if name not in parameters:
            raise TypeError(f"{where}: unknown argument {name!r}; supported: {supported}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise TypeError(f"{where}: missing argument {name!r}; supported: {supported}")


def _check_heads(name: str, dim: int, num_heads: int) -> None:
    if _check_positive(name, dim) % _check_positive("num_heads", num_heads):
        raise ValueError(f"{name}: expected a multiple of num_heads = {num_heads}, got {dim}")


def _check_positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _check_bool(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value


def _check_probability(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")
    return value


def _check_input(x: Tensor, dim: int, ranks: tuple[int, ...], batch_axis: int = 0) -> None:
    if x.dim() not in ranks or x.shape[-1] != dim:
        forms = {3: "[B, N, {}]" if batch_axis == 0 else "[N, B, {}]", 4: "[B, height, width, {}]"}
        expected = " or ".join(forms[rank].format(dim) for rank in ranks)
        raise ValueError(f"x: expected {expected}, got shape {tuple(x.shape)}")


def _check_grid(grid: Sequence[int], window: Pair) -> Pair:
    height, width = grid
    if height % window[0] or width % window[1]:
        raise ValueError(
            f"x: expected multiples of window_size = {window[0]}, got a grid of {height} x {width}"
        )
    return height, width


def _check_padding(key_padding_mask: Tensor | None, batch: int, num_tokens: int) -> Tensor | None:
    if key_padding_mask is None:
        return None
    if key_padding_mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"key_padding_mask: expected bool or uint8, got {key_padding_mask.dtype}")
    _check_shape("key_padding_mask", key_padding_mask, (batch, num_tokens))
    return key_padding_mask.bool()


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


_MODULES: dict[str, type[nn.Module]] = {
    "EVA": EVA,
    "LocalAttention": LocalAttention,
    "KernelizedAttention": KernelizedAttention,
    "CausalEVAttention": CausalEVAttention,
}
