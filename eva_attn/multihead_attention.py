"""EVA behind the interface of `nn.MultiheadAttention`."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import eva_attention_qkvpacked
from .geometry import Pair, Size
from .modules import _EVA


class EVAMultiheadAttention(_EVA, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with EVA in place of softmax: self-attention that returns no weights.

    Constructor, parameters, their initialisation and `forward` are those of `nn.MultiheadAttention`, and its
    state dict loads with `strict=False`: only `landmark_projection` and `relative_bias` are new. Works in
    `nn.TransformerEncoderLayer` and `nn.TransformerEncoder`.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first, device, dtype: see `nn.MultiheadAttention`.
        add_bias_kv, add_zero_attn, kdim, vdim: only what self-attention leaves them at.
        window_size, ..., log_count_bias: see `EVAttention`. With `is_causal` at the call, `chunk_size` must
            divide `window_size`.

    ValueError for arguments that are not supported, by name.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        window_size: Size = 7,
        num_landmarks: int = 49,
        chunk_size: Size | None = None,
        grid_size: Pair | None = None,
        overlap: Size = 0,
        chunk_overlap: Size = 0,
        projection: str = "linear-layernorm",
        relative_bias: str | None = None,
        num_prefix_tokens: int = 0,
        exclude_window_landmarks: bool = False,
        log_count_bias: bool = False,
    ) -> None:
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim: expected a positive multiple of num_heads = {num_heads}, got {embed_dim}"
            )
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width not in (None, embed_dim):
                raise ValueError(f"{name}: expected embed_dim = {embed_dim} or None, got {width}")
        for name, wanted in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if wanted:
                raise ValueError(f"{name}: expected False, as EVA attends to the tokens alone, got {wanted}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        # Encoder layers would else take the weights and compute softmax attention themselves.
        self._qkv_same_embed_dim = False
        self._init_eva(
            num_heads,
            embed_dim // num_heads,
            window_size=window_size,
            chunk_size=chunk_size,
            num_landmarks=num_landmarks,
            grid_size=grid_size,
            overlap=overlap,
            chunk_overlap=chunk_overlap,
            projection=projection,
            relative_bias=relative_bias,
            attn_drop=dropout,
            num_prefix_tokens=num_prefix_tokens,
            exclude_window_landmarks=exclude_window_landmarks,
            log_count_bias=log_count_bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        grid_size: Pair | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attention among the tokens of `query`, in its shape, and None for the weights.

        Args:
            query: [N, B, embed_dim], [B, N, embed_dim] with `batch_first`, or [N, embed_dim]; nested too.
            key, value: the very tensor given as `query`.
            key_padding_mask: [B, N], [N] without a batch: bool, True = padding, or floating, -inf = padding
                and 0 otherwise.
            need_weights: must be False, as there is no matrix of weights.
            attn_mask: None, unless `is_causal` says that it is the causal mask.
            average_attn_weights: without effect.
            is_causal: causal EVA.
            grid_size: stands in for that given at construction.
            noise: see `EVAttention`.

        ValueError for what EVA cannot do.
        """
        if key is not query or value is not query:
            raise ValueError(
                "key, value: expected the tensor given as query, as EVA is self-attention: keep "
                "nn.MultiheadAttention where queries attend to other tokens"
            )
        if need_weights:
            raise ValueError("need_weights: expected False, as EVA has no matrix of attention weights")
        if attn_mask is not None and not is_causal:
            raise ValueError(
                "attn_mask: expected None, as EVA knows no mask of pairs: pass key_padding_mask for padding, "
                "is_causal=True for a causal mask"
            )
        if query.is_nested:
            return self._nested(query, is_causal=is_causal, grid_size=grid_size), None
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"query: expected [B, N, {self.embed_dim}], [N, B, {self.embed_dim}] or "
                f"[N, {self.embed_dim}], got {tuple(query.shape)}"
            )
        if key_padding_mask is not None:
            key_padding_mask = _is_padding(key_padding_mask)
        if query.dim() == 2:
            mask = None if key_padding_mask is None else key_padding_mask[None]
            return self._attend(query[None], mask, is_causal, grid_size, noise)[0], None
        x = query if self.batch_first else query.transpose(0, 1)
        out = self._attend(x, key_padding_mask, is_causal, grid_size, noise)
        return out if self.batch_first else out.transpose(0, 1), None

    def _attend(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        grid_size: Pair | None,
        noise: Tensor | None,
    ) -> Tensor:
        """[B, N, embed_dim] -> the same."""
        batch, num_tokens, _ = x.shape
        grid_size = self.grid_size if grid_size is None else grid_size
        self._check_bias_fits(grid_size)
        options = self._options(batch, num_tokens, x.device, grid_size, key_padding_mask, noise)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.reshape(batch, num_tokens, 3, self.num_heads, self.head_dim)
        out = eva_attention_qkvpacked(qkv, **{**options, "is_causal": is_causal})
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))

    def _nested(self, query: Tensor, **options: Any) -> Tensor:
        """Sequences [B, N_b, embed_dim], as `nn.TransformerEncoder` makes of a padding mask, or jagged."""
        lengths = torch.tensor([len(x) for x in query.unbind()], device=query.device)
        x = query.to_padded_tensor(0.0)
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        out = self._attend(x, padding, noise=None, **options)
        if query.layout == torch.jagged:
            # The query's own offsets, or the two could not be added up.
            offsets = query.offsets()  # type: ignore[attr-defined]
            return torch.nested.nested_tensor_from_jagged(out[~padding], offsets)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(out, lengths, strict=True)])

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, {super().extra_repr()}, batch_first={self.batch_first}"


def _is_padding(mask: Tensor) -> Tensor:
    """A padding mask as bool. ValueError for floating masks of other values than 0 and -inf."""
    if not mask.is_floating_point():
        return mask
    padding = mask == -math.inf
    # Not in compiled code, which cannot branch on values.
    if not torch.compiler.is_compiling() and not ((mask == 0) | padding).all():
        raise ValueError("key_padding_mask: expected bool, or floating of values 0 and -inf alone")
    return padding
