"""FLOP counts against those of torch's own operators, and against what they are by definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from eva_attn import CausalEVAttention, EVAttention, eva_attention, functional

B, H, N, D = 2, 3, 16, 8


def flops(run: Callable[[], Tensor], backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        out = run()
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def qkv() -> list[Tensor]:
    return [torch.randn(B, H, N, D, requires_grad=True) for _ in range(3)]


def test_every_operator_has_a_formula() -> None:
    schemas = (s for s in torch._C._jit_get_all_schemas() if s.name.startswith("eva_attn::"))
    names = {s.name for s in schemas if s.arguments}  # build_info has none
    registered = {f"eva_attn::{x.__name__}" for x in flop_registry if "eva_attn" in str(x)}
    assert names == registered


def test_one_window_is_softmax() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        softmax = flops(lambda: F.scaled_dot_product_attention(*qkv()))
    window = flops(lambda: functional.window_attention(*qkv(), window_size=N))
    assert window == softmax
    # Scores once more: torch counts 2.5 times the forward pass for the backward pass of its fused kernels.
    assert flops(lambda: functional.window_attention(*qkv(), window_size=N), backward=True) == 3.5 * softmax


@pytest.mark.parametrize("options", [{}, {"grid_size": (3, 5), "num_prefix_tokens": 1}])
def test_is_what_is_scored(options: dict[str, Any]) -> None:
    two_d = "grid_size" in options
    prefix = options.get("num_prefix_tokens", 0)
    window, chunks = (9, 6) if two_d else (3, 8)
    pairs = (N - prefix) * (window + prefix + chunks) + prefix * N
    forward = 4 * B * H * D * (pairs + N - prefix)
    settings = {"window_size": 3, "chunk_size": 2, **options}
    assert flops(lambda: eva_attention(*qkv(), **settings)) == forward
    assert flops(lambda: eva_attention(*qkv(), **settings), backward=True) == 3.5 * forward


def test_modules() -> None:
    """The packed operator and the projections, forward and backward."""
    module = EVAttention(H * D, H, window_size=4, chunk_size=2)
    linear = 2 * B * N * (H * D) ** 2 * 4
    projections = 2 * 2 * B * H * (N // 2) * D**2
    forward = 4 * B * H * D * (N * (4 + N // 2) + N)
    x = torch.randn(B, N, H * D, requires_grad=True)
    assert flops(lambda: module(x)) == linear + projections + forward
    assert flops(lambda: module(x), backward=True) == 3 * linear + 3 * projections + 3.5 * forward


def test_the_halves_are_the_whole() -> None:
    settings = {"window_size": 4, "chunk_size": 4}

    def halves() -> Tensor:
        query, key, value = qkv()
        landmarks = functional.chunk_summary(query, key, value, chunk_size=4)
        return functional.window_attention(query, key, value, *landmarks, **settings)

    for backward in (False, True):
        assert flops(halves, backward) == flops(lambda: eva_attention(*qkv(), **settings), backward)


def test_decoding_is_bounded_by_its_state() -> None:
    module = CausalEVAttention(H * D, H, window_size=4, chunk_size=2).eval()
    state = module.init_state(B, 32)
    linear = 2 * B * (H * D) ** 2 * 4
    counted = flops(lambda: module.step(torch.randn(B, 1, H * D), state)) - linear
    assert counted == 4 * B * H * D * (4 + 16 + 1) + 2 * B * H * D**2


def test_is_linear_in_the_number_of_tokens() -> None:
    module = EVAttention(H * D, H, window_size=4, num_landmarks=8, projection="identity")
    counts = [flops(lambda n=n: module(torch.randn(1, n, H * D))) for n in (64, 128, 256)]
    assert counts[2] == 2 * counts[1] == 4 * counts[0]
