"""Modules and replaced models through torch.compile, torch.export and torch.onnx."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import DEVICES, HAS_CUDA
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import eva_attn
from eva_attn import CausalEVAttention, EVAttention, functional, reference, replace_attention

DIM, HEADS = 16, 2
MODULES: dict[str, Callable[..., nn.Module]] = {
    "EVAttention": partial(
        EVAttention, DIM, HEADS, window_size=4, num_landmarks=5, overlap=1, relative_bias="table",
        num_prefix_tokens=1, log_count_bias=True,
    ),
    "CausalEVAttention": partial(
        CausalEVAttention, DIM, HEADS, window_size=4, chunk_size=2, relative_bias="t5"
    ),
}  # fmt: skip
SIZES = [(3, 37), (5, 64), (7, 101)]  # batch and tokens
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


def loss_and_gradients(module: Callable[[Tensor], Tensor], x: Tensor, parameters: Any) -> list[Tensor]:
    torch.manual_seed(0)
    out = module(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *parameters])]


@pytest.mark.parametrize("device", DEVICES)
@each_module
def test_one_compilation_for_all_sizes(make: Callable[..., nn.Module], device: str) -> None:
    """In training, with the noise drawn inside. Inductor on the CPU takes too long for each module."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = make(attn_drop=0.1, device=device)
    backend = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
        compilations = []
        for batch, tokens in SIZES:
            x = torch.randn(batch, tokens, DIM, device=device, requires_grad=True)
            actual, expected = (
                loss_and_gradients(function, x, module.parameters()) for function in (compiled, module)
            )
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
            compilations.append(backend.frame_count)
    # The first may begin anew, when it finds that it need not treat a float as an input.
    assert compilations[0] == compilations[-1]


@pytest.mark.skipif(not HAS_CUDA, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@each_module
def test_cuda_graphs(make: Callable[..., nn.Module], mode: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = make(device="cuda", dtype=torch.bfloat16).eval()
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    x = torch.randn(2, 64, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = loss_and_gradients(module, x, module.parameters())
    for _ in range(4):  # warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        for a, b in zip(loss_and_gradients(compiled, x, module.parameters()), expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02 * b.abs().max().item())


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "eva_attn" in str(node.target)]


@each_module
def test_export_of_modules(make: Callable[..., nn.Module]) -> None:
    module = make().eval()
    example = torch.randn(2, 29, DIM)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    assert operators(program) == ["eva_attn.eva_attention_qkvpacked.default"]
    for batch, tokens in SIZES:
        x = torch.randn(batch, tokens, DIM)
        assert torch.equal(program.module()(x), module(x))


def test_export_of_a_replaced_model() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3).eval()
    replace_attention(model, window_size=2, num_landmarks=4)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: Dim.AUTO},))
    assert len(operators(program)) == 2
    images = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(images), model(images))


def test_onnx_gets_plain_operators(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    module = EVAttention(DIM, HEADS, window_size=2, chunk_size=2, grid_size=(4, 6), relative_bias="table")
    module, x = module.eval(), torch.randn(2, 24, DIM)
    torch.onnx.export(module, (x,), tmp_path / "eva.onnx", dynamo=True, verbose=False)
    graph = onnx.load(tmp_path / "eva.onnx")
    (out,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), module(x))


def test_a_device_without_kernels_computes_plainly_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_DEVICES_WITH_KERNELS", {"meta"})
    functional._warn_of_plain.cache_clear()
    module = MODULES["EVAttention"]().train()
    x = torch.randn(2, 21, DIM, requires_grad=True)
    with pytest.warns(UserWarning, match="eva_attn has no kernels for cpu, and computes in plain PyTorch"):
        actual = loss_and_gradients(module, x, module.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        query, key, value = torch.randn(3, 2, 2, 9, 4)
        options = {"window_size": 4, "chunk_size": 2}
        out = eva_attn.eva_attention(query=query, key=key, value=value, **options)
    assert torch.equal(out, reference.eva_attention(query, key, value, **options))
    monkeypatch.undo()
    for a, b in zip(actual, loss_and_gradients(module, x, module.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
