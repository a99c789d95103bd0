"""The oracle against the formulas written out token by token, and in the limits where EVA is softmax."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eva_attn import geometry, reference
from eva_attn.functional import draw_dropout_seed
from eva_attn.modules import LandmarkProjection

KINDS = ["linear-layernorm", "linear", "key-only", "identity", "tangent"]
# The oracle sums in another order than what it is compared with; its values are of order 1.
TOLERANCE = 1e-12


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def projection_of(kind: str, head_dim: int, dtype: torch.dtype = torch.float64) -> LandmarkProjection:
    projection = LandmarkProjection(head_dim, kind, dtype=dtype)
    for parameter in projection.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return projection


def token_by_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    window: tuple[int, int],
    chunk: tuple[int, int],
    overlap: tuple[int, int],
    chunk_overlap: tuple[int, int],
    prefix: int,
    is_causal: bool,
    projection: LandmarkProjection,
    noise: Tensor,
    bias: Tensor,
    landmark_bias: Tensor,
    mask: Tensor,
    exclude: bool,
    log_count: bool,
    scale: float,
) -> Tensor:
    """EVA as its definition says, one query at a time; all geometry as pairs, `bias` [H, rows, columns]."""
    batch, heads, num_tokens, _ = query.shape
    output = torch.zeros_like(query)
    place = {prefix + y * grid[1] + x: (y, x) for y in range(grid[0]) for x in range(grid[1])}

    def inside(token: int, box: tuple[int, int], size: tuple[int, int], reach: tuple[int, int]) -> bool:
        return all(
            i * length - beyond <= at < (i + 1) * length + beyond
            for at, i, length, beyond in zip(place[token], box, size, reach, strict=True)
        )

    chunks = [
        (y, x) for y in range(math.ceil(grid[0] / chunk[0])) for x in range(math.ceil(grid[1] / chunk[1]))
    ]
    for b in range(batch):
        valid = [t for t in range(num_tokens) if not mask[b, t]]
        members = [[t for t in place if t in valid and inside(t, c, chunk, chunk_overlap)] for c in chunks]
        for h in range(heads):
            q, k, v = query[b, h], key[b, h], value[b, h]
            landmarks = {}
            for c, tokens in enumerate(members):
                if not tokens:
                    continue
                mean_key, mean_query = k[tokens].mean(0), q[tokens].mean(0)
                landmark_key = projection.key(mean_key) if projection.key else mean_key
                landmark_query = projection.query(mean_query) if projection.query else mean_query
                mu = (1.0 if is_causal else 0.5) * (landmark_query + landmark_key)
                omega = (0 if projection.kind == "key-only" else mu) + noise[b, h, c]
                entropy = 0.0
                if projection.kind == "tangent":
                    p = torch.softmax(scale * (k[tokens] @ (mean_query + noise[b, h, c])), 0)
                    landmark_key, entropy = p @ k[tokens], -(p * p.log()).sum()
                else:
                    p = torch.softmax(scale * (k[tokens] @ omega - (k[tokens] ** 2).sum(-1) / 2), 0)
                landmarks[c] = landmark_key, p @ v[tokens], entropy
            for i in valid:
                box = (
                    tuple(at // length for at, length in zip(place[i], window, strict=True))
                    if i >= prefix
                    else None
                )
                seen = [j for j in valid if i < prefix or j < prefix or inside(j, box, window, overlap)]
                logits, values = [], []
                for j in seen:
                    if is_causal and j > i:
                        continue
                    logit = scale * q[i] @ k[j]
                    if i >= prefix and j >= prefix:
                        dy, dx = (a - b for a, b in zip(place[j], place[i], strict=True))
                        logit = (
                            logit + bias[h, dy + window[0] + overlap[0] - 1, dx + window[1] + overlap[1] - 1]
                        )
                    logits.append(logit)
                    values.append(v[j])
                for c, (landmark_key, landmark_value, entropy) in landmarks.items():
                    if i < prefix or (is_causal and c >= i // chunk[1]):
                        continue
                    if exclude and all(inside(t, box, window, overlap) for t in members[c]):
                        continue
                    logit = scale * q[i] @ landmark_key + landmark_bias[b, c] + entropy
                    logits.append(logit + (math.log(len(members[c])) if log_count else 0))
                    values.append(landmark_value)
                if logits:
                    output[b, h, i] = torch.softmax(torch.stack(logits), 0) @ torch.stack(values)
    return output


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    two_d, is_causal = seed % 3 == 1, seed % 3 == 2
    grid = (rng.randint(1, 5), rng.randint(1, 5)) if two_d else (1, rng.randint(1, 17))
    prefix = 0 if is_causal else rng.choice([0, 2])
    window = (rng.randint(1, 4), rng.randint(1, 4)) if two_d else (1, rng.choice([2, 4, 6]))
    chunk = (
        (rng.randint(1, 3), rng.randint(1, 3))
        if two_d
        else (1, rng.choice([1, 2]) if is_causal else rng.randint(1, 5))
    )
    overlap = (rng.randint(0, 2), rng.randint(0, 2)) if two_d else (0, rng.randint(0, 3))
    chunk_overlap = (
        (rng.randint(0, 1), rng.randint(0, 2)) if two_d else (0, 0 if is_causal else rng.randint(0, 2))
    )
    num_tokens, num_chunks = prefix + grid[0] * grid[1], math.prod(geometry.chunk_grid(grid, chunk))
    batch, heads, dim = 2, rng.randint(1, 2), rng.randint(1, 6)
    query, key, value = torch.randn(3, batch, heads, num_tokens, dim, dtype=torch.float64)
    noise = torch.randn(batch, heads, num_chunks, dim, dtype=torch.float64)
    bias = torch.randn(
        heads, *(2 * (w + e) - 1 for w, e in zip(window, overlap, strict=True)), dtype=torch.float64
    )
    landmark_bias = torch.randn(batch, num_chunks, dtype=torch.float64)
    mask = torch.rand(batch, num_tokens) < rng.choice([0.0, 0.4])
    projection = projection_of(KINDS[seed % 5], dim)
    exclude, log_count, scale = rng.random() < 0.5, rng.random() < 0.5, 0.7
    log_count = log_count and projection.kind != "tangent"

    options = {
        "window_size": window if two_d else window[1],
        "chunk_size": chunk if two_d else chunk[1],
        "overlap": overlap if two_d else overlap[1],
        "chunk_overlap": chunk_overlap if two_d else chunk_overlap[1],
        "grid_size": grid if two_d else None,
        "num_prefix_tokens": prefix,
        "is_causal": is_causal,
        "projection": projection,
        "noise": noise,
        "relative_bias": bias if two_d else bias[:, 0],
        "landmark_bias": landmark_bias,
        "key_padding_mask": mask,
        "exclude_window_landmarks": exclude,
        "log_count_bias": log_count,
        "scale": scale,
    }
    actual = reference.eva_attention(query, key, value, **options)
    expected = token_by_token(
        query,
        key,
        value,
        grid=grid,
        window=window,
        chunk=chunk,
        overlap=overlap,
        chunk_overlap=chunk_overlap,
        prefix=prefix,
        is_causal=is_causal,
        projection=projection,
        noise=noise,
        bias=bias,
        landmark_bias=landmark_bias,
        mask=mask,
        exclude=exclude,
        log_count=log_count,
        scale=scale,
    )
    assert_equal(actual, expected)
    qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], 2)
    assert torch.equal(reference.eva_attention_qkvpacked(qkv, **options), actual)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 18, "chunk_size": 4},
        {"window_size": 100, "chunk_size": 5, "chunk_overlap": 2},
        {"window_size": 5, "chunk_size": 1, "overlap": 1},
        {"window_size": 4, "chunk_size": 1, "num_prefix_tokens": 3},
        {"window_size": 4, "chunk_size": 1, "is_causal": True},
        {"window_size": (3, 6), "chunk_size": (2, 4), "grid_size": (3, 6)},
        {"window_size": (2, 4), "chunk_size": 1, "grid_size": (3, 6), "overlap": (0, 1)},
        {"window_size": 2, "chunk_size": 1, "grid_size": (3, 5), "num_prefix_tokens": 3},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_exact_limits(options: dict, masked: bool) -> None:
    """One window, or chunks of one token: softmax attention."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 18, 5, dtype=torch.float64)
    mask = torch.zeros(2, 18, dtype=torch.bool)
    if masked:
        mask[0, 11:], mask[1, 4] = True, True
    attended = ~mask[:, None, None, :] & torch.ones(18, 18, dtype=torch.bool)
    if options.get("is_causal"):
        attended = attended.tril()
    expected = F.scaled_dot_product_attention(query, key, value, attended).masked_fill(
        mask[:, None, :, None], 0.0
    )
    actual = reference.eva_attention(
        query,
        key,
        value,
        **options,
        key_padding_mask=mask if masked else None,
        exclude_window_landmarks=True,
        log_count_bias=True,
    )
    assert_equal(actual, expected)


def test_padding_is_never_read_and_gets_no_gradient() -> None:
    torch.manual_seed(0)
    lengths = [9, 1, 0, 13]
    mask = torch.arange(13) >= torch.tensor(lengths)[:, None]
    clean = torch.randn(3, 4, 2, 13, 4, dtype=torch.float64)
    padded = clean.masked_fill(mask[None, :, None, :, None], math.nan).requires_grad_()
    options = {"window_size": 4, "chunk_size": 3, "overlap": 1, "projection": projection_of("linear", 4)}
    output = reference.eva_attention(*padded, **options, key_padding_mask=mask)
    (gradient,) = torch.autograd.grad(output.sum(), padded)
    for b, length in enumerate(lengths):
        assert not output[b, :, length:].any()
        assert not gradient[:, b, :, length:].any()
        if length:
            alone = clean[:, b : b + 1, :, :length].clone().requires_grad_()
            expected = reference.eva_attention(*alone, **options)
            assert_equal(output[b : b + 1, :, :length], expected)
            (expected_gradient,) = torch.autograd.grad(expected.sum(), alone)
            assert_equal(gradient[:, b : b + 1, :, :length], expected_gradient)


def test_dropped_landmarks() -> None:
    """-inf as landmark bias drops; with all dropped, window attention is left."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 10, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    options = {"window_size": 3, "chunk_size": 2}
    dropped = torch.full((1, 5), -math.inf, dtype=torch.float64)
    output = reference.eva_attention(query, key, value, **options, landmark_bias=dropped)
    assert_equal(output, reference.window_attention(query, key, value, window_size=3))
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), (query, key, value)))


def test_halves_make_the_whole() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 14, 4, dtype=torch.float64)
    geometry_options = {"chunk_size": (2, 2), "grid_size": (3, 4), "num_prefix_tokens": 2, "chunk_overlap": 1}
    landmarks = reference.chunk_summary(query, key, value, **geometry_options)
    assert [tuple(x.shape) for x in landmarks] == [(2, 2, 4, 4)] * 2
    output = reference.window_attention(query, key, value, *landmarks, window_size=2, **geometry_options)
    assert_equal(output, reference.eva_attention(query, key, value, window_size=2, **geometry_options))


def test_mean_divisor() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 7, 4, dtype=torch.float64)
    landmark_key, _ = reference.chunk_summary(query, key, value, chunk_size=3, mean_divisor=5)
    assert_equal(landmark_key[:, :, 2], key[:, :, 6] / 5)


@pytest.mark.parametrize("kind", KINDS)
def test_differentiable_twice(kind: str) -> None:
    torch.manual_seed(0)
    projection = projection_of(kind, 3)
    bias = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:], mask[1] = True, True

    def attention(*inputs: Tensor) -> Tensor:
        return reference.eva_attention(
            *inputs[:3],
            window_size=2,
            chunk_size=2,
            overlap=1,
            projection=projection,
            relative_bias=inputs[3],
            key_padding_mask=mask,
        )

    inputs = (*(torch.randn(2, 2, 6, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)), bias)
    inputs += tuple(projection.parameters())
    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(attention, inputs, fast_mode=True)


def test_noise_and_landmark_bias_get_no_gradient() -> None:
    query, key, value = torch.randn(3, 1, 1, 6, 4, requires_grad=True)
    noise = torch.randn(1, 1, 3, 4, requires_grad=True)
    landmark_bias = torch.randn(1, 3, requires_grad=True)
    output = reference.eva_attention(
        query, key, value, window_size=2, chunk_size=2, noise=noise, landmark_bias=landmark_bias
    )
    assert torch.autograd.grad(output.sum(), (noise, landmark_bias), allow_unused=True) == (None, None)


def test_unused_causal_bias_gets_zero_gradient() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 12, 4)
    bias = torch.randn(1, 2 * (4 + 2) - 1, requires_grad=True)
    options = {"window_size": 4, "chunk_size": 2, "overlap": 2, "is_causal": True}
    output = reference.eva_attention(query, key, value, **options, relative_bias=bias)
    (gradient,) = torch.autograd.grad(output.square().sum(), bias)
    assert gradient[0, :6].all()
    assert not gradient[0, 6:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """Half precision is rounded at the landmarks and the output alone."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3, 2, 8).to(dtype)
    options = {
        "window_size": 4,
        "chunk_size": 2,
        "noise": torch.randn(2, 2, 5, 8),
        "relative_bias": torch.randn(2, 7),
    }
    output = reference.eva_attention_qkvpacked(
        qkv, **options, projection=projection_of("linear", 8, torch.float32)
    )
    assert output.dtype == dtype
    assert output.shape == (2, 2, 9, 8)
    assert output.transpose(1, 2).is_contiguous()
    torch.manual_seed(0)
    exact = reference.eva_attention_qkvpacked(
        torch.randn(2, 9, 3, 2, 8).to(dtype).double(),
        **{name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()},
    )
    assert exact.dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 1, 1, 1), (1, 1, 3, 4)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    query, key, value = torch.randn(3, *shape)
    for options in ({}, {"exclude_window_landmarks": True, "log_count_bias": True}):
        assert (
            reference.eva_attention(query, key, value, window_size=7, chunk_size=2, **options).shape == shape
        )


def test_prefix_alone() -> None:
    query, key, value = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64)
    output = reference.eva_attention(query, key, value, window_size=7, chunk_size=2, num_prefix_tokens=3)
    assert_equal(output, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """Known answers of Salmon et al.'s Random123 library."""
    seed = key[1] << 32 | key[0]
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    assert tuple(int(w) for w in reference.philox4x32(seed, [torch.tensor(c) for c in counter])) == words


def test_dropout_numbers_are_those_of_their_entry() -> None:
    seed = torch.tensor(1234567890123456789)
    uniform = reference.philox_uniform(seed, torch.Size((2, 3, 4, 6)))
    b, h, i, m = 1, 2, 3, 5
    words = reference.philox4x32(seed, [torch.tensor(c) for c in (m // 4, i, b * 3 + h, 0)])
    assert uniform[b, h, i, m] == words[m % 4] / 2**32


def test_dropout() -> None:
    """Weights are dropped after the softmax by the seed that torch's generator gives, and the rest scaled."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 1, 12, 12, dtype=torch.float64)
    value = torch.eye(12, dtype=torch.float64).expand(2, 1, 12, 12)  # the output is the weights
    generator = torch.get_rng_state()
    output = reference.window_attention(query, key, value, window_size=12, dropout_p=0.4)
    torch.set_rng_state(generator)
    uniform = reference.philox_uniform(draw_dropout_seed(query.device), output.shape)
    weights = reference.window_attention(query, key, value, window_size=12)
    assert_equal(output, torch.where(uniform >= 0.4, weights / 0.6, 0.0))


def test_bucket_counts() -> None:
    assert [geometry.t5_num_buckets(reach) for reach in (1, 16, 64, 128, 1000)] == [16, 16, 32, 64, 64]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("reach", [1, 4, 8, 12, 49, 200])
def test_t5_buckets(reach: int, is_causal: bool) -> None:
    num_buckets = geometry.t5_num_buckets(reach)
    offsets = range(1 - reach, reach)
    expected = []
    for d in offsets:
        half = num_buckets if is_causal else num_buckets // 2
        base = half if d > 0 and not is_causal else 0
        n = max(-d, 0) if is_causal else abs(d)
        m = half // 2
        far = m + math.floor(math.log(n / m) / math.log(reach / m) * (half - m)) if n >= m else 0
        expected.append(base + (n if n < m else min(half - 1, far)))
    assert geometry.t5_buckets(torch.tensor(offsets), num_buckets, reach, is_causal).tolist() == expected


@pytest.mark.parametrize(
    ("grid", "chunk", "overlap"),
    [((1, 11), (1, 3), (0, 0)), ((1, 11), (1, 3), (0, 4)), ((5, 7), (2, 3), (1, 2))],
)
def test_chunk_token_counts(grid: tuple[int, int], chunk: tuple[int, int], overlap: tuple[int, int]) -> None:
    torch.manual_seed(0)
    padding = torch.rand(3, *grid) < 0.4
    device = torch.device("cpu")
    member = reference._valid_members(grid, chunk, overlap, 0, padding.flatten(1), device)
    assert torch.equal(geometry.chunk_token_counts(grid, chunk, overlap, padding, device), member.sum(-1))
    member = reference._valid_members(grid, chunk, overlap, 0, None, device)
    assert torch.equal(geometry.chunk_token_counts(grid, chunk, overlap, None, device), member[0].sum(-1))


@pytest.mark.parametrize(
    ("num_tokens", "num_landmarks", "length", "side"),
    [(196, 49, 4, 2), (784, 49, 16, 4), (48, 49, 1, 1), (0, 4, 1, 1), (63, 7, 9, 3), (62, 7, 8, 2)],
)
def test_default_chunk_size(num_tokens: int, num_landmarks: int, length: int, side: int) -> None:
    assert geometry.default_chunk_size((1, num_tokens), num_landmarks, two_d=False) == length
    assert geometry.default_chunk_size((1, num_tokens), num_landmarks, two_d=True) == side


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"window_size": (2, 2)}, ValueError, ["window_size", "(2, 2)", "int"]),
        ({"chunk_size": (2, 2)}, ValueError, ["chunk_size", "(2, 2)", "int"]),
        (
            {"grid_size": (2, 4), "window_size": (2, 2, 2)},
            ValueError,
            ["window_size", "(2, 2, 2)", "(height, width)"],
        ),
        ({"grid_size": (8,)}, ValueError, ["grid_size", "(8,)", "(height, width)"]),
        ({"grid_size": 8}, TypeError, ["grid_size", "8", "(height, width)"]),
        ({"window_size": 2.5}, TypeError, ["window_size", "2.5", "int"]),
        ({"grid_size": (2, 4), "overlap": (1, 0.5)}, TypeError, ["overlap", "(1, 0.5)", "int"]),
    ],
)
def test_sizes_that_are_no_sizes(options: dict, error: type[Exception], words: list[str]) -> None:
    query, key, value = torch.randn(3, 1, 1, 8, 4)
    with pytest.raises(error) as raised:
        reference.eva_attention(query, key, value, **{"window_size": 4, "chunk_size": 2, **options})
    assert all(word in str(raised.value) for word in words)


def test_composes_with_torch_func() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 1, 2, 6, 3, dtype=torch.float64)
    projection = LandmarkProjection(3, dtype=torch.float64)

    def attention(query: Tensor) -> Tensor:
        return reference.eva_attention(
            query, query, query, window_size=3, chunk_size=2, projection=projection
        ).sin()

    torch.testing.assert_close(torch.func.vmap(attention)(query), torch.stack([attention(x) for x in query]))
    forward = torch.func.jacfwd(torch.func.jacrev(lambda x: attention(x).sum()))(query[0])
    reverse = torch.autograd.functional.hessian(lambda x: attention(x).sum(), query[0])
    torch.testing.assert_close(forward, reverse)
