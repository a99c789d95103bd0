"""Attention of transformers' models, through the library's registries of attention and mask functions.

Importing this registers two names for `attn_implementation`. "eva" is for whole models: EVA without
parameters, and with `config.eva_attention`, a dict, as settings. "eva_replaced" is what `replace_attention`
sets: EVA in modules that have one as `eva`, softmax in others.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (  # type: ignore[import-not-found]
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # type: ignore[import-not-found]

from .. import geometry
from ..functional import draw_noise, eva_attention
from ..geometry import Pair
from ..modules import _EVA
from .registry import NotReplaced, Site, TokenLayout, require_layout

_SEQUENCE_DEFAULTS = {"window_size": 64, "num_landmarks": 64}
_GRID_DEFAULTS = {"window_size": 7, "num_landmarks": 49}
_CAUSAL_DEFAULTS = {"window_size": 256, "chunk_size": 128}


class AttentionCore(_EVA):
    """EVA of queries, keys and values that come from elsewhere."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        options: dict[str, Any],
        layout: TokenLayout | None = None,
        *,
        is_causal: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self._init_eva(
            num_heads, head_dim, is_causal=is_causal, attn_drop=0.0, device=device, dtype=dtype, **options
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """[B, H, N, D], key and value with H or fewer heads -> [B, H, N, D]."""
        grid_size = self.layout.grid_size if self.layout else self.grid_size
        batch, _, num_tokens, _ = query.shape
        options = self._options(batch, num_tokens, query.device, grid_size, key_padding_mask, None)
        return eva_attention(query, key, value, **{**options, "dropout_p": dropout_p}, scale=scale)


class EmbeddingGrid(TokenLayout):
    """The grid that a vision model's embeddings make of `pixel_values`."""

    def __init__(self, embeddings: Any) -> None:
        patches = embeddings.patch_embeddings
        self.embeddings = embeddings
        self.patch_size = _pair(patches.patch_size)
        prefix = [
            getattr(embeddings, name, None) for name in ("cls_token", "distillation_token", "register_tokens")
        ]
        super().__init__(
            self._grid(_pair(patches.image_size)),
            sum(token.shape[1] for token in prefix if token is not None),
        )

    def watch(self) -> None:
        if self not in self.embeddings._forward_pre_hooks.values():
            self.embeddings.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, embeddings: Any, args: Any, kwargs: dict[str, Any]) -> None:
        image = args[0] if args else kwargs["pixel_values"]
        self.grid_size = self._grid(image.shape[-2:])

    def _grid(self, image_size: Pair) -> Pair:
        return image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1]


def replaced_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function "eva_replaced": EVA by `module.eva`, softmax where there is none."""
    if (eva := getattr(module, "eva", None)) is not None:
        return _attend(eva, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :].expand(-1, 1, query.shape[2], -1)
        if _is_causal(module, kwargs):
            attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def eva_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function "eva": settings from `module.config`, no parameters."""
    config: Any = module.config
    options: dict[str, Any] = {"exclude_window_landmarks": True, "log_count_bias": True, "overlap": 0}
    options |= {"projection": "identity", "relative_bias": None, "chunk_size": None}
    is_causal = _is_causal(module, kwargs)
    layout = _layout_by_config(config, query.shape[2])
    if layout is not None:
        options |= {"grid_size": layout.grid_size, "num_prefix_tokens": layout.num_prefix_tokens}
        options |= _GRID_DEFAULTS
    else:
        options |= _CAUSAL_DEFAULTS if is_causal else _SEQUENCE_DEFAULTS
    options |= getattr(config, "eva_attention", None) or {}
    for name, expected in (("projection", "identity"), ("relative_bias", None)):
        if options.pop(name) != expected:
            raise ValueError(
                f"config.eva_attention: expected {name} {expected!r}, as what has parameters is for "
                "replace_attention to make"
            )
    grid_size = options.get("grid_size")
    grid = geometry.grid(grid_size, query.shape[2], options.get("num_prefix_tokens", 0))
    num_landmarks = options.pop("num_landmarks", None)
    if options["chunk_size"] is None:
        options["chunk_size"] = geometry.default_chunk_size(grid, num_landmarks, grid_size is not None)
    if module.training:
        chunk = geometry.pair("chunk_size", options["chunk_size"], grid_size, 1)
        options["noise"] = draw_noise(query.shape, grid, chunk, query.device)
    attend = functools.partial(eva_attention, is_causal=is_causal, **options)
    return _attend(attend, query, key, value, attention_mask, **kwargs)


def _attend(
    eva: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: mask [B, N], True = attended to; result [B, N, H, D]."""
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"query, key: expected as many queries as keys, got {query.shape[2]} and {key.shape[2]}: EVA is "
            "self-attention, and needs the queries of all tokens, which no cache holds (generate with "
            "use_cache=False)"
        )
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None, as EVA does not have it")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False, as EVA has no matrix of attention weights")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected [B, N], as EVA knows no mask of pairs, got "
            f"{tuple(attention_mask.shape)}"
        )
    padding = None if attention_mask is None else ~attention_mask
    out = eva(query, key, value, key_padding_mask=padding, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2), None


def eva_mask(*, mask_function: Any, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
    """The mask function of both: the padding mask [B, N] as it is, True = attended to.

    ValueError for masks of pairs other than causal.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "mask: expected padding and causality alone, as EVA knows no mask of pairs: no sliding windows "
            "and no packed sequences (which position_ids without attention_mask count as in compiled code)"
        )
    if attention_mask is None or (not torch.compiler.is_compiling() and attention_mask.all()):
        return None
    return attention_mask


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    is_causal = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def _layout_by_config(config: Any, num_tokens: int) -> TokenLayout | None:
    """Of a vision model's images at the size that it is configured for; None for text."""
    image_size, patch_size = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image_size is None or patch_size is None:
        return None
    (height, width), (patch_height, patch_width) = _pair(image_size), _pair(patch_size)
    grid_size = (height // patch_height, width // patch_width)
    prefix = 1 + (config.model_type == "deit") + getattr(config, "num_register_tokens", 0)
    if config.model_type not in _VISION_MODELS or grid_size[0] * grid_size[1] + prefix != num_tokens:
        raise ValueError(
            f"{config.model_type}: {num_tokens} tokens are not the {grid_size} patches and prefix tokens of "
            "its configuration: take replace_attention, which finds the grid of each image"
        )
    return TokenLayout(grid_size, prefix)


def _encoder(module: Any, site: Site, options: dict[str, Any]) -> nn.Module:
    return _causal(module, site, options) if module.is_causal else _attach(module, options)


def _causal(module: Any, site: Site, options: dict[str, Any]) -> nn.Module:
    config = module.config
    if not getattr(config, "is_causal", True):
        return _attach(module, options)
    sliding = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or [])
    if sliding or getattr(config, "sliding_window", None) is not None:
        raise NotReplaced(
            "sliding windows, also in other layers: set config.sliding_window = None for EVA's own"
        )
    for name in ("grid_size", "num_prefix_tokens"):
        if options.pop(name, None):
            raise NotReplaced(f"causal attention has no {name}")
    if options["chunk_size"] is None:
        window = options["window_size"]
        longest = max(1, config.max_position_embeddings // options["num_landmarks"])
        options["chunk_size"] = next(r for r in range(min(window, longest), 0, -1) if window % r == 0)
    elif options["window_size"] % options["chunk_size"]:
        raise ValueError(
            f"chunk_size: expected a divisor of window_size = {options['window_size']} in a decoder, got "
            f"{options['chunk_size']}"
        )
    # A cache holds no queries, which EVA needs.
    for holder in site.model.modules():
        for name in ("config", "generation_config"):
            if getattr(getattr(holder, name, None), "use_cache", False):
                getattr(holder, name).use_cache = False
    return _attach(module, options, is_causal=True)


def _vision(module: Any, site: Site, options: dict[str, Any]) -> nn.Module:
    require_layout(site, options)
    return _attach(module, options, site.layout)


def _attach(
    module: Any, options: dict[str, Any], layout: TokenLayout | None = None, is_causal: bool = False
) -> nn.Module:
    if hasattr(module, "eva"):
        raise NotReplaced("has EVA already")
    head_dim = getattr(module, "head_dim", None) or module.attention_head_size
    weight = next(module.parameters())
    module.eva = AttentionCore(
        module.config.num_attention_heads,
        head_dim,
        options,
        layout,
        is_causal=is_causal,
        device=weight.device,
        dtype=weight.dtype,
    )
    module.config._attn_implementation = "eva_replaced"
    return module


def _pair(size: Any) -> Pair:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _embedding_grid(model: Any) -> EmbeddingGrid:
    return EmbeddingGrid(model.embeddings)


def _names(kind: str, *models: str) -> list[str]:
    """Qualified names of a class, from folder and prefix of its models: "bert.Bert"."""
    pairs = (model.split(".") for model in models)
    return [f"transformers.models.{folder}.modeling_{folder}.{prefix}{kind}" for folder, prefix in pairs]


_VISION = ("vit.ViT", "deit.DeiT", "dinov2.Dinov2", "dinov2_with_registers.Dinov2WithRegisters")
_VISION_MODELS = [name.partition(".")[0] for name in _VISION]
_ENCODERS = ("bert.Bert", "roberta.Roberta", "xlm_roberta.XLMRoberta", "distilbert.DistilBert")
_DECODERS = (
    "llama.Llama",
    "mistral.Mistral",
    "qwen2.Qwen2",
    "qwen3.Qwen3",
    "gemma.Gemma",
    "phi3.Phi3",
    "granite.Granite",
)

CONVERTERS: dict[str, Any] = {
    **dict.fromkeys(_names("Attention", *_VISION), _vision),
    **dict.fromkeys(_names("SelfAttention", *_ENCODERS), _encoder),
    **dict.fromkeys(_names("Attention", *_DECODERS), _causal),
}
REFUSED = dict.fromkeys(_names("CrossAttention", *_ENCODERS), "cross-attention")
LAYOUTS = {name: _embedding_grid for kind in ("Model", "Backbone") for name in _names(kind, *_VISION)}

for _name, _function in (("eva", eva_attention_forward), ("eva_replaced", replaced_attention_forward)):
    ALL_ATTENTION_FUNCTIONS.register(_name, _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, eva_mask)
