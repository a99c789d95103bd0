"""Every mistake is one error that names the argument and what was given, through the functions, by the
operators themselves, and by the oracle."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from op_cases import DEVICES
from torch import Tensor

from eva_attn import LandmarkProjection, functional, reference

BATCH, HEADS, GRID, PREFIX, DIM = 2, 2, (3, 4), 1, 4
TOKENS, CHUNKS = 13, 4


def qkv_of(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: torch.randn(BATCH, HEADS, TOKENS, DIM, device=device, dtype=dtype)
        for name in ("query", "key", "value")
    }


def options_of(device: str) -> dict[str, Any]:
    """Arguments without a mistake, that functions and operators share."""
    return {
        "grid_size": GRID,
        "window_size": (2, 2),
        "chunk_size": (2, 2),
        "overlap": (1, 0),
        "chunk_overlap": (0, 1),
        "num_prefix_tokens": PREFIX,
        "noise": torch.randn(BATCH, HEADS, CHUNKS, DIM, device=device),
        "relative_bias": torch.randn(HEADS, 5, 3, device=device),
        "landmark_bias": torch.randn(BATCH, CHUNKS, device=device),
        "key_padding_mask": torch.zeros(BATCH, TOKENS, dtype=torch.bool, device=device),
    }


def weights_of(device: str) -> dict[str, Tensor]:
    """What only operators are given."""
    weights = {}
    for name in ("key", "query"):
        weights[f"{name}_weight"] = torch.randn(DIM, DIM, device=device)
        for vector in ("bias", "norm_weight", "norm_bias"):
            weights[f"{name}_{vector}"] = torch.randn(DIM, device=device)
    return weights


def dtype_names(dtype: torch.dtype) -> tuple[str, ...]:
    """How PyTorch calls it, in Python and in C++."""
    short = {
        torch.float16: "Half",
        torch.float32: "Float",
        torch.float64: "Double",
        torch.int32: "Int",
        torch.int64: "Long",
        torch.bool: "Bool",
        torch.complex64: "ComplexFloat",
    }
    return short[dtype], str(dtype).removeprefix("torch.")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("functions", [functional, reference])
def test_tangents_take_no_counts_and_no_weights(functions: ModuleType) -> None:
    query, key, value = tensors = torch.randn(3, 1, 2, 6, 4).unbind()
    sizes = {"window_size": 3, "chunk_size": 2}
    tangent = LandmarkProjection(4, "tangent")
    with pytest.raises(ValueError, match="log_count_bias"):
        functions.eva_attention(query, key, value, **sizes, projection=tangent, log_count_bias=True)
    landmarks = functions.chunk_summary(query, key, value, chunk_size=2, projection=tangent)
    with pytest.raises(ValueError, match="log_count_bias"):
        functions.window_attention(query, key, value, *landmarks, **sizes, log_count_bias=True)
    with pytest.raises(ValueError, match="landmark_entropy needs landmark_key"):
        functions.window_attention(query, key, value, landmark_entropy=landmarks[2], **sizes)
    with pytest.raises(ValueError, match=r"landmark_entropy must have shape \[1, 2, 3\], got \[1, 2, 2\]"):
        functions.window_attention(*tensors, *landmarks[:2], landmarks[2][..., 1:], **sizes)
    with pytest.raises(ValueError, match="tangent needs a key_weight of None"):
        torch.ops.eva_attn.chunk_summary(
            *tensors, grid_size=(1, 6), chunk_size=(1, 2), key_weight=torch.eye(4), tangent=True
        )


# Argument, what is wrong, error, and what its message tells of the value: a tuple holds alternatives.
SHARED = [
    ("query", zeros(2, 13, 4), ValueError, ["2, 13, 4"]),
    ("query", zeros(1, 2, 2, 13, 4), ValueError, ["1, 2, 2, 13, 4"]),
    ("key", zeros(2, 13, 4), ValueError, ["2, 13, 4"]),
    ("key", zeros(2, 2, 12, 4), ValueError, ["2, 2, 12, 4"]),
    ("key", zeros(3, 2, 13, 4), ValueError, ["3, 2, 13, 4"]),
    ("key", zeros(2, 3, 13, 4), ValueError, ["2, 3, 13, 4"]),
    ("value", zeros(2, 2, 13, 8), ValueError, ["2, 2, 13, 8"]),
    ("value", zeros(2, 2, 13), ValueError, ["2, 2, 13"]),
    ("query", zeros(2, 2, 13, 4, dtype=torch.int32), TypeError, [dtype_names(torch.int32)]),
    ("query", zeros(2, 2, 13, 4, dtype=torch.complex64), TypeError, [dtype_names(torch.complex64)]),
    ("key", zeros(2, 2, 13, 4, dtype=torch.float16), TypeError, [dtype_names(torch.float16)]),
    ("value", zeros(2, 2, 13, 4, dtype=torch.float64), TypeError, [dtype_names(torch.float64)]),
    ("key", torch.zeros(2, 2, 13, 4, device="meta"), ValueError, ["meta"]),
    ("value", torch.zeros(2, 2, 13, 4, device="meta"), ValueError, ["meta"]),
    ("grid_size", (3, 5), ValueError, ["3, 5", "13"]),
    ("grid_size", (4, 4), ValueError, ["4, 4", "13"]),
    ("grid_size", (-3, -4), ValueError, ["-3"]),
    ("grid_size", (1, 2**62), ValueError, [str(2**62)]),
    ("grid_size", (2**32, 2**32), ValueError, [str(2**32)]),
    ("window_size", (0, 2), ValueError, ["0, 2"]),
    ("window_size", (2, -1), ValueError, ["2, -1"]),
    ("chunk_size", (2, 0), ValueError, ["2, 0"]),
    ("chunk_size", (-(2**40), 2), ValueError, [str(-(2**40))]),
    ("overlap", (-1, 0), ValueError, ["-1, 0"]),
    ("chunk_overlap", (0, -2), ValueError, ["0, -2"]),
    ("num_prefix_tokens", -1, ValueError, ["-1"]),
    ("num_prefix_tokens", 14, ValueError, ["14"]),
    ("is_causal", True, ValueError, ["height 3"]),
    ("scale", math.nan, ValueError, ["nan"]),
    ("scale", math.inf, ValueError, ["inf"]),
    ("scale", -math.inf, ValueError, ["-inf"]),
    ("dropout_p", 1.0, ValueError, ["1"]),
    ("dropout_p", 1.5, ValueError, ["1.5"]),
    ("dropout_p", -0.25, ValueError, ["-0.25"]),
    ("dropout_p", math.nan, ValueError, ["nan"]),
    ("noise", zeros(2, 2, 5, 4), ValueError, ["2, 2, 5, 4", "2, 2, 4, 4"]),
    ("noise", zeros(2, 1, 4, 4), ValueError, ["2, 1, 4, 4"]),
    ("noise", zeros(2, 2, 4), ValueError, ["2, 2, 4"]),
    ("noise", zeros(2, 2, 4, 4, dtype=torch.float64), TypeError, [dtype_names(torch.float64)]),
    ("noise", torch.zeros(2, 2, 4, 4, device="meta"), ValueError, ["meta"]),
    ("relative_bias", zeros(3, 5, 3), ValueError, ["3, 5, 3"]),
    ("relative_bias", zeros(2, 3, 3), ValueError, ["2, 3, 3", "5, 3"]),
    ("relative_bias", zeros(2, 15), ValueError, ["2, 15"]),
    ("relative_bias", zeros(2, 5, 3, dtype=torch.int64), TypeError, [dtype_names(torch.int64)]),
    ("relative_bias", zeros(2, 5, 3, dtype=torch.float16), TypeError, [dtype_names(torch.float16)]),
    ("relative_bias", torch.zeros(2, 5, 3, device="meta"), ValueError, ["meta"]),
    ("landmark_bias", zeros(2, 5), ValueError, ["2, 5", "2, 4"]),
    ("landmark_bias", zeros(1, 4), ValueError, ["1, 4"]),
    ("landmark_bias", zeros(2, 2, 4), ValueError, ["2, 2, 4"]),
    ("landmark_bias", zeros(2, 4, dtype=torch.bool), TypeError, [dtype_names(torch.bool)]),
    ("landmark_bias", torch.zeros(2, 4, device="meta"), ValueError, ["meta"]),
    ("key_padding_mask", zeros(2, 12, dtype=torch.bool), ValueError, ["2, 12", "2, 13"]),
    ("key_padding_mask", zeros(1, 13, dtype=torch.bool), ValueError, ["1, 13"]),
    ("key_padding_mask", zeros(13, dtype=torch.bool), ValueError, ["[13]"]),
    ("key_padding_mask", zeros(2, 13), TypeError, [dtype_names(torch.float32), "ool"]),
    ("key_padding_mask", zeros(2, 13, dtype=torch.int64), TypeError, [dtype_names(torch.int64), "ool"]),
    ("key_padding_mask", torch.zeros(2, 13, dtype=torch.bool, device="meta"), ValueError, ["meta"]),
]

OP_ONLY = [
    ("grid_size", (3, 2, 2), ValueError, ["3, 2, 2"]),
    ("window_size", (2, 2, 2), ValueError, ["2, 2, 2"]),
    ("chunk_size", (2, 2, 2), ValueError, ["2, 2, 2"]),
    ("overlap", (1, 0, 0), ValueError, ["1, 0, 0"]),
    ("chunk_overlap", (0, 1, 0), ValueError, ["0, 1, 0"]),
    ("norm_eps", -1.0, ValueError, ["-1"]),
    ("norm_eps", math.nan, ValueError, ["nan"]),
    ("mean_divisor", -3, ValueError, ["-3"]),
    ("key_weight", zeros(4, 5), ValueError, ["4, 5"]),
    ("key_weight", zeros(8, 8), ValueError, ["8, 8"]),
    ("query_weight", zeros(4), ValueError, ["[4]"]),
    ("key_weight", zeros(4, 4, dtype=torch.float64), TypeError, [dtype_names(torch.float64)]),
    ("key_weight", torch.zeros(4, 4, device="meta"), ValueError, ["meta"]),
    ("key_bias", zeros(5), ValueError, ["[5]"]),
    ("query_bias", zeros(4, dtype=torch.int64), TypeError, [dtype_names(torch.int64)]),
    ("key_norm_weight", zeros(4, 1), ValueError, ["4, 1"]),
    ("query_norm_bias", zeros(1), ValueError, ["[1]"]),
    ("key_weight", None, ValueError, []),
    ("key_norm_weight", None, ValueError, []),
]

SUMMARY = {
    "query",
    "key",
    "value",
    "grid_size",
    "chunk_size",
    "chunk_overlap",
    "num_prefix_tokens",
    "is_causal",
    "noise",
    "key_padding_mask",
    "scale",
    "norm_eps",
    "mean_divisor",
    *weights_of("cpu"),
}
WINDOW = {
    "query",
    "key",
    "value",
    "grid_size",
    "window_size",
    "chunk_size",
    "overlap",
    "chunk_overlap",
    "num_prefix_tokens",
    "is_causal",
    "relative_bias",
    "landmark_bias",
    "key_padding_mask",
    "scale",
    "dropout_p",
}
TAKEN = {"eva_attention": SUMMARY | WINDOW, "chunk_summary": SUMMARY, "window_attention": WINDOW}


def assert_refused(call: Any, name: str, error: type[Exception], words: list[Any]) -> None:
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value).split("\nException raised from")[0]
    assert name in message, message
    for word in words:
        alternatives = word if isinstance(word, tuple) else (word,)
        assert any(x in message for x in alternatives), (word, message)


def label(entry: Any) -> str:
    name, value = entry[0], entry[1]
    shown = f"{list(value.shape)}-{value.dtype}-{value.device}" if torch.is_tensor(value) else str(value)
    return f"{name}-{shown}".replace("torch.", "")


def placed(value: Any, device: str) -> Any:
    return value.to(device) if torch.is_tensor(value) and value.device.type == "cpu" else value


on_devices = pytest.mark.parametrize("device", DEVICES)
by_both = pytest.mark.parametrize("functions", [functional, reference], ids=["functional", "reference"])


@on_devices
@by_both
@pytest.mark.parametrize("log_count_bias", [False, True])
@pytest.mark.parametrize("entry", SHARED, ids=label)
def test_functions(entry: Any, log_count_bias: bool, functions: ModuleType, device: str) -> None:
    name, value, error, words = entry
    arguments = {**qkv_of(device), **options_of(device), name: placed(value, device)}
    assert_refused(
        lambda: functions.eva_attention(**arguments, log_count_bias=log_count_bias), name, error, words
    )


@on_devices
@pytest.mark.parametrize("op", TAKEN)
@pytest.mark.parametrize("entry", SHARED + OP_ONLY, ids=label)
def test_operators(entry: Any, op: str, device: str) -> None:
    name, value, error, words = entry
    if name not in TAKEN[op]:
        pytest.skip(f"{op} takes no {name}")
    arguments = {**qkv_of(device), **options_of(device), **weights_of(device), name: placed(value, device)}
    if op == "window_attention":
        landmarks = torch.zeros(BATCH, HEADS, CHUNKS, DIM, device=device)
        arguments |= {"landmark_key": landmarks, "landmark_value": landmarks}
    if name == "dropout_p":
        arguments["dropout_seed"] = torch.zeros((), dtype=torch.int64, device=device)
    taken = TAKEN[op] | {"landmark_key", "landmark_value", "dropout_seed"}
    arguments = {k: x for k, x in arguments.items() if k in taken}
    assert_refused(lambda: getattr(torch.ops.eva_attn, op)(**arguments), name, error, words)


@on_devices
@by_both
@pytest.mark.parametrize("entry", [x for x in SHARED if x[0] not in ("query", "key", "value")], ids=label)
def test_packed(entry: Any, functions: ModuleType, device: str) -> None:
    name, value, error, words = entry
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, DIM, device=device)
    arguments = {**options_of(device), name: placed(value, device)}
    assert_refused(lambda: functions.eva_attention_qkvpacked(qkv, **arguments), name, error, words)


@on_devices
@pytest.mark.parametrize(
    ("qkv", "error", "words"),
    [
        (zeros(2, 13, 3, 2), ValueError, ["2, 13, 3, 2"]),
        (zeros(2, 13, 2, 2, 4), ValueError, ["2, 13, 2, 2, 4", "3"]),
        (zeros(2, 2, 13, 4), ValueError, ["2, 2, 13, 4"]),
        (zeros(2, 13, 3, 2, 4, dtype=torch.int32), TypeError, [dtype_names(torch.int32)]),
    ],
)
def test_packed_tensor(qkv: Tensor, error: type[Exception], words: list[Any], device: str) -> None:
    qkv = qkv.to(device)
    options = options_of(device)
    for attention in (
        functional.eva_attention_qkvpacked,
        reference.eva_attention_qkvpacked,
        torch.ops.eva_attn.eva_attention_qkvpacked,
    ):
        assert_refused(lambda attention=attention: attention(qkv, **options), "qkv", error, words)


@on_devices
@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("landmark_key", zeros(2, 2, 5, 4), ValueError, ["2, 2, 5, 4", "2, 2, 4, 4"]),
        ("landmark_key", zeros(2, 4, 4), ValueError, ["2, 4, 4"]),
        ("landmark_key", zeros(2, 2, 4, 4, dtype=torch.float64), TypeError, [dtype_names(torch.float64)]),
        ("landmark_value", zeros(2, 2, 4, 8), ValueError, ["2, 2, 4, 8"]),
        ("landmark_value", zeros(2, 2, 4, 4, dtype=torch.float16), TypeError, [dtype_names(torch.float16)]),
        ("landmark_value", torch.zeros(2, 2, 4, 4, device="meta"), ValueError, ["meta"]),
        ("landmark_value", None, ValueError, []),
        ("landmark_key", None, ValueError, []),
    ],
)
def test_landmarks(name: str, value: Any, error: type[Exception], words: list[Any], device: str) -> None:
    landmarks = torch.zeros(BATCH, HEADS, CHUNKS, DIM, device=device)
    arguments = {k: x for k, x in options_of(device).items() if k != "noise"}
    arguments |= {**qkv_of(device), "landmark_key": landmarks, "landmark_value": landmarks}
    arguments[name] = placed(value, device)
    for attention in (
        functional.window_attention,
        reference.window_attention,
        torch.ops.eva_attn.window_attention,
    ):
        assert_refused(lambda attention=attention: attention(**arguments), name, error, words)


@on_devices
@pytest.mark.parametrize(
    ("seed", "error", "words"),
    [
        (None, ValueError, []),
        (zeros(1, dtype=torch.int64), ValueError, ["[1]"]),
        (zeros(dtype=torch.int32), TypeError, [dtype_names(torch.int32)]),
        (zeros(dtype=torch.float32), TypeError, [dtype_names(torch.float32)]),
        (torch.zeros((), dtype=torch.int64, device="meta"), ValueError, ["meta"]),
    ],
)
def test_dropout_seed(seed: Any, error: type[Exception], words: list[Any], device: str) -> None:
    arguments = {**qkv_of(device), **options_of(device), "dropout_p": 0.5}
    arguments["dropout_seed"] = placed(seed, device)
    assert_refused(lambda: torch.ops.eva_attn.eva_attention(**arguments), "dropout_seed", error, words)


@on_devices
@by_both
@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ({"window_size": 0}, "window_size", ["0"]),
        ({"chunk_size": -2}, "chunk_size", ["-2"]),
        ({"overlap": -1}, "overlap", ["-1"]),
        ({"num_prefix_tokens": 14}, "num_prefix_tokens", ["14"]),
        ({"relative_bias": zeros(2, 6)}, "relative_bias", ["2", "6", "7"]),
        ({"relative_bias": zeros(2, 1, 6)}, "relative_bias", ["2, 1, 6"]),
        ({"relative_bias": zeros(7)}, "relative_bias", ["[7]"]),
        ({"projection": "linear"}, "projection", ["'linear'"]),
        ({"is_causal": True, "num_prefix_tokens": 2}, "is_causal", ["num_prefix_tokens 2"]),
        ({"is_causal": True, "chunk_overlap": 3}, "is_causal", ["chunk_overlap", "3"]),
        ({"is_causal": True, "chunk_size": 3}, "is_causal", ["chunk_size 3", "window_size 4"]),
    ],
)
def test_sequences(
    options: dict[str, Any], name: str, words: list[str], functions: ModuleType, device: str
) -> None:
    options = {k: placed(x, device) for k, x in options.items()}
    error = TypeError if name == "projection" else ValueError
    arguments = {**qkv_of(device), "window_size": 4, "chunk_size": 2, **options}
    assert_refused(lambda: functions.eva_attention(**arguments), name, error, words)


@on_devices
@pytest.mark.parametrize("entry", SHARED, ids=label)
def test_the_oracle_of_the_summary(entry: Any, device: str) -> None:
    name, value, error, words = entry
    if name not in SUMMARY:
        pytest.skip("chunk_summary does not take it")
    arguments = {**qkv_of(device), **options_of(device), name: placed(value, device)}
    arguments = {k: x for k, x in arguments.items() if k in SUMMARY}
    assert_refused(lambda: reference.chunk_summary(**arguments), name, error, words)


@on_devices
def test_sizes_whose_product_overflows(device: str) -> None:
    """2**32 * 2**32 is 0 in 64 bits, the number of tokens that a prefix of 13 leaves."""
    arguments = {**qkv_of(device), "grid_size": (2**32, 2**32), "num_prefix_tokens": TOKENS}
    arguments |= {"window_size": (2, 2), "chunk_size": (2, 2)}
    for attention in (
        functional.eva_attention,
        reference.eva_attention,
        torch.ops.eva_attn.eva_attention,
    ):
        assert_refused(
            lambda attention=attention: attention(**arguments), "grid_size", ValueError, ["4294967296"]
        )


@on_devices
def test_nothing_is_refused_without_a_mistake(device: str) -> None:
    """So that what the others are refused for is their one mistake."""
    for functions in (functional, reference):
        functions.eva_attention(**qkv_of(device), **options_of(device), log_count_bias=True)
    torch.ops.eva_attn.eva_attention(**qkv_of(device), **options_of(device), **weights_of(device))
