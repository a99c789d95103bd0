"""Operators as citizens of PyTorch: schemas, fake tensors, compilation, export, autocast, double backward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import op_cases
import pytest
import torch
from op_cases import DEVICES, FIXED, Case, gradients
from torch import Tensor
from torch.export import Dim
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eva_attn import functional

on_devices = pytest.mark.parametrize("device", DEVICES)

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

CASES = {
    "sequence": Case(
        13, 4, 3, overlap=1, chunk_overlap=1, prefix=1, kind="linear-layernorm", bias="per head", noise=True,
        landmark_bias=True, padding=0.3, exclude=True,
    ),
    "grid": Case((4, 5), 2, (2, 3), overlap=1, kind="linear", bias="shared", log_count=True, dropout_p=0.2),
    "key-only": Case(9, 4, 2, kind="key-only"),
    "plain": Case(8, 4, 2),
    "tangent": Case(13, 4, 3, kind="tangent", noise=True, padding=0.3, exclude=True),
}  # fmt: skip
OPS = ["eva_attention", "eva_attention_qkvpacked", "chunk_summary", "window_attention"]


class Recorder(TorchDispatchMode):
    """Keeps the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "eva_attn":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Watcher(TorchFunctionMode):
    """Keeps the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def call_of(op: str, case: Case, given: op_cases.Arguments) -> tuple[Callable[[], Any], dict[str, Tensor]]:
    """The function that calls `op`, and its differentiable inputs: each of them a leaf."""
    inputs = dict(given.inputs)
    if op == "eva_attention_qkvpacked":
        return lambda: functional.eva_attention_qkvpacked(inputs["qkv"], **given.options), inputs
    del inputs["qkv"]
    query, key, value = (x.detach().requires_grad_() for x in given.qkv())
    inputs |= {"query": query, "key": key, "value": value}
    if op == "eva_attention":
        return lambda: functional.eva_attention(query, key, value, **given.options), inputs
    if op == "chunk_summary":
        options = op_cases.summary_options(given.options)
        inputs.pop("relative_bias", None)
        return lambda: functional.chunk_summary(query, key, value, **options), inputs
    options = op_cases.window_options(given.options)
    landmarks = [x.detach().requires_grad_() for x in given.halves()]
    inputs = {name: x for name, x in inputs.items() if name in ("query", "key", "value", "relative_bias")}
    inputs |= dict(zip(("landmark_key", "landmark_value", "landmark_entropy"), landmarks, strict=False))
    return lambda: functional.window_attention(query, key, value, *landmarks, **options), inputs


def recorded(op: str, case: Case, device: str, dtype: torch.dtype = torch.float32) -> tuple[Call, Call]:
    """What forward and backward of one call hand to the operators, their tensors detached."""
    call, inputs = call_of(op, case, op_cases.arguments(case, device, dtype))
    with Recorder() as recorder:
        output = call()
        outputs = output if isinstance(output, tuple) else (output,)
        torch.autograd.grad(sum(x.square().sum() for x in outputs), tuple(inputs.values()))
    forward, backward = recorder.calls
    assert str(forward[0]) == f"eva_attn.{op}.default"
    assert str(backward[0]) == f"eva_attn.{op}_backward.default"
    return forward, backward


def leaves(values: Any, requires_grad: bool) -> Any:
    """Detached copies; `requires_grad` is for those that are differentiable."""

    def leaf(x: Any) -> Any:
        return x.detach().requires_grad_(requires_grad and x.is_floating_point()) if is_tensor(x) else x

    is_tensor = torch.is_tensor
    if isinstance(values, dict):
        constants = ("noise", "landmark_bias")
        return {
            name: x.detach() if name in constants and is_tensor(x) else leaf(x) for name, x in values.items()
        }
    return tuple(map(leaf, values))


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static",
          "test_aot_dispatch_dynamic")  # fmt: skip


@on_devices
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, name: str, device: str) -> None:
    (func, args, kwargs), _ = recorded(op, CASES[name], device)
    torch.library.opcheck(func, leaves(args, True), leaves(kwargs, True), test_utils=CHECKS)


@on_devices
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_backward(op: str, name: str, device: str) -> None:
    """Its inputs need no gradient, as it has none."""
    _, (func, args, kwargs) = recorded(op, CASES[name], device)
    torch.library.opcheck(func, leaves(args, False), leaves(kwargs, False), test_utils=CHECKS)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_opcheck_of_dtypes(dtype: torch.dtype, device: str) -> None:
    for func, args, kwargs in recorded("eva_attention_qkvpacked", CASES["sequence"], device, dtype):
        torch.library.opcheck(
            func,
            leaves(args, False),
            leaves(kwargs, False),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@on_devices
def test_opcheck_of_windows_alone(device: str) -> None:
    query, key, value = torch.randn(3, 2, 2, 8, 4, device=device).unbind()
    torch.library.opcheck(
        torch.ops.eva_attn.window_attention.default,
        tuple(x.requires_grad_() for x in (query, key, value)),
        {"grid_size": (1, 8), "window_size": (1, 3)},
        test_utils=CHECKS,
    )


@on_devices
@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused(op: str, device: str) -> None:
    call, inputs = call_of(op, CASES["sequence"], op_cases.arguments(CASES["sequence"], device))
    output = call()
    output = output[1] if isinstance(output, tuple) else output
    first = torch.autograd.grad(output.square().sum(), tuple(inputs.values()), create_graph=True)
    total = sum(x.square().sum() for x in first)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)twice|double|second"):
        torch.autograd.grad(total, tuple(inputs.values()), allow_unused=True)


def assert_compiles(backend: str, sizes: list[Any], case: Case, device: str) -> None:
    """One graph for all sizes, results and gradients as without compilation, to float32's rounding."""
    given = op_cases.arguments(case, device, torch.float32)
    options = dict(given.options)

    def attention(qkv: Tensor, grid_size: Any) -> Tensor:
        packed = functional.eva_attention_qkvpacked(qkv * 2, **{**options, "grid_size": grid_size})
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
        return packed + functional.eva_attention(
            query, key, value.sin(), **{**options, "grid_size": grid_size}
        )

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=backend)
    for batch, size in enumerate(sizes, 11):  # unlike any other size, or equality becomes a guard
        sized = op_cases.arguments(replace(case, size=size, batch=batch), device, torch.float32)
        inputs = {"qkv": sized.inputs["qkv"], **{k: x for k, x in given.inputs.items() if k != "qkv"}}
        grid_size = size if isinstance(size, tuple) else None
        results = []
        for function in (compiled, attention):
            with torch._dynamo.config.patch(error_on_recompile=True):
                output = function(inputs["qkv"], grid_size)
            results.append({"output": output} | gradients(output, sized.cotangent, inputs))
        # The products 2 q and the sum of two gradients may be fused, which saves roundings of 6e-8.
        op_cases.assert_near(*results, 1e-5)


COMPILED = {
    "sequence": (
        Case(29, 4, 3, prefix=1, overlap=1, kind="linear-layernorm", bias="per head", log_count=True),
        [29, 53, 101],
    ),
    "grid": (
        Case((7, 9), (3, 4), 2, kind="linear", bias="per head", exclude=True, log_count=True),
        [(7, 9), (10, 12), (6, 15)],
    ),
}


@on_devices
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str, device: str) -> None:
    case, sizes = COMPILED[name]
    assert_compiles("aot_eager", sizes, case, device)


@on_devices
def test_compile_with_inductor(device: str) -> None:
    """Which relies on the strides that the operators promise."""
    case, sizes = COMPILED["sequence"]
    assert_compiles("inductor", sizes[:2], case, device)


@on_devices
def test_compile_with_mask_and_dropout(device: str) -> None:
    case = Case(30, 5, 4, padding=0.3, dropout_p=0.2, noise=True, log_count=True)
    given = op_cases.arguments(case, device, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda qkv: functional.eva_attention_qkvpacked(qkv, **given.options),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.manual_seed(0)
    expected = functional.eva_attention_qkvpacked(given.inputs["qkv"], **given.options)
    torch.manual_seed(0)
    actual = compiled(given.inputs["qkv"])
    assert torch.equal(actual, expected)
    found = [torch.autograd.grad(x, given.inputs["qkv"], given.cotangent)[0] for x in (actual, expected)]
    assert torch.equal(*found)


class Attention(torch.nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.projection, self.relative_bias = options.pop("projection"), options.pop("relative_bias")
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.eva_attention(
            query,
            key,
            value,
            projection=self.projection,
            relative_bias=self.relative_bias,
            **self.options,
        )


@on_devices
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_export(name: str, strict: bool, device: str) -> None:
    case, sizes = COMPILED[name]
    given = op_cases.arguments(case, device, torch.float32)
    module = Attention({k: x.detach() if torch.is_tensor(x) else x for k, x in given.options.items()})
    # A grid is an argument of its own, so its size stays as it was; a sequence's length is free.
    dims = {0: Dim.AUTO} if case.grid_size else {0: Dim.AUTO, 2: Dim.AUTO}
    example = tuple(x.detach() for x in given.qkv())
    exported = torch.export.export(module, example, dynamic_shapes=(dims, dims, dims), strict=strict)
    assert sum("eva_attn.eva_attention" in str(node.target) for node in exported.graph.nodes) == 1
    for batch, size in enumerate(sizes[:1] if case.grid_size else sizes, 2):
        sized = op_cases.arguments(replace(case, size=size, batch=batch), device, torch.float32)
        tensors = [x.detach() for x in sized.qkv()]
        assert torch.equal(exported.module()(*tensors), module(*tensors))


@on_devices
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(op: str, device: str) -> None:
    """Shapes, strides and dtypes without data."""
    case = FIXED["ragged grid"]
    for dtype in (torch.float64, torch.bfloat16):
        for func, args, kwargs in recorded(op, case, device, dtype):
            expected = func(*args, **kwargs)
            args = [x.to("meta") if torch.is_tensor(x) else x for x in args]
            kwargs = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in kwargs.items()}
            for x, wanted in zip(func(*args, **kwargs), expected, strict=True):
                assert (x is None) == (wanted is None)
                if x is not None:
                    assert (x.shape, x.stride(), x.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str, dtype: torch.dtype, device: str) -> None:
    """Query, key and value in the lower dtype, gradients in that of the inputs."""
    given = op_cases.arguments(CASES["sequence"], device, torch.float32)
    call, inputs = call_of(op, CASES["sequence"], given)
    with torch.autocast(device, dtype=dtype):
        lower = call()
    full = call()
    lower, full = (x if isinstance(x, tuple) else (x,) for x in (lower, full))
    for x, exact in zip(lower, full, strict=True):
        assert x.dtype == dtype
        # Queries and keys rounded, 2**-9 each, in logits of a few units, and a result of order 1.
        torch.testing.assert_close(x.float(), exact, rtol=0.0, atol=0.05)
    found = torch.autograd.grad(sum(x.float().sum() for x in lower), tuple(inputs.values()))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in found)


@on_devices
def test_autocast_of_mixed_and_of_double(device: str) -> None:
    """Norms leave float32 queries beside values of bfloat16; float64 is left alone."""
    query, key, value = torch.randn(3, 1, 2, 8, 4, device=device)
    options = {"window_size": 4, "chunk_size": 2}
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = functional.eva_attention(query, key, value.bfloat16(), **options)
        double = functional.eva_attention(query.double(), key.double(), value.double(), **options)
    assert mixed.dtype == torch.bfloat16
    assert double.dtype == torch.float64


@pytest.mark.parametrize("op", ["eva_attention", "eva_attention_qkvpacked"])
def test_modes_see_the_operators(op: str) -> None:
    """Eager calls go past `torch.ops`, but not where somebody looks; the results are the same."""
    call, _ = call_of(op, CASES["sequence"], op_cases.arguments(CASES["sequence"]))
    expected = call()
    with Watcher() as watcher:
        assert torch.equal(call(), expected)
    assert getattr(torch.ops.eva_attn, op).default in watcher.functions
