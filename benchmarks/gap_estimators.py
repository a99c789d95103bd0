"""What `benchmarks.gap` compares with softmax attention, and how many operations each needs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

import eva_attn
from eva_attn import LandmarkProjection, estimators
from eva_attn.geometry import chunk_grid

from .cases import Case, Pair, eva_flops, softmax_flops, window_flops


@dataclass
class Problem:
    """Queries, keys and values [B, H, N, D] of a layer, and how their tokens lie in windows and chunks."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    case: Case

    @cached_property
    def softmax(self) -> Tensor:
        return estimators.softmax_attention(self.query, self.key, self.value)

    @cached_property
    def exact(self) -> Tensor:
        """Whether two tokens share a window: [N, N]."""
        window = self._block_of(self.case.window)
        return window[:, None] == window

    @cached_property
    def member(self) -> Tensor:
        """Whether a token is in a chunk: [C, N]."""
        chunks = torch.arange(self.case.landmarks, device=self.query.device)
        return self._block_of(self.case.chunk) == chunks[:, None]

    @cached_property
    def in_window(self) -> Tensor:
        """Whether a token's window holds all of a chunk: [N, C]."""
        return ~((~self.exact).float() @ self.member.float().mT).bool()

    @cached_property
    def mean(self) -> Tensor:
        """The weights that take the mean of each chunk: [C, N]."""
        return self.member / self.member.sum(-1, keepdim=True)

    def _block_of(self, block: Pair) -> Tensor:
        """The block that each token of the grid lies in: [N]."""
        grid, device = self.case.grid, self.query.device
        rows, columns = (torch.arange(n, device=device) // size for n, size in zip(grid, block, strict=True))
        return (rows[:, None] * chunk_grid(grid, block)[1] + columns).flatten()


def deviations(problem: Problem) -> list[float]:
    """Of the logits of a query in a chunk: median, 90th and 99.9th percentile over queries and chunks."""
    logits = problem.query @ problem.key.mT * problem.query.shape[-1] ** -0.5
    variance = logits.square() @ problem.mean.mT - (logits @ problem.mean.mT).square()
    ordered = variance.clamp_min(0).sqrt().flatten().sort().values
    return [round(ordered[int(q * (len(ordered) - 1))].item(), 2) for q in (0.5, 0.9, 0.999)]


Estimate = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Estimator:
    """`estimate` makes the output [B, H, N, D], of `flops` operations for a head of one sequence."""

    name: str
    estimate: Estimate
    flops: float
    samples: int | None = None


# Reference queries, about which a chunk's log mass is expanded.


def zero(problem: Problem) -> Tensor:
    return torch.zeros_like(problem.query[:, :, :1])


def mean_query(problem: Problem) -> Tensor:
    return problem.query.mean(-2, keepdim=True)


def chunk_mean_query(problem: Problem) -> Tensor:
    return problem.mean @ problem.query


def coarse_query(problem: Problem) -> Tensor:
    """For each chunk the mean of the queries that look at it, by attention among the chunks' means."""
    query, key = problem.mean @ problem.query, problem.mean @ problem.key
    counts = problem.member.sum(-1)
    first = problem.member.int().argmax(-1)
    logits = query @ key.mT * query.shape[-1] ** -0.5 + counts.log()
    logits = logits.masked_fill(problem.in_window[first], -1e4)  # finite, for where it hides all chunks
    attention = logits.softmax(-1) * counts[:, None]
    return (attention / attention.sum(-2, keepdim=True)).mT @ query


REFERENCES = {
    "0": zero,
    "chunk's mean query": chunk_mean_query,
    "mean query": mean_query,
    "coarse attention": coarse_query,
}


def tangent(problem: Problem, reference: Estimate) -> Tensor:
    """Landmark keys, values and log masses by the softmax weights of a reference query in each chunk."""
    return bounded(problem, estimators.tangent_weights(reference(problem), problem.key, problem.member))


def tangent_value(problem: Problem, reference: Estimate) -> Tensor:
    """`tangent` in the values alone: mean keys, and counts for the entropy."""
    weights = estimators.tangent_weights(reference(problem), problem.key, problem.member)
    mean = problem.mean.expand_as(weights)
    return _with_window(problem, weights, estimators.evidence_bound(problem.query, problem.key, mean))


def tangent_with_counts(problem: Problem, reference: Estimate) -> Tensor:
    """`tangent` with counts for the entropy."""
    weights = estimators.tangent_weights(reference(problem), problem.key, problem.member)
    logits = problem.query @ (weights @ problem.key).mT * problem.query.shape[-1] ** -0.5
    return _with_window(problem, weights, logits + problem.member.sum(-1).log())


def bounded(problem: Problem, weights: Tensor) -> Tensor:
    """Landmark keys, values and log masses by any weights in each chunk, [B, H, C, N]."""
    return _with_window(problem, weights, estimators.evidence_bound(problem.query, problem.key, weights))


def second_order(
    problem: Problem,
    reference: Estimate,
    strength: float = 1.0,
    diagonal: bool = False,
    frozen: bool = False,
) -> Tensor:
    """`tangent` with half the variance of (q - reference).k in the chunk, times `strength`, in the log mass.

    `diagonal`: only the diagonal of the keys' covariance. `frozen`: the term goes on linearly once the
    deviation exceeds sqrt(2 log n), as the log mass of n normal logits does (Derrida's random energy model,
    1981), n = exp(entropy) being the effective number of tokens.
    """
    key, scale = problem.key, problem.query.shape[-1] ** -0.5
    weights = estimators.tangent_weights(reference(problem), key, problem.member)
    offset = (problem.query - reference(problem)) * scale
    if diagonal:
        variance = offset.square() @ (weights @ key.square() - (weights @ key).square()).mT
    else:
        variance = (offset @ key.mT).square() @ weights.mT - (offset @ (weights @ key).mT).square()
    variance = variance.clamp_min(0)
    term = variance / 2
    if frozen:
        entropy = torch.special.entr(weights).sum(-1)[..., None, :]
        beyond = (2 * entropy * variance).sqrt() - entropy
        term = torch.where(variance < 2 * entropy, term, beyond)
    log_mass = estimators.evidence_bound(problem.query, key, weights) + strength * term
    return _with_window(problem, weights, log_mass)


def exact_mass(problem: Problem, weights: Tensor) -> Tensor:
    """The error that a chunk's value alone makes."""
    mass = estimators.log_mass(problem.query, problem.key, problem.member, problem.exact)
    return _with_window(problem, weights, mass)


def sample_weights(problem: Problem) -> Tensor:
    """Those of EVA with the identity projection."""
    omega = (chunk_mean_query(problem) + problem.mean @ problem.key) / 2
    return estimators.sample_weights(problem.key, omega * problem.query.shape[-1] ** -0.25, problem.member)


def _with_window(problem: Problem, weights: Tensor, log_mass: Tensor) -> Tensor:
    log_mass = log_mass.masked_fill(problem.in_window, -torch.inf)
    return estimators.eva(problem.query, problem.key, problem.value, problem.exact, weights, log_mass)


def shipped(
    problem: Problem,
    projections: list[LandmarkProjection] | None = None,
    noise: bool = False,
    **options: bool,
) -> Tensor:
    """`eva_attn.eva_attention`, with the projection of each layer."""
    batch, heads, _, dim = problem.query.shape
    size = batch, heads, problem.case.landmarks, dim
    return eva_attn.eva_attention(
        problem.query,
        problem.key,
        problem.value,
        **problem.case.geometry(),
        projection=projections[problem.layer] if projections else None,
        noise=torch.randn(size, device=problem.query.device) if noise else None,
        **options,
    )


def window_only(problem: Problem) -> Tensor:
    return eva_attn.functional.window_attention(
        problem.query, problem.key, problem.value, **problem.case.geometry()
    )


def chunk_means(problem: Problem) -> Tensor:
    """Attention to the means of chunks, weighted by their sizes, without a window."""
    key, value = problem.mean @ problem.key, problem.mean @ problem.value
    logits = problem.query @ key.mT * key.shape[-1] ** -0.5 + problem.member.sum(-1).log()
    return logits.softmax(-1) @ value


def mean_value(problem: Problem) -> Tensor:
    return problem.value.mean(-2, keepdim=True).expand_as(problem.value)


def rfa(problem: Problem, samples: int, orthogonal: bool = False) -> Tensor:
    make = estimators.orthogonal_samples if orthogonal else torch.randn
    omega = make(samples, problem.query.shape[-1], device=problem.query.device)
    return estimators.rfa(problem.query, problem.key, problem.value, omega)


def nystrom(problem: Problem) -> Tensor:
    """Nystromformer (Xiong et al., 2021), its landmarks the means of the chunks.

    Its iterative pseudo-inverse also damps small singular values.
    """
    query, key = problem.mean @ problem.query, problem.mean @ problem.key
    scale = key.shape[-1] ** -0.5
    left = (problem.query @ key.mT * scale).softmax(-1)
    middle = (query @ key.mT * scale).softmax(-1)
    right = (query @ problem.key.mT * scale).softmax(-1)
    identity = torch.eye(middle.shape[-1], device=middle.device)
    norm = middle.sum(-2).amax(-1) * middle.sum(-1).amax(-1)
    inverse = middle.mT / norm[..., None, None]
    for _ in range(6):
        product = middle @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = inverse @ (13 * identity - product @ inner) / 4
    return left @ (inverse @ (right @ problem.value))


OFFICIAL = {"exclude_window_landmarks": False, "log_count_bias": False}
PARTITION = {"exclude_window_landmarks": True, "log_count_bias": True}


def swept(case: Case) -> list[Estimator]:
    """Those to follow over numbers of landmarks and sizes of windows."""
    n, d, c = case.tokens, case.head_dim, case.landmarks
    eva, landmarks_only = eva_flops(case, False), 2 * n * d + 4 * n * c * d
    coarse = 4 * c * c * d
    inverse = 48 * c**3  # six iterations of four products
    return [
        Estimator("window only", window_only, window_flops(case, False)),
        Estimator("chunk means only", chunk_means, landmarks_only),
        Estimator("Nystromformer", nystrom, 8 * n * c * d + 4 * c * c * d + inverse),
        Estimator("EVA", partial(shipped, **OFFICIAL), eva),
        Estimator("EVA, partition and counts", partial(shipped, **PARTITION), eva),
        *(
            Estimator(f"tangent at {name}", partial(tangent, reference=reference), eva + extra)
            for (name, reference), extra in zip(REFERENCES.items(), (0, 0, 0, coarse), strict=True)
        ),
    ]


def sampled(case: Case, samples: int) -> list[Estimator]:
    """Those to follow over numbers of samples."""
    flops = 8 * case.tokens * samples * case.head_dim
    return [
        Estimator("RFA", partial(rfa, samples=samples), flops, samples),
        Estimator("RFA, orthogonal", partial(rfa, samples=samples, orthogonal=True), flops, samples),
    ]


def details(case: Case) -> list[Estimator]:
    """Each option on and off, and what else a landmark's logit can be."""
    n, d, c = case.tokens, case.head_dim, case.landmarks
    eva, diagonal, full = eva_flops(case, False), 2 * n * c * d, 2 * n * c * d * d
    quadratic = softmax_flops(case, False)

    def expanded(label: str, reference: Estimate, flops: float, **how: float) -> Estimator:
        return Estimator(label, partial(second_order, reference=reference, **how), eva + flops)

    return [
        Estimator("softmax", lambda p: estimators.softmax_attention(p.query, p.key, p.value), quadratic),
        Estimator("mean of all values", mean_value, n * d),
        Estimator("EVA, noise", partial(shipped, noise=True, **OFFICIAL), eva),
        Estimator("EVA, partition", partial(shipped, exclude_window_landmarks=True), eva),
        Estimator("EVA, counts", partial(shipped, log_count_bias=True), eva),
        Estimator("EVA, partition and counts, noise", partial(shipped, noise=True, **PARTITION), eva),
        Estimator("EVA's weights, evidence bound", lambda p: bounded(p, sample_weights(p)), eva),
        Estimator("mean query, values alone", partial(tangent_value, reference=mean_query), eva),
        Estimator("mean query, counts for entropy", partial(tangent_with_counts, reference=mean_query), eva),
        expanded("0 + variance", zero, full),
        expanded("0 + variance / 4", zero, full, strength=0.25),
        expanded("0 + variance, frozen", zero, full, frozen=True),
        expanded("0 + diagonal", zero, diagonal, diagonal=True),
        expanded("0 + diagonal, frozen", zero, diagonal, diagonal=True, frozen=True),
        expanded("mean query + variance", mean_query, full),
        expanded("mean query + variance, frozen", mean_query, full, frozen=True),
        expanded("mean query + diagonal", mean_query, diagonal, diagonal=True),
        expanded("mean query + diagonal, frozen", mean_query, diagonal, diagonal=True, frozen=True),
        Estimator("exact mass, EVA's values", lambda p: exact_mass(p, sample_weights(p)), quadratic),
        *(
            Estimator(
                f"exact mass, values at {name}",
                lambda p, reference=reference: exact_mass(
                    p, estimators.tangent_weights(reference(p), p.key, p.member)
                ),
                quadratic,
            )
            for name, reference in REFERENCES.items()
        ),
    ]


def projected(case: Case, problems: list[Problem], steps: int) -> list[Estimator]:
    """Learned projections: as they start, and trained for `steps` on `problems`, one of each layer."""
    found = []
    for kind in ("linear-layernorm", "linear", "key-only"):
        for name, trained, options in (
            ("new", 0, OFFICIAL),
            ("new, partition and counts", 0, PARTITION),
            ("fitted, partition and counts", steps, PARTITION),
        ):
            projections = [fit_projection(kind, problem, trained) for problem in problems]
            estimate = partial(shipped, projections=projections, **options)
            found.append(Estimator(f"EVA, {kind}, {name}", estimate, eva_flops(case, False)))
    return found


def fit_projection(kind: str, problem: Problem, steps: int) -> LandmarkProjection:
    """A projection trained to bring EVA near to softmax, and nothing else, from the identity on."""
    projection = LandmarkProjection(problem.case.head_dim, kind, problem.query.device)
    if steps:
        for branch in filter(None, (projection.key, projection.query)):
            torch.nn.init.eye_(branch[0].weight)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.01)
    for _ in range(steps):
        output = shipped(problem, [projection] * (problem.layer + 1), **PARTITION)
        loss = (output - problem.softmax).square().mean() / problem.softmax.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return projection.requires_grad_(False)
