"""Operators against the oracle, in exact limits, against numerical derivatives, and at the edges of layouts,
sizes and numbers."""

import math
from dataclasses import replace
from typing import Any

import hypothesis
import op_cases
import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    DEVICES,
    FIXED,
    KINDS,
    Arguments,
    Case,
    assert_near,
    assert_same,
    attend,
    gradients,
    outcome,
)
from torch import Tensor

from eva_attn import LandmarkProjection, estimators, functional, reference

# Operator and oracle sum in different orders: some hundred roundings of 1e-16, which the division by the
# deviation in the LayerNorm of a short mean, and its gradient, can enlarge some hundred times.
ORACLE = 1e-11
# Both sides are a softmax of some ten logits of order 1, summed in different orders.
EXACT = 1e-12

on_devices = pytest.mark.parametrize("device", DEVICES)


def assert_agree(case: Case, device: str) -> None:
    """Operator and oracle, in output and all gradients."""
    given = op_cases.arguments(case, device)
    assert_near(outcome(functional, case, given), outcome(reference, case, given), ORACLE)


@on_devices
@pytest.mark.parametrize("name", FIXED)
def test_fixed_cases(name: str, device: str) -> None:
    assert_agree(FIXED[name], device)


@on_devices
@op_cases.seeded(400)
@hypothesis.given(case=op_cases.cases())
def test_random_cases(device: str, case: Case) -> None:
    assert_agree(case, device)


@on_devices
@op_cases.seeded(150)
@hypothesis.given(case=op_cases.causal_cases())
def test_random_causal_cases(device: str, case: Case) -> None:
    assert_agree(case, device)


@on_devices
@op_cases.seeded(100)
@hypothesis.given(case=op_cases.cases(), mean_divisor=hypothesis.strategies.sampled_from([0, 0, 5]))
def test_random_summaries(device: str, case: Case, mean_divisor: int) -> None:
    given = op_cases.arguments(case, device)
    inputs = {name: x for name, x in given.inputs.items() if name != "relative_bias"}
    results = []
    for functions in (functional, reference):
        options = op_cases.summary_options(given.options)
        landmarks = functions.chunk_summary(*given.qkv(), **options, mean_divisor=mean_divisor)
        results.append(
            dict(zip(("landmark_key", "landmark_value", "landmark_entropy"), landmarks, strict=False))
            | gradients(landmarks, tuple(x.detach() for x in given.halves()), inputs)
        )
    assert_near(*results, ORACLE)


@on_devices
@op_cases.seeded(100)
@hypothesis.given(case=op_cases.cases(), landmarks=hypothesis.strategies.booleans())
def test_random_windows(device: str, case: Case, landmarks: bool) -> None:
    """Joint attention to landmarks that are none of its making, or to none."""
    given = op_cases.arguments(case, device)
    options = op_cases.window_options(given.options)
    if not landmarks:
        options |= {"landmark_bias": None, "exclude_window_landmarks": False, "log_count_bias": False}
    inputs = {name: x for name, x in given.inputs.items() if name in ("qkv", "relative_bias")}
    inputs |= {"landmarks": given.landmarks}
    if given.entropy is not None and landmarks:
        inputs["landmark_entropy"] = given.entropy
    results = []
    for functions in (functional, reference):
        torch.manual_seed(case.seed)
        output = functions.window_attention(*given.qkv(), *(given.halves() if landmarks else ()), **options)
        results.append({"output": output} | gradients(output, given.cotangent, inputs))
    assert_near(*results, ORACLE)


EXACT_LIMITS = {
    "one window": Case(18, 18, 4),
    "one larger window": Case(18, 100, 5, chunk_overlap=2),
    "chunks of one": Case(18, 5, 1, overlap=1),
    "chunks of one and a prefix": Case(15, 4, 1, prefix=3),
    "one window on a grid": Case((3, 6), (3, 6), (2, 4)),
    "chunks of one on a grid": Case((3, 6), (2, 4), 1, overlap=(0, 1)),
    "chunks of one on a grid with a prefix": Case((3, 5), 2, 1, prefix=3),
}


@on_devices
@pytest.mark.parametrize("kind", ["identity", "tangent"])
@pytest.mark.parametrize("padding", [0.0, 0.4])
@pytest.mark.parametrize("name", EXACT_LIMITS)
def test_exact_limits(name: str, padding: float, kind: str, device: str) -> None:
    """One window over all, or chunks of one token: softmax attention, and its gradients."""
    case = replace(EXACT_LIMITS[name], exclude=True, head_dim=5, padding=padding)
    case = replace(case, kind=kind, log_count=kind == "identity")
    given = op_cases.arguments(case, device)
    mask = given.options["key_padding_mask"]
    attended = torch.ones(2, 1, 1, 18, dtype=torch.bool, device=device)
    if mask is not None:
        attended = ~mask[:, None, None, :]
    softmax = F.scaled_dot_product_attention(*given.qkv(), attended)
    softmax = softmax.masked_fill(~attended.mT, 0.0)
    expected = {"output": softmax} | gradients(softmax, given.cotangent, given.inputs)
    assert_near(outcome(functional, case, given), expected, EXACT)


@on_devices
@pytest.mark.parametrize("exclude", [False, True])
def test_tangents_are_those_of_the_estimators(exclude: bool, device: str) -> None:
    """The same weights, evidence bound and joint softmax, by formulas that share no code with ours."""
    case = Case(24, 6, 3, kind="tangent", exclude=exclude, scale=0.4)
    given = op_cases.arguments(case, device)
    query, key, value = (x.detach() for x in given.qkv())
    position = torch.arange(24, device=device)
    exact = position[:, None] // 6 == position // 6
    member = position // 3 == torch.arange(8, device=device)[:, None]
    reference_query = query.unflatten(2, (8, 3)).mean(3)
    weights = estimators.tangent_weights(reference_query, key, member, scale=0.4)
    bound = estimators.evidence_bound(query, key, weights, scale=0.4)
    landmark_key, landmark_value, entropy = functional.chunk_summary(
        query, key, value, **op_cases.summary_options(given.options)
    )
    near = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(landmark_key, weights @ key, **near)
    torch.testing.assert_close(landmark_value, weights @ value, **near)
    torch.testing.assert_close(0.4 * query @ landmark_key.mT + entropy[:, :, None], bound, **near)
    if exclude:
        bound = bound.masked_fill(position[:, None] // 6 == torch.arange(8, device=device) // 2, -math.inf)
    expected = estimators.eva(query, key, value, exact, weights, bound, scale=0.4)
    torch.testing.assert_close(functional.eva_attention(query, key, value, **given.options), expected, **near)


@on_devices
def test_what_is_returned_beside_the_output(device: str) -> None:
    """Log-sum-exp of the joint logits, landmarks, and means of chunks in the accumulation type, no gradients.

    Of few 16-bit members only the mean of queries, rounded, beside landmarks.
    """
    case = replace(FIXED["one window"], bias="none")
    given = op_cases.arguments(case, device)
    query, key, value = given.qkv()
    scores = (query @ key.mT * 8**-0.5).logsumexp(-1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        rows = [x.to(dtype) for x in (query, key, value)]
        options = {"grid_size": (1, 11), "window_size": (1, 64), "exclude_window_landmarks": True}
        output, logsumexp, landmarks, statistics = torch.ops.eva_attn.eva_attention(
            *rows, chunk_size=(1, 16), **options
        )
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        assert output.dtype == landmarks.dtype == dtype
        assert logsumexp.dtype == statistics.dtype == accumulated
        assert logsumexp.shape == (2, 2, 11)
        assert landmarks.shape == (2, 2, 2, 1, 8)
        key_mean, query_mean, *omega = statistics.view(-1, 2, 2, 1, 8)
        # The inputs are rounded to bfloat16, 2**-8, and their products are summed.
        bound = EXACT if dtype == torch.float64 else 0.05
        torch.testing.assert_close(logsumexp.double(), scores, rtol=0.0, atol=bound)
        torch.testing.assert_close(key_mean.double(), key.mean(2, keepdim=True), rtol=0.0, atol=bound)
        torch.testing.assert_close(query_mean.double(), query.mean(2, keepdim=True), rtol=0.0, atol=bound)
        assert len(omega) == (dtype.itemsize == 2)
        for row in omega:
            mu = (key_mean + query_mean).double() / 2
            torch.testing.assert_close(row.double(), mu, rtol=0.0, atol=bound)
        assert output.requires_grad
        assert not any(x.requires_grad for x in (logsumexp, landmarks, statistics))
        _, _, landmarks, statistics = torch.ops.eva_attn.eva_attention(*rows, chunk_size=(1, 4), **options)
        if dtype.itemsize == 2:
            assert len(statistics) == 0
            query_mean = landmarks[2]
        else:
            query_mean = statistics.view(2, 2, 2, 3, 8)[1]
        torch.testing.assert_close(
            query_mean[:, :, 0].double(), query[:, :, :4].mean(2), rtol=0.0, atol=bound
        )


def test_parametrized_projection() -> None:
    """Weights that are computed when they are asked for count as well, and pass their gradient on."""
    query, key, value = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64).unbind()
    projection = LandmarkProjection(4, dtype=torch.float64)
    options = {"window_size": 3, "chunk_size": 2, "projection": projection}
    expected = functional.eva_attention(query, key, value, **options)
    torch.nn.utils.parametrizations.weight_norm(projection.key[0])
    output = functional.eva_attention(query, key, value, **options)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    assert projection.key[0].parametrizations.weight.original1.grad.abs().sum() > 0


SMALL = {
    "sequence": Case(7, 3, 2, overlap=1, chunk_overlap=1, bias="per head", padding=0.2, noise=True),
    "prefix": Case(5, 2, 3, prefix=2, bias="shared", log_count=True, landmark_bias=True),
    "dropout": Case(6, 3, 2, dropout_p=0.4, exclude=True),
    "grid": Case((3, 4), (2, 3), (2, 1), overlap=(1, 0), bias="per head", padding=0.3),
    "packed grid": Case((3, 3), 2, 2, chunk_overlap=(0, 1), bias="shared", packed=True, prefix=1),
}


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name: str, kind: str, device: str) -> None:
    """Numerical derivatives, and no bit that differs between two runs."""
    case = replace(SMALL[name], kind=kind, batch=1, head_dim=3)
    case = replace(case, log_count=case.log_count and kind != "tangent")
    given = op_cases.arguments(case, device)
    assert torch.autograd.gradcheck(
        lambda *_: attend(functional, case, given), tuple(given.inputs.values()), nondet_tol=0.0
    )


@on_devices
@pytest.mark.parametrize("kind", ["linear-layernorm", "tangent"])
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck_of_the_halves(name: str, kind: str, device: str) -> None:
    case = replace(SMALL[name], kind=kind, batch=1, head_dim=3)
    case = replace(case, log_count=case.log_count and kind != "tangent")
    given = op_cases.arguments(case, device)

    def summarise(*_: Tensor) -> tuple[Tensor, ...]:
        return functional.chunk_summary(*given.qkv(), **op_cases.summary_options(given.options))

    def attend_to_window(*_: Tensor) -> Tensor:
        torch.manual_seed(0)
        options = op_cases.window_options(given.options)
        return functional.window_attention(*given.qkv(), *given.halves(), **options)

    inputs = [x for name, x in given.inputs.items() if name != "relative_bias"]
    assert torch.autograd.gradcheck(summarise, inputs, nondet_tol=0.0)
    inputs = [given.landmarks, *(x for name, x in given.inputs.items() if name in ("qkv", "relative_bias"))]
    if given.entropy is not None:
        inputs.append(given.entropy)
    assert torch.autograd.gradcheck(attend_to_window, inputs, nondet_tol=0.0)


@on_devices
def test_noise_and_landmark_bias_get_no_gradient(device: str) -> None:
    case = replace(FIXED["ragged grid"], kind="identity")
    given = op_cases.arguments(case, device)
    constants = [given.options[name].requires_grad_() for name in ("noise", "landmark_bias")]
    output = attend(functional, case, given)
    assert torch.autograd.grad(output.sum(), constants, allow_unused=True) == (None, None)


@on_devices
@pytest.mark.parametrize("wanted", ["query", "key", "value", "relative_bias", "projection"])
def test_gradient_of_one_input_alone(wanted: str, device: str) -> None:
    case = replace(FIXED["ragged"], batch=1)
    given = op_cases.arguments(case, device)
    tensors = {
        name: x.detach().clone() for name, x in zip(("query", "key", "value"), given.qkv(), strict=True)
    }
    tensors["relative_bias"] = given.options["relative_bias"].detach().clone()
    projection = given.options["projection"].requires_grad_(wanted == "projection")
    inputs = dict(projection.named_parameters())
    if wanted != "projection":
        inputs = {wanted: tensors[wanted].requires_grad_()}
    results = []
    for functions in (functional, reference):
        output = functions.eva_attention(**{**given.options, **tensors})
        results.append(gradients(output, given.cotangent, inputs))
    assert_near(*results, ORACLE)


def layout_of(name: str, x: Tensor) -> Tensor:
    """The numbers of `x` [B, H, N, D] in another memory layout."""
    match name:
        case "contiguous":
            return x.contiguous()
        case "packed":
            batch, heads, tokens, dim = x.shape
            packed = x.new_full((batch, tokens, 3, heads, dim), math.nan)
            packed[:, :, 1] = x.transpose(1, 2)
            return packed[:, :, 1].transpose(1, 2)
        case "tokens last":
            return x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
        case "every other channel":
            return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]
        case _:
            padded = F.pad(x, (3, 2, 1, 4), value=math.nan)
            return padded[:, :, 1 : 1 + x.shape[2], 3 : 3 + x.shape[3]]


LAYOUTS = ["contiguous", "packed", "tokens last", "every other channel", "inside of a larger one"]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["ragged", "ragged grid", "prefix"])
def test_strides(name: str, layout: str, dtype: torch.dtype, device: str) -> None:
    """Of every tensor: what strides say changes no bit, as long as the same kernels run."""
    case = FIXED[name]
    given = op_cases.arguments(case, device, dtype)

    def run(layout: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        options = {**given.options}
        for other in ("relative_bias", "noise", "landmark_bias", "key_padding_mask"):
            if layout != "contiguous" and options[other] is not None:
                x = options[other].detach()
                options[other] = torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
        cotangent = layout_of(layout, given.cotangent)
        inputs = {name: x.detach().requires_grad_() for name, x in zip("qkv", tensors, strict=True)}
        output = functional.eva_attention(*inputs.values(), **options)
        assert output.transpose(1, 2).is_contiguous()
        return {"output": output} | gradients(output, cotangent, inputs)

    tensors = [x.detach() for x in given.qkv()]
    expected = run("contiguous", [x.contiguous() for x in tensors])
    found = run(layout, [layout_of(layout, x) for x in tensors])
    if device == "cuda" and dtype == torch.bfloat16:
        # Tensor cores ask for aligned rows; other kernels round weights and sums otherwise.
        assert_near(found, expected, 2 * torch.finfo(dtype).eps)
    else:
        assert_same(found, expected)


@on_devices
def test_expanded_inputs(device: str) -> None:
    """Strides of 0: one sequence for all heads and batch elements, and an expanded gradient of the output."""
    case = FIXED["ragged"]
    given = op_cases.arguments(case, device)
    inputs = {
        name: x[:1, :1].detach().clone().requires_grad_() for name, x in zip("qkv", given.qkv(), strict=True)
    }
    results = []
    for functions in (functional, reference):
        output = functions.eva_attention(
            *(x.expand_as(given.cotangent) for x in inputs.values()), **given.options
        )
        cotangent = given.cotangent[:1, :, :1].expand_as(output)
        results.append({"output": output} | gradients(output, cotangent, inputs))
    assert_near(*results, ORACLE)


@on_devices
def test_weights_of_any_stride(device: str) -> None:
    case = FIXED["ragged"]
    given = op_cases.arguments(case, device)
    expected = outcome(functional, case, given)
    for module in given.options["projection"].modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
    assert_same(outcome(functional, case, given), expected)


@on_devices
def test_packed_gradient(device: str) -> None:
    case = FIXED["grid"]
    given = op_cases.arguments(case, device)
    results = [outcome(functional, replace(case, packed=packed), given) for packed in (False, True)]
    assert results[1]["gradient of qkv"].is_contiguous()
    assert_same(*results)


SIZES = {
    "empty batch": Case(9, 4, 2, batch=0, kind="linear", bias="per head"),
    "empty batch on a grid": Case((4, 5), 2, 3, batch=0, prefix=1),
    "no heads": Case(9, 4, 2, heads=0),
    "no tokens": Case(0, 4, 2, kind="linear-layernorm", bias="per head"),
    "prefix alone": Case(0, 4, 2, prefix=3, kind="linear", log_count=True),
    "one token": Case(1, 4, 3, kind="linear-layernorm", bias="per head"),
    "one token on a grid": Case((1, 1), 7, 2, kind="linear", noise=True),
    "one token and a prefix": Case(1, 7, 4, prefix=1),
    "shorter than the window": Case(5, 1000, 2, overlap=300, bias="per head"),
    "one chunk": Case(13, 4, 10**6, chunk_overlap=10**6, kind="linear"),
    "one head, one sequence": Case(33, 8, 4, batch=1, heads=1, bias="per head"),
    "one column": Case((17, 1), (4, 3), (2, 2), overlap=(1, 2), bias="per head", kind="linear"),
    "many chunks": Case(300, 16, 1, batch=1, kind="linear-layernorm"),
    "wide window": Case(260, 200, 64, overlap=30, batch=1, bias="shared"),
    "enormous sizes": Case(13, 2**61, 2**61, overlap=2**61, chunk_overlap=2**61, kind="linear"),
    "long overlap": Case(40, 2, 3, overlap=15, chunk_overlap=9, kind="linear"),
    "all padding": Case(12, 4, 3, padding=1.0, prefix=1, kind="linear-layernorm", bias="per head"),
}


@on_devices
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, device: str) -> None:
    assert_agree(SIZES[name], device)


# Up to and around multiples of the lengths of vectors, and to 256.
HEAD_DIMS = [*range(1, 10), 12, 15, 16, 17, 20, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 200, 255, 256]


@on_devices
def test_the_largest_integers(device: str) -> None:
    """As window, chunk and overlaps, they do not overflow: one window, one chunk."""
    query, key, value = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64, device=device)
    most = 2**63 - 1
    sizes = {"window_size": most, "chunk_size": most, "overlap": most, "chunk_overlap": most}
    actual = functional.eva_attention(query, key, value, **sizes)
    expected = reference.eva_attention(query, key, value, window_size=9, chunk_size=9)
    torch.testing.assert_close(actual, expected, rtol=ORACLE, atol=ORACLE)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, dtype: torch.dtype, device: str) -> None:
    case = Case(19, 6, 4, overlap=1, prefix=1, head_dim=head_dim, kind="linear", bias="per head", packed=True)
    given, exact = (op_cases.arguments(case, device, x) for x in (dtype, torch.float64))
    actual = {name: x.double() for name, x in outcome(functional, case, given).items()}
    # In float32 a few hundred roundings of 6e-8, of the inputs as well, in sums that partly cancel.
    tolerance = ORACLE if dtype == torch.float64 else 1e-5
    assert_near(actual, outcome(reference, case, exact), tolerance)


PADDED = {
    "plain": Case(21, 6, 4, kind="linear-layernorm"),
    "overlaps": Case(21, 6, 4, overlap=2, chunk_overlap=1, kind="linear", bias="per head", log_count=True),
    "options": Case(21, 6, 4, prefix=1, kind="key-only", bias="shared", exclude=True, noise=True),
    "packed": Case(21, 5, 3, packed=True, exclude=True, log_count=True, landmark_bias=True),
    "tangent": Case(21, 6, 4, overlap=2, kind="tangent", noise=True, landmark_bias=True),
}


@on_devices
@pytest.mark.parametrize("name", PADDED)
def test_padding_at_the_end(name: str, device: str) -> None:
    """A batch with NaN in its padding is each of its sequences alone, in outputs and all gradients."""
    # After none of them does the overlap of a chunk alone hold tokens: it would be a chunk more than alone.
    lengths = [13, 1, 0, 21, 7]
    case = replace(PADDED[name], batch=len(lengths))
    given = op_cases.arguments(case, device)
    tokens = case.num_tokens
    mask = torch.arange(tokens, device=device) >= torch.tensor(lengths, device=device)[:, None]
    qkv = given.inputs["qkv"].detach()
    given.inputs["qkv"] = qkv.masked_fill(mask[:, :, None, None, None], math.nan).requires_grad_()
    given.options["key_padding_mask"] = mask
    batch = outcome(functional, case, given)
    shared = {name: torch.zeros_like(x) for name, x in given.inputs.items() if name != "qkv"}
    for b, length in enumerate(lengths):
        assert not batch["output"][b, :, length:].any()
        assert not batch["gradient of qkv"][b, length:].any()
        if length < case.prefix or length == 0:
            continue
        alone = replace(case, batch=1, size=length - case.prefix)
        options = {**given.options, "key_padding_mask": None}
        for name in ("noise", "landmark_bias"):
            if options[name] is not None:
                options[name] = options[name][b : b + 1, ..., : alone.num_chunks, :] if name == "noise" else (
                    options[name][b : b + 1, : alone.num_chunks]
                )  # fmt: skip
        sequence = Arguments(
            inputs={**given.inputs, "qkv": qkv[b : b + 1, :length].clone().requires_grad_()},
            options=options,
            landmarks=given.landmarks,
            cotangent=given.cotangent[b : b + 1, :, :length],
        )
        found = outcome(functional, alone, sequence)
        in_batch = {
            "output": batch["output"][b : b + 1, :, :length],
            "gradient of qkv": batch["gradient of qkv"][b : b + 1, :length],
        }
        assert_near(in_batch, {name: found[name] for name in in_batch}, EXACT)
        for name in shared:
            shared[name] += found[f"gradient of {name}"]
    # Sums over the batch, so in another order than within it.
    assert_near(batch, {f"gradient of {name}": x for name, x in shared.items()}, ORACLE)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["prefix", "options", "ragged grid", "grid options"])
def test_padding_is_never_read(name: str, fill: float, dtype: torch.dtype, device: str) -> None:
    """Wherever it is and whatever it holds, no bit depends on it."""
    case = FIXED[name]
    given = op_cases.arguments(case, device, dtype)
    clean = outcome(functional, case, given)
    mask = given.options["key_padding_mask"]
    qkv = given.inputs["qkv"].detach().masked_fill(mask[:, :, None, None, None], fill)
    given.inputs["qkv"] = qkv.requires_grad_()
    # What is handed back for padded queries is not read either.
    given.cotangent = given.cotangent.masked_fill(mask[:, None, :, None], fill)
    padded = outcome(functional, case, given)
    assert all(x.isfinite().all() for x in padded.values())
    assert_same(padded, clean)


@on_devices
def test_dropped_landmarks(device: str) -> None:
    """With all landmarks at -inf, window attention is left; with all offsets there as well, zeros."""
    case = Case(10, 3, 2, kind="linear", bias="per head")
    given = op_cases.arguments(case, device)
    given.options["landmark_bias"] = torch.full((2, 5), -math.inf, dtype=torch.float64, device=device)
    options = {"window_size": 3, "relative_bias": given.inputs["relative_bias"]}
    expected = functional.window_attention(*given.qkv(), **options)
    expected = {"output": expected} | gradients(expected, given.cotangent, given.inputs)
    assert_near(outcome(functional, case, given), expected, EXACT)
    with torch.no_grad():
        given.inputs["relative_bias"].fill_(-math.inf)
    assert not any(x.any() for x in outcome(functional, case, given).values())


@pytest.fixture
def threads() -> Any:
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FIXED)
def test_threads_and_repetition_change_no_bit(
    name: str, dtype: torch.dtype, device: str, threads: Any
) -> None:
    case = FIXED[name]
    given = op_cases.arguments(case, device, dtype)
    threads(1)
    expected = outcome(functional, case, given)
    for number in (1, 2, 3, 2):
        threads(number)
        assert_same(outcome(functional, case, given), expected)


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_are_finite(sign: int, kind: str, device: str) -> None:
    """Scores of +-1e4 in float32."""
    case = Case((7, 6), 3, 2, kind=kind, bias="per head", log_count=kind != "tangent", head_dim=16)
    given = op_cases.arguments(case, device, torch.float32)
    with torch.no_grad():
        qkv = given.inputs["qkv"]
        qkv[:, :, 0] = sign * qkv[:, :, 1]
        qkv[:, :, :2] *= (1e4 * 16**0.5 / qkv[:, :, 1].square().sum(-1).max()) ** 0.5
        query, key, _ = given.qkv()
        assert 9e3 < (query @ key.mT).abs().max() * 16**-0.5 < 1.1e4
    found = outcome(functional, case, given)
    assert all(x.isfinite().all() for x in found.values())
    # An average of values is no larger than they.
    assert found["output"].abs().max() <= given.inputs["qkv"][:, :, 2].abs().max() * (1 + 1e-5)


@on_devices
def test_infinite_bias(device: str) -> None:
    """A relative bias of -inf hides a key, which gets no gradient from it."""
    case = Case(12, 4, 3, bias="per head")
    given = op_cases.arguments(case, device)
    with torch.no_grad():
        given.options["relative_bias"][:, 2] = -math.inf
    assert_near(outcome(functional, case, given), outcome(reference, case, given), ORACLE)


@on_devices
@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("is_causal", [False, True])
def test_fewer_key_heads(is_causal: bool, key_heads: int, device: str) -> None:
    """Grouped-query attention: each head of key and value stands for as many heads of query in a row."""
    torch.manual_seed(0)
    query = torch.randn(2, 6, 25, 5, device=device, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, key_heads, 25, 5, device=device, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    repeated = [x.repeat_interleave(6 // key_heads, 1) for x in (key, value)]
    options = {"window_size": 6, "chunk_size": 3, "overlap": 2, "is_causal": is_causal}
    inputs = {"query": query, "key": key, "value": value}
    cotangent = torch.randn_like(query)
    results = []
    for functions, rest in ((functional, (key, value)), (reference, (key, value)), (reference, repeated)):
        output = functions.eva_attention(query, *rest, **options)
        results.append({"output": output} | gradients(output, cotangent, inputs))
    assert_near(results[0], results[2], ORACLE)
    assert_near(results[1], results[2], ORACLE)


def test_one_key_head_is_not_copied() -> None:
    query, key = torch.randn(2, 6, 5, 3), torch.randn(2, 1, 5, 3)
    (expanded,) = functional.expand_heads(query, key)
    assert expanded.shape == query.shape
    assert expanded.data_ptr() == key.data_ptr()
