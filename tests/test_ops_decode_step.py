"""The decoding operator against the oracle on whole sequences, and as a citizen of PyTorch."""

from dataclasses import replace
from typing import Any

import hypothesis
import op_cases
import pytest
import torch
from op_cases import DEVICES, KINDS, Case
from torch import Tensor

from eva_attn import functional, reference
from eva_attn.decoding import DecodingState

on_devices = pytest.mark.parametrize("device", DEVICES)
decode_step = torch.ops.eva_attn.decode_step

CASES = {
    "plain": Case(26, 6, 3),
    "one chunk a window": Case(25, 4, 4, overlap=9, scale=0.7),
    "projection": Case(40, 8, 4, overlap=3, kind="linear-layernorm", bias="per head", head_dim=17),
    "key-only": Case(33, 6, 2, overlap=1, kind="key-only", bias="shared", exclude=True, heads=3),
    "counts": Case(33, 6, 2, overlap=3, kind="linear", exclude=True, log_count=True, batch=1),
    "chunks of one": Case(17, 3, 1, log_count=True),
    "tangent": Case(33, 6, 2, overlap=3, kind="tangent", bias="per head", exclude=True, scale=0.7),
    "large tangent": Case(300, 64, 32, kind="tangent", head_dim=64),
    "large": Case(
        300, 64, 32, overlap=16, kind="linear-layernorm", bias="per head", head_dim=64, log_count=True
    ),
}
CASES = {name: replace(case, is_causal=True) for name, case in CASES.items()}


def problem(
    case: Case, device: str, dtype: torch.dtype = torch.float64
) -> tuple[tuple[Tensor, Tensor, Tensor], DecodingState, dict[str, Any]]:
    """All tokens of `case`, an empty state with room for them, and the options of the operator."""
    given = op_cases.arguments(case, device, dtype)
    tokens = tuple(x.detach() for x in given.qkv())
    state = DecodingState.zeros(
        case.batch,
        case.heads,
        case.head_dim,
        max_length=case.num_tokens,
        window_size=case.window,
        chunk_size=case.chunk,
        overlap=case.overlap,
        tangent=case.kind == "tangent",
        device=torch.device(device),
        dtype=dtype,
    )
    bias, weights = (
        given.options["relative_bias"],
        functional.projection_arguments(given.options["projection"]),
    )
    options = {
        "window_size": case.window,
        "chunk_size": case.chunk,
        "overlap": case.overlap,
        "relative_bias": None if bias is None else bias.detach().unsqueeze(1),
        "exclude_window_landmarks": case.exclude,
        "log_count_bias": case.log_count,
        "scale": case.scale,
        **{name: x.detach() if torch.is_tensor(x) else x for name, x in weights.items()},
    }
    return tokens, state, options


def decoded(case: Case, device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The tokens of `case`, one a call."""
    tokens, state, options = problem(case, device, dtype)
    steps = [
        decode_step(*(x[:, :, [i]] for x in tokens), **state.tensors(), **options)
        for i in range(case.num_tokens)
    ]
    return torch.cat(steps, 2)


def expected(case: Case, device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    given = op_cases.arguments(case, device, dtype)
    with torch.no_grad():
        return reference.eva_attention(*given.qkv(), **given.options)


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert actual.dtype == wanted.dtype
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * max(1.0, largest))


@on_devices
@pytest.mark.parametrize("name", CASES)
def test_fixed_cases(name: str, device: str) -> None:
    assert_near(decoded(CASES[name], device), expected(CASES[name], device), 1e-12)


@on_devices
@op_cases.seeded(60)
@hypothesis.given(case=op_cases.causal_cases())
def test_random_cases(device: str, case: Case) -> None:
    case = replace(case, noise=False, landmark_bias=False, padding=0.0, dropout_p=0.0)
    assert_near(decoded(case, device), expected(case, device), 1e-12)


@on_devices
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_tokens_a_call(name: str, device: str) -> None:
    """Each sequence takes in its own number; what is not taken in is NaN, and gives 0."""
    case = CASES[name]
    tokens, state, options = problem(case, device)
    random = torch.Generator().manual_seed(0)
    wanted, position = expected(case, device), [0] * case.batch
    while min(position) < case.num_tokens:
        counts = torch.randint(0, 2 * case.chunk, (case.batch,), generator=random).tolist()
        counts = [min(n, case.num_tokens - start) for n, start in zip(counts, position, strict=True)]
        piece = [torch.full_like(x[:, :, : max(counts)], torch.nan) for x in tokens]
        for b, (n, start) in enumerate(zip(counts, position, strict=True)):
            for x, new in zip(tokens, piece, strict=True):
                new[b, :, :n] = x[b, :, start : start + n]
        num_tokens = torch.tensor(counts, device=device)
        out = decode_step(*piece, **state.tensors(), **options, num_tokens=num_tokens)
        for b, (n, start) in enumerate(zip(counts, position, strict=True)):
            assert_near(out[b, :, :n], wanted[b, :, start : start + n], 1e-12)
            assert not out[b, :, n:].any()
            position[b] += n
        assert state.head_position.tolist() == [[start] * case.heads for start in position]


@on_devices
@pytest.mark.parametrize("head_dim", [1, 2, 3, 7, 8, 12, 16, 24, 31, 32, 48, 80, 96, 128, 129, 200, 256])
def test_head_dims(head_dim: int, device: str) -> None:
    case = replace(CASES["projection"], head_dim=head_dim, batch=1)
    assert_near(decoded(case, device), expected(case, device), 1e-11)  # a LayerNorm of few numbers enlarges
    assert_near(decoded(case, device, torch.float32), expected(case, device, torch.float32), 1e-4)
    assert_near(decoded(case, device, torch.bfloat16), expected(case, device, torch.bfloat16), 2e-2)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype, device: str) -> None:
    """Within two roundings to the dtype, of landmarks and of the output."""
    case = replace(CASES["large"], kind=kind, log_count=kind != "tangent")
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)  # float32: sums of some hundred numbers
    assert_near(decoded(case, device, dtype), expected(case, device, dtype), tolerance)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_with_half_precision(dtype: torch.dtype, device: str) -> None:
    tokens, state, options = problem(CASES["large"], device, dtype)
    single = {
        name: x.float() if torch.is_tensor(x) else x for name, x in options.items()
    }  # the same numbers: they were rounded before
    other = state.clone()
    out = decode_step(*tokens, **state.tensors(), **options)
    assert torch.equal(decode_step(*tokens, **other.tensors(), **single), out)


@on_devices
def test_strides(device: str) -> None:
    """Views of a packed projection, contiguous tensors and channels that do not lie side by side."""
    tokens, state, options = problem(CASES["projection"], device)
    out = decode_step(*tokens, **state.clone().tensors(), **options)
    assert out.transpose(1, 2).is_contiguous()
    for layout in (
        Tensor.contiguous,
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], -1)[..., 0],
    ):
        other = state.clone()
        assert torch.equal(decode_step(*map(layout, tokens), **other.tensors(), **options), out)


@on_devices
def test_same_bits_again(device: str) -> None:
    """From run to run, for any number of threads, and for any number of tokens a call."""
    case = replace(CASES["large"], batch=3)
    tokens, state, options = problem(case, device, torch.float32)
    whole = state.clone()
    out = decode_step(*tokens, **whole.tensors(), **options)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(decoded(case, device, torch.float32), out)
    finally:
        torch.set_num_threads(threads)


@on_devices
def test_a_token_that_sees_nothing_gets_zeros(device: str) -> None:
    tokens, state, options = problem(CASES["projection"], device)
    options["relative_bias"].fill_(-torch.inf)
    out = decode_step(*tokens, **state.tensors(), **options)
    assert not out[:, :, :4].any()  # no chunk has ended
    assert out[:, :, 4:].isfinite().all()
    assert out[:, :, 4:].any(-1).all()


@on_devices
def test_nothing_to_do(device: str) -> None:
    tokens, state, options = problem(CASES["plain"], device)
    none = [x[:, :, :0] for x in tokens]
    assert decode_step(*none, **state.tensors(), **options).shape == none[0].shape
    no_batch = {name: x[:0] for name, x in state.tensors().items()}
    assert decode_step(*(x[:0] for x in tokens), **no_batch, **options).shape == tokens[0][:0].shape


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "projection", "key-only", "counts", "tangent"])
def test_opcheck(name: str, dtype: torch.dtype, device: str) -> None:
    tokens, state, options = problem(CASES[name], device, dtype)
    options["num_tokens"] = torch.full((CASES[name].batch,), 7, device=device)
    torch.library.opcheck(
        decode_step.default, tuple(x[:, :, :9] for x in tokens), {**state.tensors(), **options}
    )


@on_devices
def test_meta_tensors(device: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        tokens, state, options = problem(CASES["projection"], device, dtype)
        wanted = decode_step(*tokens, **state.tensors(), **options)
        named = {**state.tensors(), **options}
        named = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in named.items()}
        found = decode_step(*(x.to("meta") for x in tokens), **named)
        assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


@on_devices
def test_has_no_gradient(device: str) -> None:
    (query, key, value), state, options = problem(CASES["plain"], device)
    key.requires_grad_()
    with pytest.raises(
        NotImplementedError, match=r"decode_step has no gradient, and key requires one: .*no_grad"
    ):
        decode_step(query, key, value, **state.tensors(), **options)
    assert not state.head_position.any()
    with torch.no_grad():
        assert not decode_step(query, key, value, **state.tensors(), **options).requires_grad


@on_devices
def test_autograd_notices_a_state_that_changed(device: str) -> None:
    tokens, state, options = problem(CASES["plain"], device)
    factor = torch.ones_like(state.window_key, requires_grad=True)
    product = factor * state.window_key
    decode_step(*tokens, **state.tensors(), **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """The state keeps its dtype, as do tokens of the same; the output has autocast's."""
    tokens, state, options = problem(CASES["projection"], device, torch.float32)
    other = state.clone()
    with torch.autocast(device, dtype=dtype):
        out = decode_step(*tokens, **state.tensors(), **options)
    assert torch.equal(out, decode_step(*tokens, **other.tensors(), **options).to(dtype))
    assert all(map(torch.equal, state.tensors().values(), other.tensors().values()))


def zeros(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@on_devices
@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("query", zeros(2, 1, 8), ValueError, ["2, 1, 8"]),
        ("query", zeros(2, 2, 1, 8, dtype=torch.int32), TypeError, ["Int"]),
        ("key", zeros(2, 2, 2, 8), ValueError, ["2, 2, 2, 8"]),
        ("value", zeros(2, 2, 1, 8, dtype=torch.float32), TypeError, ["Float"]),
        ("window_key", zeros(2, 2, 7, 8), ValueError, ["2, 2, 7, 8", "2, 2, 6, 8"]),
        ("window_value", zeros(2, 2, 6, 8, dtype=torch.float32), TypeError, ["Float"]),
        ("window_value", zeros(2, 2, 8, 6).mT, ValueError, ["contiguous"]),
        ("window_key", zeros(2, 2, 6, 8, device="meta"), ValueError, ["meta"]),
        ("landmark_key", zeros(2, 2, 8), ValueError, ["2, 2, 8"]),
        ("landmark_key", zeros(2, 1, 9, 8), ValueError, ["2, 1, 9, 8"]),
        ("landmark_value", zeros(2, 2, 8, 8), ValueError, ["2, 2, 8, 8", "2, 2, 9, 8"]),
        ("key_sum", zeros(2, 2, 1, 8), ValueError, ["2, 2, 1, 8"]),
        ("query_sum", zeros(2, 2, 8, dtype=torch.float32), TypeError, ["Double", "Float"]),
        ("head_position", zeros(2, dtype=torch.int64), ValueError, ["[2]"]),
        ("head_position", zeros(2, 2, dtype=torch.int32), TypeError, ["Int"]),
        ("landmark_entropy", zeros(2, 2, 8), ValueError, ["2, 2, 8", "2, 2, 9"]),
        ("landmark_entropy", zeros(2, 2, 9, dtype=torch.float32), TypeError, ["Double", "Float"]),
        ("num_tokens", zeros(3, dtype=torch.int64), ValueError, ["[3]"]),
        ("num_tokens", zeros(2, dtype=torch.int32), TypeError, ["Int"]),
        ("window_size", 0, ValueError, ["0"]),
        ("chunk_size", 4, ValueError, ["4", "6"]),
        ("overlap", -1, ValueError, ["-1"]),
        ("overlap", 1, ValueError, []),
        ("relative_bias", zeros(2, 11), ValueError, ["2, 11"]),
        ("relative_bias", zeros(2, 1, 13), ValueError, ["2, 1, 13", "11"]),
        ("scale", float("nan"), ValueError, ["nan"]),
        ("norm_eps", -1.0, ValueError, ["-1"]),
        ("key_weight", zeros(8, 9), ValueError, ["8, 9"]),
        ("query_norm_bias", zeros(8), ValueError, []),
    ],
)
def test_refuses(name: str, value: Any, error: type[Exception], words: list[str], device: str) -> None:
    tokens, state, options = problem(CASES["plain"], device)
    arguments = dict(zip(("query", "key", "value"), (x[:, :, :1] for x in tokens), strict=True))
    arguments |= state.tensors() | options
    if torch.is_tensor(value) and value.device.type == "cpu":
        value = value.to(device)
    with pytest.raises(error) as raised:
        decode_step(**arguments | {name: value})
    message = str(raised.value).split("\nException raised from")[0]
    shown = "window_key" if (name, value) == ("overlap", 1) else name
    assert all(word in message for word in (shown, *words)), message


def test_refuses_positions_beyond_the_state() -> None:
    """Before anything is written; on CUDA the host does not know them, and such landmarks are dropped."""
    tokens, state, options = problem(CASES["plain"], "cpu")
    before = state.clone()
    for position, counts, name in ((26, None, "head_position"), (-1, None, "head_position"),
                                   (0, [1, 27], "num_tokens"), (0, [1, -1], "num_tokens")):  # fmt: skip
        state.head_position[1] = position
        num_tokens = None if counts is None else torch.tensor(counts)
        with pytest.raises(
            ValueError, match=f"{name} must be between 0 and .* got {(counts or [position])[-1]}"
        ):
            decode_step(*tokens, **state.tensors(), **options, num_tokens=num_tokens)
        state.head_position[1] = 0
        assert all(map(torch.equal, state.tensors().values(), before.tensors().values()))


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_replays_a_captured_step(dtype: torch.dtype) -> None:
    case = CASES["large"]
    tokens, state, options = problem(case, "cuda", dtype)
    wanted = decoded(case, "cuda", dtype)
    now = [x[:, :, [0]].clone() for x in tokens]
    warm = state.clone()
    decode_step(*now, **warm.tensors(), **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_step(*now, **state.tensors(), **options)
    for i in range(case.num_tokens):
        for x, whole in zip(now, tokens, strict=True):
            x.copy_(whole[:, :, [i]])
        graph.replay()
        assert torch.equal(out, wanted[:, :, [i]])
