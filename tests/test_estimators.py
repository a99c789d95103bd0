"""The steps from random-feature attention to softmax attention, as equations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
