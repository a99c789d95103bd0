"""Modules against the oracle fed with their parameters."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from eva_attn import CausalEVAttention, EVAttention, LandmarkProjection, geometry, reference

# Orders of summation differ between operator and oracle; outputs are of order 1, gradients of order 10.
TOLERANCE = 1e-11

SEQUENCE = {"window_size": 5, "chunk_size": 3}
GRID = {"window_size": 3, "chunk_size": 2, "grid_size": (5, 6)}
CONFIGURATIONS = {
    "sequence": SEQUENCE,
    "sequence-default-chunk": {"window_size": 4, "num_landmarks": 4},
    "sequence-table": {**SEQUENCE, "relative_bias": "table", "overlap": 2},
    "sequence-t5": {**SEQUENCE, "relative_bias": "t5", "overlap": 1, "chunk_overlap": 1},
    "sequence-prefix": {**SEQUENCE, "num_prefix_tokens": 2, "projection": "identity"},
    "sequence-options": {**SEQUENCE, "exclude_window_landmarks": True, "log_count_bias": True},
    "grid": {**GRID, "qkv_bias": False, "proj_bias": False},
    "grid-default-chunk": {"window_size": 4, "num_landmarks": 5, "grid_size": (5, 6), "projection": "linear"},
    "grid-table": {**GRID, "relative_bias": "table", "overlap": (0, 1), "window_size": (2, 3)},
    "grid-prefix": {**GRID, "num_prefix_tokens": 2, "relative_bias": "table", "projection": "key-only"},
    "sequence-tangent": {**SEQUENCE, "projection": "tangent", "exclude_window_landmarks": True},
    "grid-qk-norm": {**GRID, "qk_norm": nn.LayerNorm, "relative_bias": "table", "log_count_bias": True},
}
CAUSAL = {"window_size": 6, "chunk_size": 3}
CAUSAL_CONFIGURATIONS = {
    "causal": CAUSAL,
    "causal-table": {**CAUSAL, "relative_bias": "table", "overlap": 2, "projection": "key-only"},
    "causal-t5": {**CAUSAL, "relative_bias": "t5", "overlap": 1, "qkv_bias": False, "proj_bias": False},
    "causal-options": {**CAUSAL, "exclude_window_landmarks": True, "log_count_bias": True, "overlap": 6},
    "causal-qk-norm": {**CAUSAL, "qk_norm": nn.LayerNorm, "relative_bias": "table"},
    "causal-default": {},
    "causal-tangent": {**CAUSAL, "projection": "tangent", "overlap": 2, "relative_bias": "table"},
}
Module = EVAttention | CausalEVAttention


def named_module(name: str) -> Module:
    if name in CAUSAL_CONFIGURATIONS:
        return module_of(CAUSAL_CONFIGURATIONS[name], CausalEVAttention)
    return module_of(CONFIGURATIONS[name])


def module_of(options: dict[str, Any], kind: type[Module] = EVAttention) -> Module:
    """A float64 module with 2 heads of dimension 6 whose parameters all matter."""
    module = kind(12, 2, **options, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def tokens_of(module: Module, batch: int = 2) -> Tensor:
    height, width = module.grid_size or (1, 17)
    num_tokens = module.num_prefix_tokens + height * width
    return torch.randn(batch, num_tokens, module.dim, dtype=torch.float64)


def chunk_of(module: Module) -> int:
    """The chunk size that the documentation promises for `tokens_of`, by table."""
    if module.chunk_size is not None:
        return module.chunk_size
    return {None: 17 // 4, (5, 6): 2}[module.grid_size]


def oracle(module: Module, x: Tensor, **options: Any) -> Tensor:
    """What the module is to compute for tokens [B, N, dim] in evaluation, of its parameters."""
    batch, num_tokens, dim = x.shape
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias).view(batch, num_tokens, 3, module.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if module.q_norm is not None:
        query, key = module.q_norm(query), module.k_norm(key)
    bias = module.relative_bias
    if module.relative_bias_kind == "t5":
        reach = module.window_size + module.overlap
        buckets = geometry.t5_buckets(
            torch.arange(1 - reach, reach),
            geometry.t5_num_buckets(reach),
            max_distance=reach,
            is_causal=module.is_causal,
        )
        bias = bias[buckets].mT * module.head_dim**-0.5
    arguments = {
        "window_size": module.window_size,
        "chunk_size": chunk_of(module),
        "grid_size": module.grid_size,
        "num_prefix_tokens": module.num_prefix_tokens,
        "overlap": module.overlap,
        "chunk_overlap": module.chunk_overlap,
        "is_causal": module.is_causal,
        "projection": module.landmark_projection,
        "relative_bias": bias,
        "exclude_window_landmarks": module.exclude_window_landmarks,
        "log_count_bias": module.log_count_bias,
    }
    out = reference.eva_attention(query, key, value, **{**arguments, **options})
    return F.linear(out.transpose(1, 2).reshape(batch, num_tokens, dim), module.proj.weight, module.proj.bias)


def num_chunks(module: Module) -> int:
    grid = module.grid_size or (1, 17)
    chunk = geometry.pair("chunk_size", chunk_of(module), module.grid_size, 1)
    rows, columns = geometry.chunk_grid(grid, chunk)
    return rows * columns


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*CONFIGURATIONS, *CAUSAL_CONFIGURATIONS])
def test_equals_the_oracle(name: str, masked: bool) -> None:
    torch.manual_seed(0)
    module = named_module(name).eval()
    x = tokens_of(module).requires_grad_()
    mask = torch.rand(x.shape[:2]) < 0.3 if masked else None
    inputs = [x, *module.parameters()]
    actual = module(x, key_padding_mask=mask)
    expected = oracle(module, x, key_padding_mask=mask)
    assert_equal(actual, expected)
    cotangent = torch.randn_like(x)
    assert_equal(
        torch.autograd.grad(actual, inputs, cotangent, allow_unused=True),
        torch.autograd.grad(expected, inputs, cotangent, allow_unused=True),
    )


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *CAUSAL_CONFIGURATIONS])
def test_noise(name: str) -> None:
    """Drawn in training and 0 in evaluation, unless given."""
    torch.manual_seed(0)
    module = named_module(name)
    x = tokens_of(module)
    shape = (2, 2, num_chunks(module), 6)
    torch.manual_seed(1)
    drawn = module(x)
    torch.manual_seed(1)
    assert_equal(drawn, oracle(module, x, noise=torch.randn(shape)))
    noise = torch.randn(shape, dtype=torch.float64)
    assert_equal(module(x, noise=noise), oracle(module, x, noise=noise))
    module.eval()
    assert_equal(module(x), oracle(module, x))
    assert_equal(module(x, noise=noise), oracle(module, x, noise=noise))


@pytest.mark.parametrize("kind", [EVAttention, CausalEVAttention])
@pytest.mark.parametrize("qk_norm", [None, nn.LayerNorm])
def test_attention_dropout(qk_norm: type[nn.Module] | None, kind: type[Module]) -> None:
    """In training only, by the seed drawn after the noise."""
    torch.manual_seed(0)
    module = module_of({**CAUSAL, "attn_drop": 0.3, "qk_norm": qk_norm}, kind)
    x = tokens_of(module)
    torch.manual_seed(1)
    actual = module(x)
    torch.manual_seed(1)
    noise = torch.randn(2, 2, num_chunks(module), 6)
    assert_equal(actual, oracle(module, x, noise=noise, dropout_p=0.3))
    module.eval()
    assert_equal(module(x), oracle(module, x))


def test_grid_input() -> None:
    """[B, height, width, dim] is its own grid, and a grid at the call stands in for that of construction."""
    torch.manual_seed(0)
    module = module_of({**GRID, "relative_bias": "table"}).eval()
    x = torch.randn(2, 4, 7, 12, dtype=torch.float64)
    expected = oracle(module, x.flatten(1, 2), grid_size=(4, 7))
    assert_equal(module(x), expected.view_as(x))
    assert_equal(module(x, grid_size=(4, 7)), expected.view_as(x))
    assert_equal(module(x.flatten(1, 2), grid_size=(4, 7)), expected)
    mask = torch.rand(2, 28) < 0.3
    expected = oracle(module, x.flatten(1, 2), grid_size=(4, 7), key_padding_mask=mask)
    assert_equal(module(x, key_padding_mask=mask), expected.view_as(x))


def test_grid_at_the_call_alone() -> None:
    torch.manual_seed(0)
    module = module_of({"window_size": (3, 2), "chunk_size": (2, 3), "relative_bias": "table"}).eval()
    assert module.relative_bias.shape == (2, 5, 3)
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    assert_equal(module(x, grid_size=(4, 5)), oracle(module, x, grid_size=(4, 5)))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"window_size": 7, "relative_bias": "table"}, (2, 13)),
        ({"window_size": 7, "overlap": 2, "relative_bias": "table"}, (2, 17)),
        ({"window_size": 7, "overlap": 1, "grid_size": (14, 14), "relative_bias": "table"}, (2, 15, 15)),
        ({"window_size": (7, 4), "overlap": (0, 1), "relative_bias": "table"}, (2, 13, 9)),
        ({"window_size": 7, "relative_bias": "t5"}, (16, 2)),
        ({"window_size": 40, "overlap": 8, "relative_bias": "t5"}, (24, 2)),
        ({"window_size": 512, "relative_bias": "t5"}, (64, 2)),
    ],
)
def test_relative_bias_shapes(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    module = EVAttention(12, 2, **options)
    assert module.relative_bias.shape == shape
    assert 0 < module.relative_bias.std() < 0.04


def test_shapes_of_causal_relative_bias() -> None:
    options = {"window_size": 6, "chunk_size": 3, "overlap": 2}
    assert CausalEVAttention(12, 2, **options, relative_bias="table").relative_bias.shape == (2, 15)
    assert CausalEVAttention(12, 2, **options, relative_bias="t5").relative_bias.shape == (16, 1)


@pytest.mark.parametrize("name", CAUSAL_CONFIGURATIONS)
def test_no_token_sees_its_future(name: str) -> None:
    torch.manual_seed(0)
    module = named_module(name).eval()
    x = tokens_of(module).requires_grad_()
    for position in (0, 5, 6, 11):
        changed = torch.cat([x[:, : position + 1], torch.randn_like(x[:, position + 1 :])], 1)
        assert torch.equal(module(changed)[:, : position + 1], module(x)[:, : position + 1])
        (gradient,) = torch.autograd.grad(module(x)[:, : position + 1].sum(), x)
        assert not gradient[:, position + 1 :].any()
        assert gradient[:, position].any()


def test_parameter_names() -> None:
    module = EVAttention(12, 2, window_size=4, relative_bias="t5", qk_norm=nn.LayerNorm)
    layers = {
        "qkv": (36, 12),
        "proj": (12, 12),
        "landmark_projection.key.0": (6, 6),
        "landmark_projection.key.1": (6,),
        "landmark_projection.query.0": (6, 6),
        "landmark_projection.query.1": (6,),
        "q_norm": (6,),
        "k_norm": (6,),
    }
    expected = {"relative_bias": (16, 2)}
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == expected
    plain = EVAttention(12, 2, qkv_bias=False, proj_bias=False, projection="identity")
    assert set(plain.state_dict()) == {"qkv.weight", "proj.weight"}


@pytest.mark.parametrize(
    ("kind", "key", "query"),
    [
        ("linear-layernorm", [nn.Linear, nn.LayerNorm], [nn.Linear, nn.LayerNorm]),
        ("linear", [nn.Linear], [nn.Linear]),
        ("key-only", [nn.Linear, nn.LayerNorm], None),
        ("identity", None, None),
        ("tangent", None, None),
    ],
)
def test_landmark_projection(kind: str, key: list[type] | None, query: list[type] | None) -> None:
    projection = LandmarkProjection(8, kind, dtype=torch.float64)
    for branch, layers in ((projection.key, key), (projection.query, query)):
        if layers is None:
            assert branch is None
        else:
            assert [type(layer) for layer in branch] == layers
            assert 0.01 < branch[0].weight.std() < 0.03
            assert not branch[0].bias.any()
    assert all(x.dtype == torch.float64 for x in projection.parameters())
    assert kind in repr(projection)


def test_made_on_the_meta_device() -> None:
    options = {"window_size": 5, "relative_bias": "t5", "overlap": 1, "qk_norm": nn.LayerNorm}
    module = EVAttention(12, 2, **options, device="meta")
    assert all(x.is_meta for x in (*module.parameters(), *module.buffers()))
    module.to_empty(device="cpu")
    expected = EVAttention(12, 2, **options)
    module.load_state_dict(expected.state_dict())
    module.t5_buckets.zero_()
    module.reset_parameters()
    assert torch.equal(module.t5_buckets, expected.t5_buckets)


def test_copies_and_dtypes() -> None:
    torch.manual_seed(0)
    module = EVAttention(12, 2, window_size=4, chunk_size=2, relative_bias="t5").eval()
    x = torch.randn(1, 9, 12)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    half = module.to(torch.bfloat16)
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert half.t5_buckets.dtype == torch.int64


def test_output_dropout() -> None:
    module = EVAttention(12, 2, window_size=4, chunk_size=2, proj_drop=0.5, proj_bias=False)
    x = torch.randn(4, 16, 12)
    assert 0.3 < (module(x) == 0).float().mean() < 0.7
    assert module.eval()(x).all()


def test_empty_batch_and_one_token() -> None:
    for options in (SEQUENCE, {"window_size": 4, "num_landmarks": 49}):
        module = EVAttention(12, 2, **options)
        assert module(torch.randn(0, 9, 12)).shape == (0, 9, 12)
        assert module(torch.randn(2, 1, 12)).shape == (2, 1, 12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 13}, ["dim", "13", "multiple of num_heads = 2"]),
        ({"dim": 0}, ["dim", "0", "positive"]),
        ({"num_heads": 0}, ["num_heads", "0", "at least 1"]),
        ({"window_size": 0}, ["window_size", "0", "at least 1"]),
        ({"window_size": (4, 0)}, ["window_size", "0", "at least 1"]),
        ({"window_size": (4, 4, 4)}, ["window_size", "(4, 4, 4)", "(height, width)"]),
        ({"chunk_size": 0}, ["chunk_size", "0", "at least 1"]),
        ({"num_landmarks": 0}, ["num_landmarks", "0", "at least 1"]),
        ({"grid_size": (4, 0)}, ["grid_size", "0", "at least 1"]),
        ({"grid_size": (4,)}, ["grid_size", "(4,)", "(height, width)"]),
        ({"overlap": -1}, ["overlap", "-1", "at least 0"]),
        ({"chunk_overlap": -1}, ["chunk_overlap", "-1", "at least 0"]),
        ({"num_prefix_tokens": -1}, ["num_prefix_tokens", "-1", "at least 0"]),
        ({"projection": "none"}, ["projection", "'none'", "'identity'"]),
        ({"projection": "tangent", "log_count_bias": True}, ["log_count_bias", "False", "'tangent'"]),
        ({"relative_bias": "rotary"}, ["relative_bias", "'rotary'", "'table'"]),
        ({"relative_bias": "t5", "grid_size": (4, 4)}, ["relative_bias", "'t5'", "(4, 4)", "'table'"]),
        ({"relative_bias": "t5", "window_size": (4, 4)}, ["relative_bias", "'t5'", "(4, 4)", "'table'"]),
        ({"attn_drop": 1.0}, ["attn_drop", "1.0", "[0, 1)"]),
        ({"attn_drop": -0.1}, ["attn_drop", "-0.1", "[0, 1)"]),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        EVAttention(**{"dim": 12, "num_heads": 2, **options})
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"chunk_size": 4}, ValueError, ["chunk_size", "4", "divisor of window_size = 6"]),
        ({"chunk_size": 0}, ValueError, ["chunk_size", "0", "at least 1"]),
        ({"window_size": (6, 6)}, TypeError, ["window_size", "(6, 6)", "int"]),
        ({"chunk_size": None}, TypeError, ["chunk_size", "None", "int"]),
        ({"overlap": -1}, ValueError, ["overlap", "-1", "at least 0"]),
        ({"dim": 13}, ValueError, ["dim", "13", "multiple of num_heads = 2"]),
        ({"relative_bias": "rotary"}, ValueError, ["relative_bias", "'rotary'", "'table'"]),
    ],
)
def test_bad_causal_arguments(options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        CausalEVAttention(**{"dim": 12, "num_heads": 2, **CAUSAL, **options})
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("shape", [(2, 12), (2, 9, 13), (2, 3, 3, 12)])
def test_bad_causal_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: expected \[B, N, 12\], got"):
        CausalEVAttention(12, 2)(torch.randn(shape))


@pytest.mark.parametrize(
    ("options", "shape", "arguments", "words"),
    [
        ({}, (2, 12), {}, ["x", "(2, 12)", "[B, N, 12]"]),
        ({}, (2, 9, 13), {}, ["x", "(2, 9, 13)", "[B, N, 12]"]),
        ({"num_prefix_tokens": 1}, (2, 3, 3, 12), {}, ["x", "(2, 3, 3, 12)", "num_prefix_tokens = 1"]),
        ({"num_prefix_tokens": 5}, (2, 4, 12), {}, ["x", "(2, 4, 12)", "num_prefix_tokens = 5"]),
        ({}, (2, 3, 4, 12), {"grid_size": (4, 3)}, ["grid_size", "(4, 3)", "(3, 4)"]),
        ({"relative_bias": "t5"}, (2, 3, 4, 12), {}, ["grid_size", "(3, 4)", "None", "'t5'"]),
        ({"relative_bias": "table"}, (2, 3, 4, 12), {}, ["grid_size", "(3, 4)", "None", "'table'"]),
        (
            {"relative_bias": "table", "window_size": (4, 4)},
            (2, 9, 12),
            {},
            ["grid_size", "got None", "(height, width)", "'table'"],
        ),
        ({"window_size": (4, 4)}, (2, 9, 12), {}, ["window_size", "(4, 4)", "int"]),
    ],
)
def test_bad_input(
    options: dict[str, Any], shape: tuple[int, ...], arguments: dict[str, Any], words: list[str]
) -> None:
    module = EVAttention(12, 2, **{"window_size": 4, "chunk_size": 2, **options})
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        module(torch.randn(shape), **arguments)
    assert all(word in str(raised.value) for word in words), raised.value


DYNAMIC = {
    "causal": (
        {**CAUSAL, "relative_bias": "t5", "overlap": 2, "log_count_bias": True},
        [(53,), (100,)],
    ),
    "sequence": (
        {"window_size": 4, "num_landmarks": 5, "relative_bias": "t5", "log_count_bias": True},
        [(53,), (100,)],
    ),
    "sequence-prefix": ({**SEQUENCE, "num_prefix_tokens": 1, "qk_norm": nn.LayerNorm}, [(53,), (100,)]),
    "grid": (
        {
            "window_size": (4, 4),
            "num_landmarks": 9,
            "relative_bias": "table",
            "log_count_bias": True,
            "overlap": 1,
        },
        [(14, 18), (9, 30)],
    ),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", DYNAMIC)
def test_compiles_to_one_graph(name: str, train: bool) -> None:
    torch.manual_seed(0)
    options, sizes = DYNAMIC[name]
    module = (CausalEVAttention if name == "causal" else EVAttention)(12, 2, **options, attn_drop=0.1).train(
        train
    )
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for batch, size in enumerate(sizes, 2):
        x = torch.randn(batch, *size, 12)
        torch.manual_seed(0)
        actual = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(actual, module(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", DYNAMIC)
def test_exports_with_dynamic_sizes(name: str, strict: bool) -> None:
    torch.manual_seed(0)
    options, sizes = DYNAMIC[name]
    module = (CausalEVAttention if name == "causal" else EVAttention)(12, 2, **options).eval()
    example = torch.randn(2, *sizes[0], 12)
    dynamic = {"x": dict.fromkeys(range(example.dim() - 1), Dim.AUTO)}
    exported = torch.export.export(module, (example,), dynamic_shapes=dynamic, strict=strict).module()
    for batch, size in enumerate(sizes, 2):
        x = torch.randn(batch, *size, 12)
        torch.testing.assert_close(exported(x), module(x))


def test_autocast() -> None:
    torch.manual_seed(0)
    module = EVAttention(12, 2, **SEQUENCE, relative_bias="table", qk_norm=nn.LayerNorm).eval()
    x = torch.randn(2, 17, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    # Roundings of q, k, v, the attention's output and the projection's, 2**-8 each, of numbers of order 1.
    torch.testing.assert_close(out.float(), module(x), rtol=0.03, atol=0.03)
