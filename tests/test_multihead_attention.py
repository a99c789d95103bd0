"""The interface of `nn.MultiheadAttention`: against softmax where EVA is exact, and in torch's own layers."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_attn import EVAMultiheadAttention, EVAttention, reference

# One window that holds everything, and no landmark of what it holds.
EXACT = {"window_size": 64, "chunk_size": 4, "projection": "identity", "exclude_window_landmarks": True}
LOCAL = {"window_size": 4, "chunk_size": 2}


def pair_of(**options: Any) -> tuple[nn.MultiheadAttention, EVAMultiheadAttention]:
    """Softmax attention and EVA that equals it, with the same weights, in evaluation."""
    softmax = nn.MultiheadAttention(12, 2, **options, dtype=torch.float64).eval()
    for parameter in softmax.parameters():
        nn.init.normal_(parameter, std=0.4)
    eva = EVAMultiheadAttention(12, 2, **options, **EXACT, dtype=torch.float64).eval()
    eva.load_state_dict(softmax.state_dict())
    return softmax, eva


def tokens_of(*shape: int) -> Tensor:
    return torch.randn(*shape, 12, dtype=torch.float64)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}])
@pytest.mark.parametrize("floating", [None, False, True])
def test_equals_softmax_where_eva_is_exact(options: dict[str, Any], floating: bool | None) -> None:
    torch.manual_seed(0)
    softmax, eva = pair_of(**options)
    x = tokens_of(3, 10) if "batch_first" in options else tokens_of(10, 3)
    mask = None
    if floating is not None:
        mask = torch.arange(10) >= torch.tensor([10, 7, 1])[:, None]
        if floating:
            mask = torch.zeros(3, 10, dtype=torch.float64).masked_fill(mask, -torch.inf)
    expected, _ = softmax(x, x, x, key_padding_mask=mask, need_weights=False)
    actual, weights = eva(x, x, x, key_padding_mask=mask)
    assert weights is None
    assert actual.shape == expected.shape
    # Softmax attention has outputs for padded queries too.
    valid = torch.ones(3, 10, dtype=torch.bool) if mask is None else mask == 0
    valid = valid if "batch_first" in options else valid.T
    assert_equal(actual[valid], expected[valid])


def test_unbatched() -> None:
    torch.manual_seed(0)
    softmax, eva = pair_of()
    x = tokens_of(10)
    assert_equal(eva(x, x, x)[0], softmax(x, x, x)[0])
    mask = torch.arange(10) > 6
    expected = softmax(x, x, x, key_padding_mask=mask)[0]
    assert_equal(eva(x, x, x, key_padding_mask=mask)[0][:7], expected[:7])


def test_causal() -> None:
    torch.manual_seed(0)
    softmax, eva = pair_of()
    x = tokens_of(10, 3)
    causal = nn.Transformer.generate_square_subsequent_mask(10, dtype=torch.float64)
    expected, _ = softmax(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)
    assert_equal(eva(x, x, x, is_causal=True)[0], expected)
    assert_equal(eva(x, x, x, attn_mask=causal, is_causal=True)[0], expected)


def test_options_reach_the_function() -> None:
    torch.manual_seed(0)
    options = {**LOCAL, "grid_size": (3, 4), "overlap": 1, "relative_bias": "table", "num_prefix_tokens": 1}
    module = EVAMultiheadAttention(12, 2, batch_first=True, dropout=0.3, **options, dtype=torch.float64)
    x = tokens_of(2, 13)
    qkv = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).view(2, 13, 3, 2, 6)

    def oracle(**more: Any) -> Tensor:
        given = {**options, "relative_bias": module.relative_bias, "projection": module.landmark_projection}
        out = reference.eva_attention_qkvpacked(qkv, **{**given, **more})
        return module.out_proj(out.transpose(1, 2).reshape(2, -1, 12))

    torch.manual_seed(1)
    actual, _ = module(x, x, x)
    torch.manual_seed(1)
    assert_equal(actual, oracle(noise=torch.randn(2, 2, 4, 6), dropout_p=0.3))
    module.eval()
    assert_equal(module(x, x, x)[0], oracle())
    assert_equal(module(x, x, x, grid_size=(2, 6))[0], oracle(grid_size=(2, 6)))
    noise = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    assert_equal(module(x, x, x, noise=noise)[0], oracle(noise=noise))


def test_parameters_are_those_of_softmax_attention() -> None:
    torch.manual_seed(0)
    softmax = nn.MultiheadAttention(12, 2)
    torch.manual_seed(0)
    eva = EVAMultiheadAttention(12, 2, relative_bias="table")
    for name, x in softmax.state_dict().items():
        assert torch.equal(eva.state_dict()[name], x)
    new = eva.state_dict().keys() - softmax.state_dict().keys()
    assert {name.split(".")[0] for name in new} == {"landmark_projection", "relative_bias"}
    assert EVAMultiheadAttention(12, 2, bias=False).in_proj_bias is None
    assert "window_size=7" in repr(eva)
    assert isinstance(copy.deepcopy(eva), nn.MultiheadAttention)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_in_an_encoder(norm_first: bool, masked: bool, grad: bool) -> None:
    """In evaluation torch's layers compute softmax attention with the weights of what they hold, unless kept
    from it, and make nested tensors of padded ones."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        12, 2, 24, batch_first=True, norm_first=norm_first, dtype=torch.float64, activation="gelu"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, 2).eval()
    x = tokens_of(3, 10)
    mask = torch.arange(10) >= torch.tensor([10, 7, 4])[:, None] if masked else None
    valid = ~mask if masked else torch.ones(3, 10, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        softmax = encoder(x, src_key_padding_mask=mask)
        for options, is_exact in ((EXACT, True), (LOCAL, False)):
            swapped = copy.deepcopy(encoder)
            for block in swapped.layers:
                eva = EVAMultiheadAttention(12, 2, batch_first=True, **options, dtype=torch.float64).eval()
                eva.load_state_dict(block.self_attn.state_dict(), strict=False)
                block.self_attn = eva
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                actual = swapped(x, src_key_padding_mask=mask)
            if is_exact:
                assert_equal(actual[valid], softmax[valid])
            else:
                assert not torch.allclose(actual[valid], softmax[valid], atol=1e-3)
                alone = swapped(x[2:, :4])
                assert_equal(actual[2:, :4], alone) if masked else None


def test_in_a_causal_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dtype=torch.float64).eval()
    x = tokens_of(3, 10)
    causal = nn.Transformer.generate_square_subsequent_mask(10, dtype=torch.float64)
    expected = layer(x, src_mask=causal, is_causal=True)
    eva = EVAMultiheadAttention(12, 2, batch_first=True, **EXACT, dtype=torch.float64).eval()
    eva.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = eva
    assert_equal(layer(x, src_mask=causal, is_causal=True), expected)
    with pytest.raises(ValueError, match="attn_mask"):
        layer(x, src_mask=causal)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(masked: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True).eval()
    layer.self_attn = EVAMultiheadAttention(12, 2, batch_first=True, **LOCAL).eval()
    x = torch.randn(2, 10, 12)
    mask = torch.arange(10) >= torch.tensor([10, 7])[:, None] if masked else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, src_key_padding_mask=mask), layer(x, src_key_padding_mask=mask))


def test_equals_the_module_with_its_own_projections() -> None:
    torch.manual_seed(0)
    eva = EVAMultiheadAttention(12, 2, batch_first=True, **LOCAL).eval()
    other = EVAttention(12, 2, **LOCAL).eval()
    other.qkv.load_state_dict({"weight": eva.in_proj_weight, "bias": eva.in_proj_bias})
    other.proj.load_state_dict(eva.out_proj.state_dict())
    other.landmark_projection.load_state_dict(eva.landmark_projection.state_dict())
    x = torch.randn(2, 13, 12)
    torch.testing.assert_close(eva(x, x, x)[0], other(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed_dim": 13}, ["embed_dim", "13", "num_heads = 2"]),
        ({"num_heads": 0}, ["num_heads = 0"]),
        ({"kdim": 6}, ["kdim", "6", "12"]),
        ({"vdim": 6}, ["vdim", "6", "12"]),
        ({"add_bias_kv": True}, ["add_bias_kv", "True"]),
        ({"add_zero_attn": True}, ["add_zero_attn", "True"]),
        ({"dropout": 1.0}, ["drop", "1.0"]),
        ({"window_size": 0}, ["window_size", "0"]),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        EVAMultiheadAttention(**{"embed_dim": 12, "num_heads": 2, **options})
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"need_weights": True}, "need_weights"),
        ({"attn_mask": torch.zeros(9, 9)}, "attn_mask"),
        ({"key": torch.zeros(9, 2, 12)}, "key"),
        ({"value": torch.zeros(9, 2, 12)}, "value"),
        ({"key_padding_mask": torch.full((2, 9), -1.0)}, "key_padding_mask"),
        ({"key_padding_mask": torch.zeros(2, 8).bool()}, "key_padding_mask"),
        ({"is_causal": True}, "is_causal"),  # chunks of 3 tokens in windows of 4
    ],
)
def test_bad_input(arguments: dict[str, Any], word: str) -> None:
    module = EVAMultiheadAttention(12, 2, window_size=4, chunk_size=3)
    x = torch.zeros(9, 2, 12)
    with pytest.raises(ValueError, match=word):
        module(**{"query": x, "key": x, "value": x, **arguments})
    x = torch.zeros(9, 2, 13)
    with pytest.raises(ValueError, match=r"query: expected .* got \(9, 2, 13\)"):
        module(x, x, x)
