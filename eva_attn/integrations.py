"""EVA in models that were written with softmax attention."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .modules import EVAttention
from .multihead_attention import EVAMultiheadAttention


def replace_attention(
    model: nn.Module,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    **options: Any,
) -> list[str]:
    """Puts EVA in place of the softmax self-attention of `model`, which keeps its weights.

    Replaces `nn.MultiheadAttention` (torchvision's vision transformers, `nn.TransformerEncoder`) and the
    attention of timm's vision transformers. Parameters stay the same objects under the same names, so that
    checkpoints of the original load, with `strict=False` where EVA has parameters of its own.

    Args:
        model: changed in place.
        include, exclude: patterns of module names, such as "encoder.layers.*": those that match one of
            `include` and none of `exclude` are replaced. Attention to other tokens than its own is to be
            excluded (in `nn.TransformerDecoderLayer` it is left alone anyway).
        options: of `EVAttention`, from `window_size` on. `grid_size` and `num_prefix_tokens` are those of the
            vision transformer around a module, unless given.

    Returns:
        The names of the modules that were replaced. ValueError where there are none.
    """
    layouts = {name: layout for name, x in model.named_modules() if (layout := _layout(x))}
    made: dict[nn.Module, nn.Module | None] = {}
    replaced = []
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # named_children skips second names
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if child is None or not _matches(name, include) or _matches(name, exclude):
                continue
            if isinstance(parent, nn.TransformerDecoderLayer) and child is parent.multihead_attn:
                continue
            if child not in made:
                around = [x for x in layouts if not x or name.startswith(x + ".")]
                layout = layouts[max(around, key=len)] if around else {}
                made[child] = _replacement(child, {**layout, **options})
            if (eva := made[child]) is not None:
                setattr(parent, child_name, eva.train(child.training))
                replaced.append(name)
    if not replaced:
        raise ValueError(
            "model: expected nn.MultiheadAttention or attention of timm's vision transformers within it, "
            f"under a name that include = {include!r} and exclude = {exclude!r} let through, found none"
        )
    return replaced


class TimmAttention(EVAttention):
    """`EVAttention` as timm's transformer blocks call it."""

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask, is_causal: expected None and False, as EVA knows no mask of pairs")
        return super().forward(x)


def _replacement(module: nn.Module, options: dict[str, Any]) -> nn.Module | None:
    """EVA with the weights of `module`, None where that is not softmax self-attention known here."""
    if type(module) is nn.MultiheadAttention:
        return _of_torch(module, options)
    if _name(type(module)) in ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"):
        return _of_timm(module, options)
    return None


def _of_torch(module: nn.MultiheadAttention, options: dict[str, Any]) -> nn.Module | None:
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return None
    eva = EVAMultiheadAttention(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout,
        batch_first=module.batch_first,
        device=module.in_proj_weight.device,
        dtype=module.in_proj_weight.dtype,
        **options,
    )
    eva.in_proj_weight, eva.in_proj_bias = module.in_proj_weight, module.in_proj_bias
    eva.out_proj = module.out_proj
    return eva


def _of_timm(module: Any, options: dict[str, Any]) -> nn.Module | None:
    dim = module.qkv.in_features
    plain = (module.qkv.out_features, module.proj.out_features) == (3 * dim, dim)
    if not plain or any(_is_there(getattr(module, name, None)) for name in ("norm", "gate")):
        return None
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
    if _is_there(module.q_norm):
        eva.q_norm, eva.k_norm = module.q_norm, module.k_norm
    return eva


def _is_there(module: nn.Module | None) -> bool:
    return not isinstance(module, (nn.Identity, type(None)))


def _layout(module: Any) -> dict[str, Any]:
    """Where the tokens of a vision transformer lie, empty for other modules."""
    if _is_a(module, "torchvision.models.vision_transformer.VisionTransformer"):
        side = module.image_size // module.patch_size
        return {"grid_size": (side, side), "num_prefix_tokens": 1}
    if _is_a(module, "timm.models.vision_transformer.VisionTransformer"):
        grid_size = tuple(module.patch_embed.grid_size)
        return {"grid_size": grid_size, "num_prefix_tokens": module.num_prefix_tokens}
    return {}


def _is_a(module: nn.Module, name: str) -> bool:
    return any(_name(kind) == name for kind in type(module).__mro__)


def _name(kind: type) -> str:
    """By which a class is known without an import of its library, which need not be installed."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in patterns)
