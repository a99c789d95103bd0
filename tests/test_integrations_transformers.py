"""transformers' models with EVA in them: by `replace_attention`, and by `attn_implementation="eva"`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_cases import LOCAL, ONE_TOKEN_CHUNKS, ONE_WINDOW, assert_equal, assert_replaces, randomised
from torch import Tensor, nn

from eva_attn import replace_attention

transformers = pytest.importorskip("transformers")
import eva_attn.integrations.transformers  # noqa: E402, F401

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT = {
    "vocab_size": 50,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"image_size": 32, "patch_size": 4}
DISTILBERT = {**TEXT, "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
OPTIONS = dict.fromkeys(("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"), VISION) | {"DistilBert": DISTILBERT}
IDS = torch.randint(3, 50, (3, 20), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([20, 13, 5])[:, None]
MASK = torch.arange(20) < LENGTHS  # True = attended to


def build(kind: str, of: str = "Model", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **OPTIONS.get(kind, TEXT), **options})
    return randomised(getattr(transformers, kind + of)(config))


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def hidden(**inputs: Any) -> Callable[[nn.Module], Tensor]:
    """The last hidden states of valid tokens."""
    mask = inputs.get("attention_mask")
    valid = slice(None) if mask is None else mask.bool()
    return lambda model: model(**inputs).last_hidden_state[valid]


VISION_NAMES = {"ViT": "layers.{}.attention", "DeiT": "layers.{}.attention"}


@pytest.mark.parametrize(
    ("kind", "prefix"), [("ViT", 1), ("DeiT", 2), ("Dinov2", 1), ("Dinov2WithRegisters", 5)]
)
def test_vision(kind: str, prefix: int) -> None:
    name = VISION_NAMES.get(kind, "encoder.layer.{}.attention")
    model = build(kind)
    report = assert_replaces(model, [name.format(i) for i in range(2)], hidden(pixel_values=images()))
    assert f"grid 8 x 8, {prefix} prefix token" in str(report)


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2"])
def test_images_of_other_sizes(kind: str) -> None:
    model = build(kind)
    options = {} if kind == "Dinov2" else {"interpolate_pos_encoding": True}
    exact = copy.deepcopy(model)
    replace_attention(exact, **{**ONE_WINDOW, "chunk_size": None})
    for size in ((24, 40), (32, 32)):
        run = hidden(pixel_values=images(*size), **options)
        assert_equal(run(exact), run(model))


def test_vision_layers_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="give grid_size"):
        replace_attention(build("ViT").layers)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "DistilBert"])
def test_encoder(kind: str, padded: bool) -> None:
    name = "transformer.layer.{}.attention" if kind == "DistilBert" else "encoder.layer.{}.attention.self"
    mask = {"attention_mask": MASK.long()} if padded else {}
    run = hidden(input_ids=IDS, **mask)
    assert_replaces(build(kind), [name.format(i) for i in range(2)], run)


def test_padding_is_as_if_it_were_not_there() -> None:
    model = build("Bert")
    replace_attention(model, **LOCAL)
    out = model(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state
    for row, length in enumerate(LENGTHS[:, 0].tolist()):
        alone = model(input_ids=IDS[row : row + 1, :length]).last_hidden_state[0]
        assert_equal(out[row, :length], alone)


DECODERS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3", "Granite"]


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder(kind: str) -> None:
    model = build(kind, num_key_value_heads=1, head_dim=12, sliding_window=None)
    names = [f"layers.{i}.self_attn" for i in range(2)]
    for mask in (MASK, MASK.flip(1)):  # padding at the end, and before the start
        report = assert_replaces(model, names, hidden(input_ids=IDS, attention_mask=mask.long()))
        assert "causal, window 2, chunk 2" in str(report)


def test_decoder_settings() -> None:
    model = build("Llama")
    report = replace_attention(model, window_size=12, num_landmarks=10)
    assert "window 12, chunk 6" in str(report)  # the largest divisor of 12 up to 80 // 10
    with pytest.raises(ValueError, match="chunk_size"):
        replace_attention(build("Llama"), window_size=4, chunk_size=3)
    with pytest.raises(ValueError, match="has EVA already"):
        replace_attention(model)


def test_generation_goes_without_a_cache() -> None:
    model = build("Llama", "ForCausalLM", num_key_value_heads=1)
    exact = copy.deepcopy(model)
    replace_attention(exact, **ONE_WINDOW)
    inputs = {
        "input_ids": IDS,
        "attention_mask": MASK.flip(1).long(),
        "max_new_tokens": 4,
        "do_sample": False,
    }
    assert torch.equal(exact.generate(**inputs), model.generate(**inputs))
    with pytest.raises(ValueError, match="use_cache=False"):
        exact.generate(**inputs, use_cache=True)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_sliding_windows_are_refused(kind: str) -> None:
    model = build(kind, sliding_window=8, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding"):
        replace_attention(model)


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_modules_left_out_attend_by_softmax(kind: str) -> None:
    model = build(kind)
    half = copy.deepcopy(model)
    report = replace_attention(half, **ONE_TOKEN_CHUNKS, exclude="*.0.*")
    assert len(report) == len(report.left) == 1
    for mask in ({}, {"attention_mask": MASK.long()}):
        run = hidden(input_ids=IDS, **mask)
        assert_equal(run(half), run(model))


def test_cross_attention_is_left() -> None:
    model = build("Bert", is_decoder=True, add_cross_attention=True)
    exact = copy.deepcopy(model)
    report = replace_attention(exact, **ONE_WINDOW)
    assert len(report) == 2
    assert {entry.reason for entry in report.left} == {"cross-attention"}
    inputs = {
        "input_ids": IDS,
        "attention_mask": MASK.long(),
        "encoder_hidden_states": torch.randn(3, 7, 24, dtype=torch.float64),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([7, 3, 5])[:, None]).long(),
        "use_cache": False,
    }
    assert_equal(hidden(**inputs)(exact), hidden(**inputs)(model))


@pytest.mark.parametrize("settings", [ONE_WINDOW, ONE_TOKEN_CHUNKS])
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2WithRegisters", "Bert", "Llama"])
def test_own_door(kind: str, settings: dict[str, Any]) -> None:
    model = build(kind, use_cache=False)
    text = {"input_ids": IDS, "attention_mask": MASK.long()}
    inputs = text if kind in ("Bert", "Llama") else {"pixel_values": images()}
    expected = hidden(**inputs)(model)
    model.set_attn_implementation("eva")
    model.config.eva_attention = settings
    assert_equal(hidden(**inputs)(model), expected)
    model.config.eva_attention = LOCAL
    assert not torch.allclose(hidden(**inputs)(model), expected)
    keys = model.state_dict().keys()
    assert not [name for name in keys if "landmark" in name]


def test_own_door_at_construction() -> None:
    config = transformers.BertConfig(**SIZES, **TEXT, eva_attention=LOCAL)
    model = transformers.AutoModel.from_config(config, attn_implementation="eva").train()
    model(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state.sum().backward()
    assert config.__class__.from_dict(config.to_dict()).eva_attention == LOCAL


def test_own_door_refuses() -> None:
    model = build("Llama", attn_implementation="eva")
    packed = torch.cat([torch.arange(12), torch.arange(8)])[None].expand(3, -1)
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=IDS, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, N\]"):
        model(input_ids=IDS, attention_mask=torch.ones(3, 1, 20, 20, dtype=torch.bool), use_cache=False)
    model.config.eva_attention = {"projection": "linear"}
    with pytest.raises(ValueError, match="projection"):
        model(input_ids=IDS, use_cache=False)
    vision = build("Dinov2", attn_implementation="eva")
    with pytest.raises(ValueError, match="replace_attention"):
        vision(images(24, 40))


def test_compiles() -> None:
    model = build("Llama", num_key_value_heads=1, num_hidden_layers=1)
    replace_attention(model, **LOCAL)
    inputs = {"input_ids": IDS, "attention_mask": MASK.long()}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(hidden(**inputs)(compiled), hidden(**inputs)(model))
