"""Where torchvision's models have their tokens; their attention is `nn.MultiheadAttention`."""

from typing import Any

from .registry import TokenLayout


def _vision_transformer(model: Any) -> TokenLayout:
    side = model.image_size // model.patch_size
    return TokenLayout((side, side), 1)


_SWIN = "torchvision.models.swin_transformer.ShiftedWindowAttention"

CONVERTERS: dict[str, Any] = {}
REFUSED = {
    _SWIN: "windows and their shift are inside one function (timm's Swin transformers are known)",
    _SWIN + "V2": "cosine attention with a bias computed by a network",
}
LAYOUTS = {"torchvision.models.vision_transformer.VisionTransformer": _vision_transformer}
