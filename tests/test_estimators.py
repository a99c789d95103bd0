"""The steps from random-feature attention to softmax attention, as equations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import eva_attn
from eva_attn import estimators

# Both sides are float64 sums of the same few hundred terms in another order, of order 1.
TOLERANCE = 1e-12


@pytest.fixture(params=[None, 0.3], ids=["default", "scale"])
def scale(request: pytest.FixtureRequest) -> float | None:
    return request.param


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 7, 8), (2, 3, 11, 8), (2, 3, 11, 8), (5, 8)
    query, key, value, omega = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return query, key, value, omega


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_softmax_is_torchs(tensors, scale):
    query, key, value, _ = tensors
    expected = F.scaled_dot_product_attention(query, key, value, scale=scale)
    assert_equal(estimators.softmax_attention(query, key, value, scale=scale), expected)


def test_rfa_is_its_formula(tensors, scale):
    query, key, value, omega = tensors
    root = (8**-0.5 if scale is None else scale) ** 0.5

    def xi(x: Tensor, w: Tensor) -> Tensor:
        return torch.exp(root * (x @ w) - root**2 * x.square().sum(-1) / 2)

    weights = sum(xi(query, w)[..., :, None] * xi(key, w)[..., None, :] for w in omega)
    expected = weights @ value / weights.sum(-1, keepdim=True)
    assert_equal(estimators.rfa(query, key, value, omega, scale=scale), expected)


def test_shared_coefficients_make_it_rfa(tensors, scale):
    query, key, value, omega = tensors
    shared = estimators.shared_coefficients(query, key, value, omega, scale=scale)
    actual = estimators.control_variate(query, key, value, omega, shared, scale=scale)
    assert_equal(actual, estimators.rfa(query, key, value, omega, scale=scale))


def test_optimal_coefficients_make_it_softmax(tensors, scale):
    query, key, value, omega = tensors
    optimal = estimators.optimal_coefficients(value)
    actual = estimators.control_variate(query, key, value, omega, optimal, scale=scale)
    assert_equal(actual, estimators.softmax_attention(query, key, value, scale=scale))


def test_features_stay_finite(tensors):
    query, key, value, omega = tensors
    output = estimators.rfa(query * 100, key * 100, value, omega)
    assert output.isfinite().all()


def test_negative_scale_is_refused(tensors):
    query, key, value, omega = tensors
    with pytest.raises(ValueError, match=r"scale must not be negative, got -1"):
        estimators.rfa(query, key, value, omega, scale=-1)


def test_fixed_coefficients_leave_no_bias():
    """Means over many draws lie as near to softmax as their spread allows; those of `rfa` do not."""
    draws, samples = 20_000, 2
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    query, key, value = normal(1, 1, 3, 4), normal(1, 1, 5, 4), normal(1, 1, 5, 4)
    omega, coefficients = normal(draws, 1, samples, 4), normal(1, 1, 3, 5, 4)
    expected = estimators.softmax_attention(query, key, value)

    def largest_deviation(estimates: Tensor) -> float:
        """In standard errors, over 12 values."""
        return ((estimates.mean(0) - expected) / (estimates.std(0) / draws**0.5)).abs().max().item()

    # Of 12 normally distributed values one lies beyond 5 once in 140,000 times.
    assert largest_deviation(estimators.control_variate(query, key, value, omega, coefficients)) < 5
    assert largest_deviation(estimators.rfa(query, key, value, omega)) > 10


@pytest.fixture
def chunks() -> tuple[Tensor, Tensor]:
    """Which of 12 tokens chunks of 2 hold, and which are in a query's window of 4."""
    position = torch.arange(12)
    return position // 2 == torch.arange(6)[:, None], position[:, None] // 4 == position // 4


@pytest.fixture
def sequence() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 3, 12, 8, dtype=torch.float64, generator=generator) for _ in "qkv")
    return query, key, value


def test_eva_is_a_choice_of_coefficients(sequence, chunks, scale):
    query, key, value = sequence
    member, exact = chunks
    omega = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weights = estimators.sample_weights(key, omega, member, scale=scale)
    of_chunks = member.double().mT @ (weights @ value)  # beta_c for each key
    coefficients = torch.where(exact[..., None], value[:, :, None], of_chunks[:, :, None])
    # Only where no chunk lies across the window's edge does each key have one coefficient.
    expected = estimators.control_variate(query, key, value, omega, coefficients, scale=scale)
    mass = estimators.log_mass(query, key, member, exact, scale=scale)
    assert_equal(estimators.eva(query, key, value, exact, weights, mass, scale=scale), expected)


@pytest.mark.parametrize("partition", [False, True])
def test_eva_is_the_operators(sequence, chunks, scale, partition):
    query, key, value = sequence
    member, exact = chunks
    root = (8**-0.5 if scale is None else scale) ** 0.5
    means = member / member.sum(-1, keepdim=True, dtype=torch.float64)
    omega = root * (means @ query + means @ key) / 2
    weights = estimators.sample_weights(key, omega, member, scale=scale)
    if partition:
        mass = estimators.evidence_bound(query, key, means, scale=scale)
        mass = mass.masked_fill(estimators.log_mass(query, key, member, exact).isneginf(), -torch.inf)
    else:
        mass = root**2 * query @ (means @ key).mT
    actual = estimators.eva(query, key, value, exact, weights, mass, scale=scale)
    options = {"exclude_window_landmarks": partition, "log_count_bias": partition, "scale": scale}
    expected = eva_attn.eva_attention(query, key, value, window_size=4, chunk_size=2, **options)
    assert_equal(actual, expected)


def test_evidence_bound_touches_the_mass_at_its_reference(sequence, chunks, scale):
    query, key, _ = sequence
    member, _ = chunks
    nothing = torch.zeros(12, 12, dtype=torch.bool)
    mass = estimators.log_mass(query, key, member, nothing, scale=scale)
    for i in range(12):
        reference = query[:, :, i : i + 1]
        weights = estimators.tangent_weights(reference, key, member, scale=scale)
        bound = estimators.evidence_bound(query, key, weights, scale=scale)
        assert_equal(bound[:, :, i], mass[:, :, i])
        assert (bound <= mass + TOLERANCE).all()


def test_orthogonal_samples_are_orthogonal_and_normal():
    generator = torch.Generator().manual_seed(4)
    samples = estimators.orthogonal_samples(9, 4, generator=generator)
    assert samples.shape == (9, 4)
    assert estimators.orthogonal_samples(9, 4, device="meta").is_meta
    products = samples[:4] @ samples[:4].mT
    torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-5)
    many = torch.stack([estimators.orthogonal_samples(4, 4, generator=generator) for _ in range(5000)])
    # Of 20,000 values in 4 columns; standard errors are 0.007 and 0.01.
    assert many.flatten(0, 1).mean(0).abs().max() < 0.04
    assert (many.flatten(0, 1).mT.cov() - torch.eye(4)).abs().max() < 0.06
