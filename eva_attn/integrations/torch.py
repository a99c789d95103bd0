"""Attention of torch itself."""

from typing import Any

from torch import nn

from ..multihead_attention import EVAMultiheadAttention
from .registry import NotReplaced, Site


def _multihead_attention(module: nn.MultiheadAttention, site: Site, options: dict[str, Any]) -> nn.Module:
    if isinstance(site.parent, nn.TransformerDecoderLayer) and module is site.parent.multihead_attn:
        raise NotReplaced("cross-attention")
    if not module._qkv_same_embed_dim:
        raise NotReplaced("keys and values of other widths than the queries, as in cross-attention")
    if module.bias_k is not None or module.add_zero_attn:
        raise NotReplaced("attends to more than the tokens (add_bias_kv, add_zero_attn)")
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


CONVERTERS = {"torch.nn.modules.activation.MultiheadAttention": _multihead_attention}
REFUSED: dict[str, str] = {}
LAYOUTS: dict[str, Any] = {}
