"""Attention of timm's vision transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat  # type: ignore[import-not-found]
from timm.models.swin_transformer import (  # type: ignore[import-not-found]
    SwinTransformerBlock,
    WindowAttention,
)
from torch import Tensor, nn

from .. import geometry
from ..functional import eva_attention
from ..geometry import Pair
from ..modules import _EVA, EVAttention
from .registry import NotReplaced, Site, TokenLayout, qualified_name, require_layout


class PatchGrid(TokenLayout):
    """The grid that a model's `patch_embed` makes of an image."""

    def __init__(self, model: Any) -> None:
        off_grid = "patch_drop leaves no grid: build the model with patch_drop_rate=0"
        super().__init__(
            tuple(model.patch_embed.grid_size),
            model.num_prefix_tokens,
            off_grid if _is_there(model.patch_drop) else None,
        )
        self.patch_embed = model.patch_embed

    def watch(self) -> None:
        if self not in self.patch_embed._forward_hooks.values():
            self.patch_embed.register_forward_hook(self)

    def __call__(self, patch_embed: Any, args: Any, out: Tensor) -> None:
        # [B, height, width, C] with dynamic_img_size, [B, N, C] of the size that was set otherwise.
        height, width = out.shape[1:3] if out.dim() == 4 else patch_embed.grid_size
        self.grid_size = (height, width)


class TimmAttention(EVAttention):
    """`EVAttention` as timm's transformer blocks call it."""

    layout: TokenLayout | None = None

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        _refuse_masks(attn_mask, is_causal)
        return super().forward(x, grid_size=self.layout.grid_size if self.layout else None)


class RotaryAttention(_EVA):
    """EVA between the projections of timm's `Attention`, `AttentionRope` or `EvaAttention`.

    With what these have of rotary embeddings, norms, gates, and fewer heads of keys and values.
    """

    qkv: nn.Linear | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Linear | None
    proj: nn.Linear
    q_bias: nn.Parameter | None
    k_bias: Tensor
    v_bias: nn.Parameter

    def __init__(self, attention: Any, options: dict[str, Any], layout: TokenLayout | None) -> None:
        super().__init__()
        for name in ("qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "norm", "gate", "proj"):
            self.add_module(name, getattr(attention, name, None))
        for name in ("q_bias", "v_bias"):
            self.register_parameter(name, getattr(attention, name, None))
        self.register_buffer("k_bias", getattr(attention, "k_bias", None), persistent=False)
        self.proj_drop = attention.proj_drop
        self.rotate_half = getattr(attention, "rotate_half", False)
        self.layout = layout
        _init_eva(self, attention, options)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """[B, N, C] -> the same; `rope` is for the tokens after the prefix."""
        _refuse_masks(attn_mask, is_causal)
        batch, num_tokens, _ = x.shape
        query, key, value = self._heads(x)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = self._rotate(query, rope).type_as(value), self._rotate(key, rope).type_as(value)
        grid_size = self.layout.grid_size if self.layout else self.grid_size
        options = self._options(batch, num_tokens, x.device, grid_size, None, None)
        out = eva_attention(query, key, value, **options).transpose(1, 2).flatten(2)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, N, C] -> query, key and value [B, H, N, D]."""
        if self.qkv is None:
            parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        elif self.q_bias is None:
            parts = [*self.qkv(x).chunk(3, dim=-1)]
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            parts = [*F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)]
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, rest = x.tensor_split([self.num_prefix_tokens], dim=2)
        return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=self.rotate_half)], dim=2)


class PyramidAttention(_EVA):
    """EVA between the projections of PVT v2's attention to all tokens."""

    def __init__(self, attention: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.q, self.kv = attention.q, attention.kv
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        _init_eva(self, attention, options)

    def forward(self, x: Tensor, feat_size: Pair) -> Tensor:
        """[B, height width, C] -> the same."""
        batch, num_tokens, _ = x.shape
        height, width = feat_size
        query = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        options = self._options(batch, num_tokens, x.device, (height, width), None, None)
        out = eva_attention(query, key, value, **options)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class SwinAttention(_EVA):
    """EVA with the windows, shifts and relative position bias of a Swin transformer."""

    window_size: Pair
    relative_position_bias_table: nn.Parameter

    # Called by timm when a model is set to another image size.
    set_window_size = WindowAttention.set_window_size

    def __init__(self, attention: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.qkv, self.proj, self.proj_drop = attention.qkv, attention.proj, attention.proj_drop
        _init_eva(self, attention, {**options, "window_size": tuple(attention.window_size)})
        self.relative_position_bias_table = attention.relative_position_bias_table

    def _offset_bias(self) -> Tensor:
        """timm's table [offsets, H] of query - key, as [H, offsets of rows, of columns] of key - query."""
        height, width = self.window_size
        table = self.relative_position_bias_table.unflatten(0, (2 * height - 1, 2 * width - 1))
        return table.flip(0, 1).permute(2, 0, 1)

    def forward(self, x: Tensor, shift_size: Pair) -> Tensor:
        """[B, height, width, C] -> the same; the second windows begin `shift_size` tokens into the grid."""
        top, left = (
            (window - shift) % window if shift else 0
            for window, shift in zip(self.window_size, shift_size, strict=True)
        )
        padding = None
        if top or left:  # the first windows, which reach out of the grid
            x = F.pad(x, (0, 0, left, 0, top, 0))
            padding = x.new_ones(x.shape[1:3], dtype=torch.bool)
            padding[top:, left:] = False
            padding = padding.flatten().expand(x.shape[0], -1)
        batch, height, width, _ = x.shape
        query, key, value = (
            self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        options = self._options(batch, height * width, x.device, (height, width), padding, None)
        out = eva_attention(query, key, value, **options)
        out = out.transpose(1, 2).flatten(2).unflatten(1, (height, width))
        return self.proj_drop(self.proj(out[:, top:, left:]))


class SwinBlock(SwinTransformerBlock):
    """Swin's block, with attention that takes the grid as a whole."""

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x, self.shift_size)


def _init_eva(eva: _EVA, attention: Any, options: dict[str, Any]) -> None:
    weight = attention.proj.weight
    head_dim = weight.shape[1] // attention.num_heads
    eva._init_eva(
        attention.num_heads,
        head_dim,
        attn_drop=attention.attn_drop.p,
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )


def _attention(module: Any, site: Site, options: dict[str, Any]) -> nn.Module:
    require_layout(site, options)
    dim = module.qkv.in_features
    extras = (getattr(module, name, None) for name in ("norm", "gate"))
    if (module.qkv.out_features, module.proj.out_features) != (3 * dim, dim) or any(map(_is_there, extras)):
        return RotaryAttention(module, options, site.layout)
    eva = TimmAttention(
        dim,
        module.num_heads,
        attn_drop=module.attn_drop.p,
        proj_drop=module.proj_drop.p,
        device=module.qkv.weight.device,
        dtype=module.qkv.weight.dtype,
        **options,
    )
    eva.qkv, eva.proj = module.qkv, module.proj
    eva.layout = site.layout
    if _is_there(module.q_norm):
        eva.q_norm, eva.k_norm = module.q_norm, module.k_norm
    return eva


def _rotary_attention(module: Any, site: Site, options: dict[str, Any]) -> nn.Module:
    require_layout(site, options)
    return RotaryAttention(module, options, site.layout)


def _pyramid_attention(module: Any, site: Site, options: dict[str, Any]) -> nn.Module:
    if module.pool is not None:
        raise NotReplaced("its keys are 7 x 7 pooled tokens, linear in cost already")
    if module.sr is not None:
        stride = module.sr.stride[0]
        raise NotReplaced(
            f"its keys are tokens convolved {stride} x {stride} to one: for EVA, build it with sr_ratios of 1"
        )
    window_size = geometry.pair("window_size", options["window_size"], (1, 1), 1)
    return PyramidAttention(module, {**options, "window_size": window_size})


def _window_attention(module: Any, site: Site, options: dict[str, Any]) -> nn.Module:
    block = site.parent
    if qualified_name(type(block)) != qualified_name(SwinTransformerBlock):
        raise NotReplaced("not in timm's SwinTransformerBlock")
    if options["relative_bias"] is not None:
        raise NotReplaced("has a relative bias of its own: leave relative_bias None")
    if options["overlap"] not in (0, (0, 0)):
        raise NotReplaced("its relative bias ends with the window: leave overlap 0")
    eva = SwinAttention(module, {**options, "grid_size": tuple(block.input_resolution)})
    block.__class__ = SwinBlock
    return eva


def _naflex(model: Any) -> TokenLayout:
    return TokenLayout((1, 1), 0, off_grid="a batch holds images of several grids")


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask, is_causal: expected None and False, as EVA knows no mask of pairs")


def _is_there(module: nn.Module | None) -> bool:
    return not isinstance(module, (nn.Identity, type(None)))


CONVERTERS = {
    "timm.layers.attention.Attention": _attention,
    "timm.models.vision_transformer.Attention": _attention,
    "timm.layers.attention.AttentionRope": _rotary_attention,
    "timm.models.eva.EvaAttention": _rotary_attention,
    "timm.models.pvt_v2.Attention": _pyramid_attention,
    "timm.models.swin_transformer.WindowAttention": _window_attention,
}
_POOLED = "a few queries attend to all tokens, linear in cost already"
_FUSED = "attention and MLP share one projection"
_COSINE = "cosine attention with a bias computed by a network"
REFUSED = {
    "timm.layers.attention_pool.AttentionPoolLatent": _POOLED,
    "timm.layers.attention_pool.AttentionPoolPrr": _POOLED,
    "timm.layers.diff_attention.DiffAttention": "the difference of two softmax attentions",
    "timm.models.beit.Attention": "relative position bias that also holds the class token",
    "timm.models.swin_transformer_v2.WindowAttention": _COSINE,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": _COSINE,
    "timm.models.vision_transformer_relpos.RelPosAttention": "relative position bias between all tokens",
    "timm.models.vision_transformer_sam.Attention": "relative position bias that depends on the query",
    "timm.models.vision_transformer.ParallelScalingBlock": _FUSED,
    "timm.models.vision_transformer.DiffParallelScalingBlock": _FUSED,
}
LAYOUTS = {
    "timm.models.vision_transformer.VisionTransformer": PatchGrid,
    "timm.models.eva.Eva": PatchGrid,
    "timm.models.naflexvit.NaFlexVit": _naflex,
}
