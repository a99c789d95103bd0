"""Operators on CUDA: graphs, streams, devices, and the limits of a grid of blocks."""

import math
import warnings
from dataclasses import replace
from typing import Any

import op_cases
import pytest
import torch
from op_cases import FIXED, Arguments, Case, assert_near, assert_same, gradients
from torch import Tensor

from eva_attn import functional

pytestmark = pytest.mark.skipif(not op_cases.HAS_CUDA, reason="there is no GPU, or no kernel for it")

DTYPES = [torch.float32, torch.bfloat16]
EVERYTHING = replace(
    FIXED["ragged grid"], exclude=True, log_count=True, dropout_p=0.2, packed=True, head_dim=40
)
PREFIX = Case((14, 14), 7, 2, prefix=1, kind="linear-layernorm", bias="per head", packed=True, head_dim=64)
PREFIXED = {
    "class token": PREFIX,
    "as many as tensor cores take": replace(PREFIX, prefix=8, padding=0.2, dropout_p=0.2),
    "128 channels": replace(PREFIX, prefix=5, head_dim=128),
    "large windows": replace(PREFIX, size=(28, 28), window=14, chunk=2, bias="none"),
    "overlap": replace(PREFIX, prefix=5, overlap=2, bias="none", padding=0.2, dropout_p=0.2),
    "sequence": replace(PREFIX, size=150, window=60, chunk=2, prefix=5),
    "full block": replace(PREFIX, size=(17, 16), window=8, chunk=2, exclude=True),
    "alone": replace(PREFIX, size=0, window=7, prefix=3, kind="identity", bias="none"),
}
PLAIN = Case((14, 14), 7, 2, kind="linear-layernorm", bias="per head", packed=True, head_dim=64)


def outcome(given: Arguments) -> dict[str, Tensor]:
    output = functional.eva_attention_qkvpacked(given.inputs["qkv"], **given.options)
    return {"output": output} | gradients(output, given.cotangent, given.inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [EVERYTHING, PLAIN], ids=["everything", "plain"])
def test_graph_capture(case: Case, dtype: torch.dtype) -> None:
    """A graph's replays are what the operators compute from its inputs as they are then."""
    given = op_cases.arguments(replace(case, dropout_p=0.0), "cuda", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outcome(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outcome(given)
    for _ in range(2):
        with torch.no_grad():
            given.inputs["qkv"].mul_(1.25)
        graph.replay()
        assert_same(found, outcome(given))


def assert_near_plain(found: dict[str, Tensor], case: Case, given: Arguments) -> None:
    """As exactly as the plain kernels compute it, but for weights and landmarks in half precision."""
    dtype = given.cotangent.dtype
    single = op_cases.arguments(case, "cuda", torch.float32)
    with torch.no_grad():
        for key, x in single.inputs.items():
            x.copy_(given.inputs[key].nan_to_num())
        single.cotangent.copy_(given.cotangent)
    expected = op_cases.outcome(functional, case, single)
    for key, x in expected.items():
        error = (found[key].float() - x).square().mean().sqrt()
        assert error <= 2 * torch.finfo(dtype).eps * x.square().mean().sqrt().clamp(min=1e-3), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PREFIXED)
def test_prefix_on_tensor_cores(name: str, dtype: torch.dtype) -> None:
    """No plain kernels run, no bit differs between two runs, and padding may hold anything."""
    case = PREFIXED[name]
    given = op_cases.arguments(case, "cuda", dtype)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = op_cases.outcome(functional, case, given)
    finally:
        torch.set_warn_always(False)
    if (mask := given.options["key_padding_mask"]) is not None:
        with torch.no_grad():
            given.inputs["qkv"][mask] = math.nan
    assert_same(op_cases.outcome(functional, case, given), found)
    assert_near_plain(found, case, given)


# Blocks that stay on the device take windows of several heads and sequences, some of them the last of both.
SHARED_OUT = Case(256, 256, 64, batch=3, heads=50, kind="linear-layernorm", packed=True, head_dim=64)
SHARED_OUT_CASES = {
    "a window a sequence": SHARED_OUT,
    "128 channels": replace(SHARED_OUT, size=512, head_dim=128),
    "many heads": replace(SHARED_OUT, size=192, window=192, batch=1, heads=150),
    "windows of 128": replace(SHARED_OUT, size=320, window=128, bias="per head"),
    "causal": replace(SHARED_OUT, size=512, is_causal=True),
    "causal, 128 channels": replace(SHARED_OUT, window=128, head_dim=128, is_causal=True),
    "without landmarks": replace(SHARED_OUT, size=384, window=128, kind="identity", chunk=384, exclude=True),
    "grid": replace(SHARED_OUT, size=(14, 14), window=7, chunk=2, bias="per head"),
    "chunks of three": replace(SHARED_OUT, size=(15, 13), window=5, chunk=(1, 3), noise=True, head_dim=48),
    "chunks of 16": replace(SHARED_OUT, size=(28, 30), window=7, chunk=4, bias="shared"),
    "a head in one piece": replace(SHARED_OUT, size=192, window=64, chunk=2),
    "128 channels in one piece": replace(SHARED_OUT, size=64, window=64, chunk=16, heads=100, head_dim=128),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHARED_OUT_CASES)
def test_blocks_that_take_several_heads(name: str, dtype: torch.dtype) -> None:
    case = SHARED_OUT_CASES[name]
    given = op_cases.arguments(case, "cuda", dtype)
    found = op_cases.outcome(functional, case, given)
    assert_same(op_cases.outcome(functional, case, given), found)
    assert_near_plain(found, case, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_members_without_tensor_cores(dtype: torch.dtype) -> None:
    """Of few members no float means are kept; plain kernels, here for rows off 16 bytes, make them again."""
    given = op_cases.arguments(PLAIN, "cuda", dtype)
    room = torch.empty(given.inputs["qkv"].numel() + 1, device="cuda", dtype=dtype)
    shifted = room[1:].view_as(given.inputs["qkv"]).copy_(given.inputs["qkv"].detach()).requires_grad_()
    found = op_cases.outcome(functional, PLAIN, given)
    plain = op_cases.outcome(functional, PLAIN, replace(given, inputs=given.inputs | {"qkv": shifted}))
    assert_near(plain, found, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_summaries_alone_without_tensor_cores(dtype: torch.dtype) -> None:
    """Plain kernels, here for weights off 16 bytes, take gradients of landmarks that tensor cores round."""
    case = replace(PLAIN, size=(8, 8), window=4)
    given = op_cases.arguments(case, "cuda", dtype)
    found = op_cases.outcome(functional, case, given)
    for parameter in given.options["projection"].parameters():
        room = torch.empty(parameter.numel() + 1, device="cuda", dtype=dtype)
        parameter.data = room[1:].view_as(parameter).copy_(parameter.data)
    plain = op_cases.outcome(functional, case, given)
    assert_near(plain, found, 8 * torch.finfo(dtype).eps)


def test_dropout_in_a_graph() -> None:
    """Every replay draws weights of its own."""
    given = op_cases.arguments(replace(PLAIN, dropout_p=0.5), "cuda", torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outcome(given)
    results = []
    for _ in range(2):
        graph.replay()
        results.append({name: x.clone() for name, x in found.items()})
    assert all(not torch.equal(results[0][name], x) for name, x in results[1].items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [EVERYTHING, PLAIN], ids=["everything", "plain"])
def test_nothing_waits_for_the_device(case: Case, dtype: torch.dtype) -> None:
    given = op_cases.arguments(case, "cuda", dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile_to_graphs() -> None:
    given = op_cases.arguments(PLAIN, "cuda", torch.float32)

    def attention(qkv: Tensor) -> Tensor:
        return functional.eva_attention_qkvpacked(qkv * 2, **given.options).sin()

    def run(function: Any) -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        output = function(given.inputs["qkv"])
        found = {"output": output} | gradients(output, given.cotangent, given.inputs)
        return {name: x.clone() for name, x in found.items()}

    torch._dynamo.reset()
    compiled = torch.compile(attention, mode="reduce-overhead", fullgraph=True)
    expected = run(attention)
    for _ in range(3):  # warming up, recording, replaying
        # Sines and their derivatives are rounded otherwise.
        assert_near(run(compiled), expected, 1e-5)


@pytest.mark.parametrize("name", ["query", "key", "value", "relative_bias", "key_padding_mask"])
def test_tensors_of_two_devices(name: str) -> None:
    given = op_cases.arguments(replace(PLAIN, padding=0.2), "cuda", torch.float32)
    arguments = dict(zip(("query", "key", "value"), given.qkv(), strict=True)) | given.options
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=r"must be on the query's device"):
        functional.eva_attention(**arguments)


def test_largest_head_dim() -> None:
    query = torch.randn(1, 2, 8, 257, device="cuda")
    with pytest.raises(ValueError, match=r"head_dim of at most 256 on CUDA, got shape \[1, 2, 8, 257\]"):
        functional.eva_attention(query, query, query, window_size=4, chunk_size=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_heads_than_a_grid_is_high(dtype: torch.dtype) -> None:
    case = Case(8, 4, 2, batch=70_001, heads=1, packed=True)
    given = op_cases.arguments(case, "cuda", dtype)
    last = replace(
        given,
        inputs={"qkv": given.inputs["qkv"].detach()[-3:].requires_grad_()},
        cotangent=given.cotangent[-3:],
    )
    found = {name: x[-3:] for name, x in outcome(given).items()}
    # Fewer heads are dealt to the device in other pieces, which are summed in another order.
    assert_near(found, outcome(last), 4 * torch.finfo(dtype).eps)
