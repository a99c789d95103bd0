r"""Random-feature attention as softmax attention estimated with control variates, step by step.

Zheng et al., "Efficient Attention via Control Variates" (ICLR 2023), in their notation. With the scale
absorbed into queries and keys, `xi(x, w) = exp(w.x - |x|^2 / 2)` and samples `w_s ~ N(0, I)`, each key m of a
query has

    pi_m = exp(q.k_m) / Z                              its softmax weight, Z = sum_m exp(q.k_m)
    h_m  = mean_s xi(q, w_s) xi(k_m, w_s) / Z          an estimate of it: E[h_m] = pi_m
    g_m  = h_m v_m

and for any coefficients b_m that do not depend on the samples, `sum_m [g_m - b_m (h_m - pi_m)]` is an
unbiased estimate of softmax attention. The same b = g / h for all keys makes it random-feature attention
(`rfa`), and b_m = v_m makes it softmax attention itself, with no variance; EVA takes v_m inside the window
and one coefficient for each chunk of the rest.

Plain PyTorch, written to be read: all but `rfa` are quadratic in the number of tokens. Shapes, of any
floating dtype: `query` [B, H, N_query, D], `key` and `value` [B, H, N_key, D], `omega`, samples of N(0, I),
[S, D], or [B or 1, H or 1, S, D] with samples for each batch and head. `scale`, which must not be negative,
defaults to D ** -0.5.
"""

from torch import Tensor


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """`sum_m pi_m v_m`: what the others estimate (section 2.1 of the paper). [B, H, N_query, D]."""
    return _logits(query, key, scale).softmax(-1) @ value


def rfa(query: Tensor, key: Tensor, value: Tensor, omega: Tensor, *, scale: float | None = None) -> Tensor:
    """Random-feature attention `g / h` with positive features (section 2.2). [B, H, N_query, D].

    The self-normalised estimate, consistent but biased; linear in the number of tokens.
    """
    query_features, key_features, _ = _features(query, key, omega, scale)
    numerator = query_features @ (key_features.mT @ value)
    return numerator / (query_features @ key_features.sum(-2)[..., None])


def control_variate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    omega: Tensor,
    coefficients: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """`sum_m [g_m - b_m (h_m - pi_m)]` with any coefficients b (section 3.1). [B, H, N_query, D].

    `coefficients` broadcast to [B, H, N_query, N_key, D].
    """
    softmax_weights = _logits(query, key, scale).softmax(-1)
    estimated_weights = _estimated_weights(query, key, omega, scale)
    correction = (estimated_weights - softmax_weights)[..., None] * coefficients
    return estimated_weights @ value - correction.sum(-2)


def shared_coefficients(
    query: Tensor, key: Tensor, value: Tensor, omega: Tensor, *, scale: float | None = None
) -> Tensor:
    """The same b = g / h for every key, which makes `control_variate` equal `rfa` (section 3.1).
    [B, H, N_query, 1, D].
    """
    return rfa(query, key, value, omega, scale=scale)[..., None, :]


def optimal_coefficients(value: Tensor) -> Tensor:
    """b_m = v_m, which makes `control_variate` equal `softmax_attention`, whatever the samples (section 3.2).
    [B, H, 1, N_key, D].
    """
    return value[..., None, :, :]


def _absorbed(query: Tensor, key: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not scale >= 0:
        raise ValueError(f"scale must not be negative, got {scale}")
    root = scale**0.5
    return query * root, key * root


def _logits(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    query, key = _absorbed(query, key, scale)
    return query @ key.mT


def _features(
    query: Tensor, key: Tensor, omega: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """xi of queries and keys, [B, H, N, S], but for a factor of each query and one of all keys, which keep
    them finite; and the sum of the two factors' logarithms, [B, H, N_query, 1].
    """
    query_logs, key_logs = (
        x @ omega.mT - x.square().sum(-1, keepdim=True) / 2 for x in _absorbed(query, key, scale)
    )
    query_top, key_top = query_logs.amax(-1, keepdim=True), key_logs.amax((-2, -1), keepdim=True)
    return (query_logs - query_top).exp(), (key_logs - key_top).exp(), query_top + key_top


def _estimated_weights(query: Tensor, key: Tensor, omega: Tensor, scale: float | None) -> Tensor:
    """h, [B, H, N_query, N_key]."""
    query_features, key_features, log_factor = _features(query, key, omega, scale)
    log_normaliser = _logits(query, key, scale).logsumexp(-1, keepdim=True)
    return query_features @ key_features.mT / omega.shape[-2] * (log_factor - log_normaliser).exp()
