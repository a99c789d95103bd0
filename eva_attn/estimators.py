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
and one coefficient for each chunk of the rest, whose mass sum exp(q.k_m) it replaces by one exponential.

Plain PyTorch, written to be read: all but `rfa` are quadratic in the number of tokens. Shapes, of any
floating dtype: `query` [B, H, N_query, D], `key` and `value` [B, H, N_key, D], `omega`, samples of N(0, I),
[S, D], or [B or 1, H or 1, S, D] with samples for each batch and head; bool `member` [C, N_key], the keys of
each chunk, and `exact` [N_query, N_key], those that a query attends to one by one. `scale`, which must not be
negative, defaults to D ** -0.5.
"""

import torch
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


def orthogonal_samples(
    num_samples: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples of N(0, I), orthogonal in blocks of `dim` (Choromanski et al., 2021). [num_samples, dim]."""

    def normal() -> Tensor:
        return torch.randn(dim, dim, generator=generator, device=device)

    blocks = []
    for _ in range(0, num_samples, dim):
        directions, triangle = torch.linalg.qr(normal())
        directions = directions * triangle.diagonal().sign()  # makes them uniformly distributed
        lengths = normal().norm(dim=0)
        blocks.append((directions * lengths).mT)
    return torch.cat(blocks)[:num_samples]


def sample_weights(key: Tensor, omega: Tensor, member: Tensor, *, scale: float | None = None) -> Tensor:
    """`xi(k_m, w_c)` over its sum in chunk c, for one sample w_c of each chunk: what makes beta_c of the
    chunk's values (section 4). [B, H, C, N_key], 0 outside the chunk.
    """
    _, key = _absorbed(key, key, scale)
    logits = omega @ key.mT - key.square().sum(-1)[..., None, :] / 2
    return logits.masked_fill(~member, -torch.inf).softmax(-1)


def tangent_weights(reference: Tensor, key: Tensor, member: Tensor, *, scale: float | None = None) -> Tensor:
    """Softmax attention of a reference query, [B, H, C or 1, D], within each chunk. [B, H, C, N_key].

    With these weights `evidence_bound` is the tangent of the chunk's log mass at that query.
    """
    return _logits(reference, key, scale).masked_fill(~member, -torch.inf).softmax(-1)


def log_mass(
    query: Tensor, key: Tensor, member: Tensor, exact: Tensor, *, scale: float | None = None
) -> Tensor:
    """`log sum exp(q.k_m)` over the keys of each chunk that are not exact. [B, H, N_query, C].

    -inf where there are none, or where the sum is nothing beside the query's largest exponential.
    """
    logits = _logits(query, key, scale)
    largest = logits.amax(-1, keepdim=True)
    exponentials = (logits - largest).exp().masked_fill(exact, 0.0)
    return (exponentials @ member.mT.to(key.dtype)).log() + largest


def evidence_bound(query: Tensor, key: Tensor, weights: Tensor, *, scale: float | None = None) -> Tensor:
    """`q.sum_m p_m k_m + H(p)`, which never exceeds a chunk's log mass, for any weights p, [B, H, C, N_key].
    [B, H, N_query, C].

    Equal where p = softmax(q.k); with the same weight for each of a chunk's keys, the mean key's logit plus
    the logarithm of their number.
    """
    return _logits(query, weights @ key, scale) + torch.special.entr(weights).sum(-1)[..., None, :]


def eva(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    exact: Tensor,
    weights: Tensor,
    log_mass: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """One softmax over the exact keys and the chunks (section 4). [B, H, N_query, D].

    `control_variate` with b_m = v_m for the exact keys and beta_c = `weights @ value` for those of chunk c,
    if `log_mass`, [B, H, N_query, C], is the function of that name; the paper has `q.k~_c` in its place.
    """
    logits = _logits(query, key, scale).masked_fill(~exact, -torch.inf)
    joint = torch.cat([logits, log_mass], -1).softmax(-1)
    return joint @ torch.cat([value, weights @ value], -2)


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
