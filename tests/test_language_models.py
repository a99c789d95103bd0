"""Rotary embeddings and grouped-query attention: against their formulas, and against transformers' Llama."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_attn import CausalEVAttention, functional, rotary_embedding

# One window covers the sequence and no landmark is seen: softmax.
EXACT = {"window_size": 24, "chunk_size": 6, "projection": "identity", "exclude_window_landmarks": True}


def test_rotates_pairs_of_channels() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    position = torch.randint(100, (2, 7))
    frequency = 500.0 ** (-torch.arange(5, dtype=torch.float64) / 5)
    turn = torch.exp(1j * position[:, None, :, None] * frequency)
    expected = torch.complex(*x.split(5, -1)) * turn
    actual = torch.complex(*rotary_embedding(x, position, base=500.0).split(5, -1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    counted = rotary_embedding(x)
    torch.testing.assert_close(counted, rotary_embedding(x, torch.arange(7)), rtol=0, atol=0)
    assert torch.equal(counted[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotation_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 64, 8).to(dtype)
    exact = rotary_embedding(x.double())
    rotated = rotary_embedding(x)
    assert rotated.dtype == dtype
    # Of numbers below 8; an angle of 64 is rounded as well, in float32.
    bound = 8 * (torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(rotated.double(), exact, rtol=0, atol=bound)


def test_a_landmark_of_rotated_keys_loses_what_turns_fast() -> None:
    """As docs/language_models.md has it, for keys that are alike but for their positions."""
    chunk, half = 32, 16
    torch.manual_seed(0)
    key = torch.randn(1, 1, 1, 2 * half, dtype=torch.float64).expand(-1, -1, 4 * chunk, -1)
    rotated = rotary_embedding(key)
    landmarks, _ = functional.chunk_summary(
        rotated, rotated.contiguous(), key.contiguous(), chunk_size=chunk, is_causal=True
    )
    left = (
        torch.complex(*landmarks.split(half, -1)).abs() / torch.complex(*key[:, :, :1].split(half, -1)).abs()
    )
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    expected = ((chunk * frequency / 2).sin() / (chunk * (frequency / 2).sin())).abs()
    torch.testing.assert_close(left, expected.expand_as(left), rtol=1e-9, atol=1e-12)


def test_grouped_heads_are_repeated_heads() -> None:
    torch.manual_seed(0)
    grouped = CausalEVAttention(
        24, 4, num_kv_heads=2, window_size=6, chunk_size=3, dtype=torch.float64
    ).eval()
    whole = CausalEVAttention(24, 4, window_size=6, chunk_size=3, dtype=torch.float64).eval()
    state = grouped.state_dict()
    for name in ("qkv.weight", "qkv.bias"):
        query, key, value = state[name].unflatten(0, (-1, 6)).split([4, 2, 2])
        repeated = [x.repeat_interleave(2, 0) for x in (key, value)]
        state[name] = torch.cat([query, *repeated]).flatten(0, 1)
    whole.load_state_dict(state)
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), whole(x), rtol=0, atol=1e-12)
    assert grouped.qkv.out_features == (4 + 2 * 2) * 6
    assert "num_kv_heads=2" in repr(grouped)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rotation", ["ours", "theirs"])
def test_equals_llama_where_eva_is_softmax(kv_heads: int, rotation: str) -> None:
    """Whole, in its gradients, and token by token."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama as llama

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        attn_implementation="sdpa",
    )
    theirs = llama.LlamaAttention(config, layer_idx=0).double().eval()
    turn = llama.LlamaRotaryEmbedding(config)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    weights = [theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]
    expected, _ = theirs(x, position_embeddings=turn(x, torch.arange(20)[None]), attention_mask=None)
    cotangent = torch.randn_like(expected)
    expected_grads = torch.cat(torch.autograd.grad(expected, weights, cotangent))

    def their_rotation(heads: Tensor, position: Tensor) -> Tensor:
        cos, sin = turn(heads, position.reshape(-1, heads.shape[2]))
        return llama.apply_rotary_pos_emb(heads, heads, cos, sin)[0]

    ours = functools.partial(rotary_embedding, base=1000.0)
    module = CausalEVAttention(
        32,
        4,
        num_kv_heads=kv_heads,
        rotary_embedding=ours if rotation == "ours" else their_rotation,
        qkv_bias=False,
        proj_bias=False,
        dtype=torch.float64,
        **EXACT,
    ).eval()
    with torch.no_grad():
        module.qkv.weight.copy_(torch.cat(weights))
        module.proj.weight.copy_(theirs.o_proj.weight)
    # Llama's angles are of float32, up to 20.
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 1e-12 if rotation == "theirs" else 1e-4}
    out = module(x)
    torch.testing.assert_close(out, expected, **tolerance)
    grad = torch.autograd.grad(out, module.qkv.weight, cotangent)[0]
    torch.testing.assert_close(grad, expected_grads, **tolerance)

    state = module.init_state(2, 20)
    with torch.no_grad():
        pieces = [module(x[:, :7], state=state), *(module.step(x[:, [i]], state) for i in range(7, 20))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **tolerance)


def test_a_module_as_rotation_has_its_place() -> None:
    class Rotation(nn.Module):
        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            return rotary_embedding(x, position)

    torch.manual_seed(0)
    module = CausalEVAttention(16, 2, rotary_embedding=Rotation())
    function = CausalEVAttention(16, 2, rotary_embedding=rotary_embedding)
    function.load_state_dict(module.state_dict())
    x = torch.randn(1, 9, 16)
    assert torch.equal(module.eval()(x), function.eval()(x))


def test_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"x: expected \[B, H, N, D\] with an even D, got shape \(1, 2, 3, 5\)"
    ):
        rotary_embedding(torch.zeros(1, 2, 3, 5))
    for count in (0, 3, 8):
        with pytest.raises(
            ValueError, match=f"num_kv_heads: expected a divisor of num_heads = 4, got {count}"
        ):
            CausalEVAttention(16, 4, num_kv_heads=count)
