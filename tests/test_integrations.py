"""Models of torch, torchvision and timm with EVA in them: by softmax where EVA is exact."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_attn import EVAMultiheadAttention, EVAttention, replace_attention

# One window that holds everything, and no landmark of what it holds.
EXACT = {"window_size": 64, "chunk_size": 4, "projection": "identity", "exclude_window_landmarks": True}
LOCAL = {"window_size": 2, "chunk_size": 2}


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_replaces(model: nn.Module, x: Tensor, names: list[str], **options: Any) -> None:
    """Exact settings change no output and no parameter; others change outputs and nothing else."""
    expected = model(x)
    before = dict(model.named_parameters())
    assert replace_attention(model, **EXACT, **options) == names
    assert_equal(model(x), expected)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(x is before[name] for name, x in model.named_parameters())
    assert not any(module.training for module in model.modules())
    model.train()(x).sum().backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)


def test_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 24, dtype=torch.float64, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    names = [f"layers.{i}.self_attn" for i in range(3)]
    assert_replaces(model, torch.randn(2, 10, 12, dtype=torch.float64), names)


def test_names() -> None:
    def model() -> nn.Module:
        return nn.Transformer(12, 2, 2, 2, 24)

    encoder = [f"encoder.layers.{i}.self_attn" for i in range(2)]
    decoder = [f"decoder.layers.{i}.self_attn" for i in range(2)]
    assert replace_attention(model(), **LOCAL) == encoder + decoder
    assert replace_attention(model(), **LOCAL, include="encoder.*") == encoder
    assert replace_attention(model(), **LOCAL, exclude=["encoder.*", "decoder.layers.1.*"]) == decoder[:1]
    with pytest.raises(ValueError, match=r"found none"):
        replace_attention(model(), **LOCAL, include="nothing")
    with pytest.raises(ValueError, match=r"found none"):
        replace_attention(nn.MultiheadAttention(12, 2))
    assert replace_attention(nn.ModuleList([nn.MultiheadAttention(12, 2), nn.Linear(2, 2)])) == ["0"]


def test_a_shared_module_stays_shared() -> None:
    attention = nn.MultiheadAttention(12, 2, bias=False, dropout=0.1, dtype=torch.bfloat16)
    model = nn.ModuleList([attention, attention, nn.ModuleList([attention])])
    assert replace_attention(model, **LOCAL) == ["0", "1", "2.0"]
    assert model[0] is model[1] is model[2][0]
    assert isinstance(model[0], EVAMultiheadAttention)
    assert model[0].in_proj_bias is None
    assert model[0].attn_drop == 0.1
    assert model[0].landmark_projection.key[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"kdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_leaves_what_is_not_self_attention(options: dict[str, Any]) -> None:
    model = nn.ModuleList([nn.MultiheadAttention(12, 2, **options)])
    with pytest.raises(ValueError, match="found none"):
        replace_attention(model)


def test_torchvision() -> None:
    vision = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = vision.VisionTransformer(32, 4, 2, 2, 12, 24).double().eval()
    nn.init.normal_(model.heads.head.weight)
    names = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    assert_replaces(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), names)
    eva = model.encoder.layers[0].self_attention
    assert (eva.grid_size, eva.num_prefix_tokens) == ((8, 8), 1)


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, 1),
        ({"qk_norm": True, "reg_tokens": 4, "qkv_bias": False}, 5),
        ({"class_token": False, "global_pool": "avg", "attn_drop_rate": 0.1, "proj_drop_rate": 0.1}, 0),
    ],
)
def test_timm(options: dict[str, Any], prefix: int) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": (24, 32), "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    model = timm.models.VisionTransformer(**sizes, num_classes=5, **options).double().eval()
    names = [f"blocks.{i}.attn" for i in range(2)]
    assert_replaces(model, torch.randn(2, 3, 24, 32, dtype=torch.float64), names)
    eva = model.blocks[0].attn
    assert isinstance(eva, EVAttention)
    assert (eva.grid_size, eva.num_prefix_tokens) == ((6, 8), prefix)
    assert eva.attn_drop == options.get("attn_drop_rate", 0.0)
    with pytest.raises(ValueError, match="attn_mask"):
        eva(torch.zeros(2, 48 + prefix, 12).double(), attn_mask=torch.zeros(1))


@pytest.mark.parametrize("options", [{"scale_norm": True}, {"gated": True}, {"attn_head_dim": 4}])
def test_leaves_what_timm_adds_to_attention(options: dict[str, Any]) -> None:
    layers = pytest.importorskip("timm.layers")
    try:
        attention = layers.Attention(12, 2, norm_layer=nn.LayerNorm, **options)
    except TypeError:
        pytest.skip("this timm does not have it")
    with pytest.raises(ValueError, match="found none"):
        replace_attention(nn.ModuleList([attention]))


def test_another_grid_is_refused() -> None:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=12, depth=1, num_heads=2, dynamic_img_size=True
    )
    replace_attention(model, **LOCAL)
    with pytest.raises(ValueError, match="grid_size"):
        model(torch.randn(1, 3, 40, 40))
