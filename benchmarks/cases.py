"""The cases that benchmarks and tests share, and how much work each of them is."""

from dataclasses import dataclass
from typing import Any

Pair = tuple[int, int]

# Backward through softmax(q k^T) v makes the scores again, and dv, dp, dq, dk: five products, forward two.
BACKWARD_OVER_FORWARD = 2.5


@dataclass(frozen=True)
class Case:
    """One attention problem. A sequence is a grid of height 1.

    `batch` and `heads` are sized for a GPU, `cpu_batch` and `cpu_heads` for a few CPU cores.
    """

    name: str
    batch: int
    heads: int
    cpu_batch: int
    cpu_heads: int
    grid: Pair
    window: Pair
    chunk: Pair
    head_dim: int = 64
    is_causal: bool = False

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def is_sequence(self) -> bool:
        return self.grid[0] == 1

    @property
    def landmarks(self) -> int:
        height, width = (-(-size // chunk) for size, chunk in zip(self.grid, self.chunk, strict=True))
        return height * width

    def batch_and_heads(self, device_type: str) -> Pair:
        return (self.cpu_batch, self.cpu_heads) if device_type == "cpu" else (self.batch, self.heads)

    def geometry(self) -> dict[str, Any]:
        """The arguments of `eva_attn.eva_attention` that describe the case."""
        if self.is_sequence:
            window, chunk = self.window[1], self.chunk[1]
            return {"window_size": window, "chunk_size": chunk, "is_causal": self.is_causal}
        return {"grid_size": self.grid, "window_size": self.window, "chunk_size": self.chunk}

    def bias_shape(self, heads: int) -> tuple[int, ...]:
        """The shape of `relative_bias`: one value per head and offset."""
        window = self.window[1:] if self.is_sequence else self.window
        return heads, *(2 * size - 1 for size in window)


CASES = {
    case.name: case
    for case in (
        Case("deit_s_196", 256, 6, 16, 6, grid=(14, 14), window=(7, 7), chunk=(2, 2)),
        Case("deit_t_784", 128, 3, 8, 3, grid=(28, 28), window=(7, 7), chunk=(4, 4)),
        Case("pvt_3136", 128, 1, 4, 1, grid=(56, 56), window=(7, 7), chunk=(8, 8)),
        Case("grid_16384", 4, 12, 1, 1, grid=(128, 128), window=(8, 8), chunk=(16, 16)),
        Case("seq_65536", 1, 12, 1, 1, grid=(1, 65536), window=(1, 256), chunk=(1, 1024)),
        Case(
            "causal_8192",
            8,
            16,
            1,
            1,
            grid=(1, 8192),
            window=(1, 256),
            chunk=(1, 128),
            head_dim=128,
            is_causal=True,
        ),
        Case("causal_8192_d64", 8, 16, 1, 4, grid=(1, 8192), window=(1, 128), chunk=(1, 128), is_causal=True),
    )
}
# Square grids of 49 to 50,176 tokens with 49 landmarks: the same number of tokens in all, ever longer.
SWEEP = {
    case.name: case
    for case in (
        Case(
            f"sweep_{side * side}",
            (224 // side) ** 2,
            12,
            (224 // side) ** 2,
            1,
            grid=(side, side),
            window=(7, 7),
            chunk=(side // 7, side // 7),
        )
        for side in (7, 14, 28, 56, 112, 224)
    )
}


def softmax_flops(case: Case, backward: bool) -> float:
    """Operations of exact softmax, a head of one sequence: q k^T and p v take 2 D each per visible pair."""
    n = case.tokens
    pairs = n * (n + 1) // 2 if case.is_causal else n * n
    return _attention_flops(pairs, case.head_dim, backward)


def window_flops(case: Case, backward: bool) -> float:
    """Operations of attention to the window alone, a head of one sequence."""
    return _attention_flops(_window_pairs(case), case.head_dim, backward)


def eva_flops(case: Case, backward: bool) -> float:
    """Operations of EVA, a head of one sequence, exponentials not counted.

    Joint attention: 4 D for each (query, window key) and (query, landmark). Summaries forward, per token:
    means of q and k 2 D, |k|^2 2 D, omega.k 2 D, p v 2 D; per landmark two D x D products, 4 D^2. Summaries
    backward, per token: the logits again 4 D, dp 2 D, dv 2 D, dk 4 D, domega 2 D, spreading the means'
    gradients 2 D; per landmark 8 D^2.
    """
    n, d, c = case.tokens, case.head_dim, case.landmarks
    landmark_pairs = sum(i // case.chunk[1] for i in range(n)) if case.is_causal else n * c
    summaries = 8 * n * d + 4 * c * d * d
    if backward:
        summaries += 16 * n * d + 8 * c * d * d
    return _attention_flops(_window_pairs(case) + landmark_pairs, d, backward) + summaries


def least_bytes(case: Case, element_size: int, backward: bool) -> int:
    """Bytes that no kernel can avoid moving, a head of one sequence.

    Forward reads q, k, v and writes out (4 tensors); backward reads q, k, v, out, dout and writes dq, dk,
    dv (8).
    """
    return (12 if backward else 4) * case.tokens * case.head_dim * element_size


def _attention_flops(pairs: int, head_dim: int, backward: bool) -> float:
    return 4 * pairs * head_dim * (1 + BACKWARD_OVER_FORWARD if backward else 1)


def _window_pairs(case: Case) -> int:
    """Number of (query, window key) pairs; the last window of each axis may be smaller."""
    pairs = 1
    for size, window in zip(case.grid, case.window, strict=True):
        lengths = [window] * (size // window) + [size % window]
        pairs *= sum(n * (n + 1) // 2 if case.is_causal and size > 1 else n * n for n in lengths)
    return pairs
