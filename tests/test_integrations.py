"""Models of torch and torchvision with EVA in them, and what `replace_attention` says of any."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from integration_cases import LOCAL, ONE_WINDOW, assert_equal, assert_replaces, randomised
from torch import nn

from eva_attn import EVAMultiheadAttention, replace_attention

LENGTHS = (10, 6, 3)
PADDING = torch.arange(10) >= torch.tensor(LENGTHS)[:, None]


def encoder(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, **options)
    return randomised(nn.TransformerEncoder(layer, 3, enable_nested_tensor=True))


def test_import_needs_torch_alone() -> None:
    code = "import sys, eva_attn; print({'timm', 'transformers', 'torchvision'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}, {"activation": "gelu"}])
def test_encoder(options: dict[str, Any]) -> None:
    names = [f"layers.{i}.self_attn" for i in range(3)]
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    assert_replaces(encoder(**options), names, lambda model: model(x))


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_does_not_bypass_eva(grad: bool, padded: bool) -> None:
    softmax = encoder()
    x = torch.randn(3, 10, 12, dtype=torch.float64)
    mask = PADDING if padded else None
    exact, local = copy.deepcopy(softmax), copy.deepcopy(softmax)
    replace_attention(exact, **ONE_WINDOW)
    replace_attention(local, **LOCAL)
    with torch.set_grad_enabled(grad):
        expected = softmax(x, src_key_padding_mask=mask)
        valid = ~PADDING if padded else slice(None)
        assert_equal(exact(x, src_key_padding_mask=mask)[valid], expected[valid])
        assert not torch.allclose(local(x, src_key_padding_mask=mask)[valid], expected[valid])


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    model = encoder()
    rows = [torch.randn(n, 12, dtype=torch.float64) for n in LENGTHS]
    expected = [model.layers[0](row[None])[0] for row in rows]
    replace_attention(model, **ONE_WINDOW)
    with torch.no_grad():
        out = model.layers[0](torch.nested.nested_tensor(rows, layout=layout))
    assert out.layout == layout
    for actual, row in zip(out.unbind(), expected, strict=True):
        assert_equal(actual, row)


def test_names() -> None:
    def model() -> nn.Module:
        return nn.Transformer(12, 2, 2, 2, 24, batch_first=True)

    encoder = [f"encoder.layers.{i}.self_attn" for i in range(2)]
    decoder = [f"decoder.layers.{i}.self_attn" for i in range(2)]
    report = replace_attention(model(), **LOCAL)
    assert report == encoder + decoder
    assert [entry.reason for entry in report.left] == ["cross-attention"] * 2
    assert replace_attention(model(), **LOCAL, include="encoder.*") == encoder
    assert replace_attention(model(), **LOCAL, exclude=["encoder.*", "decoder.layers.1.*"]) == decoder[:1]
    with pytest.raises(ValueError, match=r"found none\n  encoder.layers.0.self_attn: excluded"):
        replace_attention(model(), **LOCAL, include="nothing")
    with pytest.raises(ValueError, match="found none"):
        replace_attention(nn.MultiheadAttention(12, 2))
    assert replace_attention(nn.ModuleList([nn.MultiheadAttention(12, 2), nn.Linear(2, 2)])) == ["0"]


class OwnAttention(nn.Module):
    """Attention that nobody has heard of."""


def test_the_report_prints() -> None:
    model = nn.ModuleDict(
        {"encoder": nn.Transformer(12, 2, 2, 1, 24, batch_first=True), "own": OwnAttention()}
    )
    report = replace_attention(model, window_size=4, overlap=1, num_landmarks=8, exclude="*.decoder.*")
    assert str(report).splitlines() == [
        "EVA in 2 modules",
        "  encoder.encoder.layers.*.self_attn (2)  torch MultiheadAttention  "
        "window 4, overlap 1, chunks for 8 landmarks, sequence, linear-layernorm projection",
        "left as they were: 3 modules",
        "  encoder.decoder.layers.0.self_attn       torch MultiheadAttention        excluded",
        "  encoder.decoder.layers.0.multihead_attn  torch MultiheadAttention        excluded",
        "  own                                      test_integrations OwnAttention  not known here",
    ]


def test_a_shared_module_stays_shared() -> None:
    attention = nn.MultiheadAttention(12, 2, bias=False, dropout=0.1, dtype=torch.bfloat16)
    model = nn.ModuleList([attention, attention, nn.ModuleList([attention])])
    assert replace_attention(model, **LOCAL) == ["0", "1", "2.0"]
    assert model[0] is model[1] is model[2][0]
    assert isinstance(model[0], EVAMultiheadAttention)
    assert model[0].in_proj_bias is None
    assert model[0].attn_drop == 0.1
    assert model[0].landmark_projection.key[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 6}, "other widths"),
        ({"add_bias_kv": True}, "more than"),
        ({"add_zero_attn": True}, "more than"),
    ],
)
def test_leaves_what_is_not_self_attention(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"found none\n  0: .*{reason}"):
        replace_attention(nn.ModuleList([nn.MultiheadAttention(12, 2, **options)]))


def test_torchvision() -> None:
    vision = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = randomised(vision.VisionTransformer(32, 4, 2, 2, 12, 24))
    names = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_replaces(model, names, lambda model: model(x))
    replace_attention(model, **LOCAL)
    eva = model.encoder.layers[0].self_attention
    assert (eva.grid_size, eva.num_prefix_tokens) == ((8, 8), 1)


def test_torchvision_swin_is_left() -> None:
    vision = pytest.importorskip("torchvision.models")
    model = vision.SwinTransformer([4, 4], 12, [2], [2], [4, 4])
    with pytest.raises(ValueError, match="windows and their shift"):
        replace_attention(model)
