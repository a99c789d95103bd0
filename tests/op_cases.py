"""Seeded arguments of the attention functions, and what comes of them, for the tests of operators."""

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from eva_attn import LandmarkProjection, geometry
from eva_attn.geometry import Pair, Size

KINDS = ["linear-layernorm", "linear", "key-only", "identity", "tangent"]
HAS_CUDA = torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "eva_attn::eva_attention", "CUDA"
)
DEVICES = ["cpu", "cuda"] if HAS_CUDA else ["cpu"]


def seeded(max_examples: int) -> settings:
    """The same examples in every run, however long one takes."""
    return settings(
        max_examples=max_examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )


@dataclass(frozen=True)
class Case:
    """One call of `eva_attention`: `size` is the length of a sequence or (height, width) of a grid."""

    size: Size
    window: Size
    chunk: Size
    overlap: Size = 0
    chunk_overlap: Size = 0
    prefix: int = 0
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    kind: str = "identity"
    noise: bool = False
    bias: str = "none"  # or "shared" or "per head"
    landmark_bias: bool = False
    padding: float = 0.0  # fraction of tokens
    exclude: bool = False
    log_count: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    is_causal: bool = False
    packed: bool = False
    seed: int = 0

    @property
    def grid_size(self) -> Pair | None:
        return self.size if isinstance(self.size, tuple) else None

    @property
    def grid(self) -> Pair:
        return self.size if isinstance(self.size, tuple) else (1, self.size)

    @property
    def num_tokens(self) -> int:
        return self.prefix + math.prod(self.grid)

    @property
    def num_chunks(self) -> int:
        chunk = geometry.pair("chunk_size", self.chunk, self.grid_size, 1)
        return math.prod(geometry.chunk_grid(self.grid, chunk))


@dataclass
class Arguments:
    """Tensors of a case. `inputs` are the differentiable ones, by name, qkv [B, N, 3, H, D] first."""

    inputs: dict[str, Tensor]
    options: dict[str, Any]
    landmarks: Tensor  # [2, B, H, C, D]
    cotangent: Tensor  # [B, H, N, D]
    entropy: Tensor | None = None  # [B, H, C], of tangents

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (x.transpose(1, 2) for x in self.inputs["qkv"].unbind(2))
        return query, key, value

    def halves(self) -> tuple[Tensor, ...]:
        """Landmarks that are none of the case's making, as `window_attention` takes them."""
        return (*self.landmarks, *([] if self.entropy is None else [self.entropy]))


# Every option, and borders of tokens, windows and chunks that do and do not meet.
FIXED = {
    "plain": Case(24, 6, 3),
    "ragged": Case(
        37, 8, 5, overlap=3, chunk_overlap=2, kind="linear-layernorm", bias="per head", head_dim=17
    ),
    "one window": Case(11, 64, 16, kind="linear", exclude=True, log_count=True, bias="shared"),
    "prefix": Case(21, 4, 3, prefix=3, kind="key-only", bias="per head", noise=True, padding=0.3),
    "options": Case(
        30, 7, 3, overlap=1, exclude=True, log_count=True, landmark_bias=True, padding=0.4, scale=0.7,
        packed=True,
    ),
    "dropout": Case(19, 5, 4, dropout_p=0.3, prefix=1, kind="linear", heads=3, packed=True, bias="shared"),
    "grid": Case(
        (14, 14), 7, 2, kind="linear-layernorm", bias="per head", noise=True, packed=True, head_dim=64
    ),
    "ragged grid": Case(
        (7, 9), (3, 4), (2, 5), overlap=(1, 2), chunk_overlap=(0, 1), prefix=2, kind="linear-layernorm",
        bias="per head", noise=True, landmark_bias=True, padding=0.2, head_dim=5,
    ),
    "grid options": Case(
        (6, 8), 2, 3, overlap=1, exclude=True, log_count=True, padding=0.5, kind="linear", dropout_p=0.2,
        head_dim=33, packed=True,
    ),
    "tangent": Case(
        37, 8, 5, overlap=3, chunk_overlap=2, kind="tangent", bias="per head", noise=True,
        landmark_bias=True, padding=0.2, head_dim=17, scale=0.7,
    ),
    "tangent grid": Case((14, 14), 7, 2, kind="tangent", exclude=True, packed=True, head_dim=64, prefix=1),
    "causal tangent": Case(40, 8, 4, overlap=5, kind="tangent", is_causal=True, dropout_p=0.2, head_dim=32),
    "large": Case(
        (28, 28), 7, 4, kind="linear-layernorm", bias="per head", heads=1, head_dim=40, packed=True
    ),
}  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small case."""
    two_d = draw(st.booleans())

    def size(low: int, high: int) -> Size:
        side = st.integers(low, high)
        return draw(st.one_of(st.tuples(side, side), side)) if two_d else draw(side)

    kind = draw(st.sampled_from(KINDS))
    return Case(
        size=(draw(st.integers(1, 9)), draw(st.integers(1, 9))) if two_d else draw(st.integers(1, 45)),
        window=size(1, 5 if two_d else 16),
        chunk=size(1, 4 if two_d else 9),
        overlap=size(0, 3),
        chunk_overlap=size(0, 2),
        prefix=draw(st.sampled_from([0, 0, 1, 3])),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 33])),
        kind=kind,
        noise=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "shared", "per head"])),
        landmark_bias=draw(st.booleans()),
        padding=draw(st.sampled_from([0.0, 0.0, 0.3, 0.8])),
        exclude=draw(st.booleans()),
        log_count=draw(st.booleans()) and kind != "tangent",
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        scale=draw(st.sampled_from([None, 0.7])),
        packed=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def causal_cases(draw: st.DrawFn) -> Case:
    """Any small causal case: a chunk divides the window, and there are neither grid nor prefix."""
    chunk = draw(st.integers(1, 5))
    return replace(
        draw(cases()),
        size=draw(st.integers(1, 45)),
        window=chunk * draw(st.integers(1, 4)),
        chunk=chunk,
        overlap=draw(st.integers(0, 6)),
        chunk_overlap=0,
        prefix=0,
        is_causal=True,
    )


def arguments(
    case: Case, device: str = "cpu", dtype: torch.dtype = torch.float64, stretch: float = 1.0
) -> Arguments:
    """Tensors of `case` drawn from its seed; one channel in eight of q and k is `stretch` times as large.

    The same numbers on every device and, but for rounding, in every dtype.
    """
    random = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    batch, heads, dim, tokens, chunks = (
        case.batch,
        case.heads,
        case.head_dim,
        case.num_tokens,
        case.num_chunks,
    )
    qkv = normal(batch, tokens, 3, heads, dim)
    qkv[:, :, :2, :, ::8] *= stretch
    projection = LandmarkProjection(dim, case.kind, dtype=torch.float64)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.copy_(normal(*parameter.shape) * (0.5 if parameter.dim() == 1 else dim**-0.5))
    window = geometry.pair("window_size", case.window, case.grid_size, 1)
    overlap = geometry.pair("overlap", case.overlap, case.grid_size, 0)
    offsets = [2 * (w + e) - 1 for w, e in zip(window, overlap, strict=True)][case.grid_size is None :]
    bias = None if case.bias == "none" else normal(heads if case.bias == "per head" else 1, *offsets)
    noise, landmark_bias = normal(batch, heads, chunks, dim), normal(batch, chunks)
    landmark_bias[landmark_bias > 1] = -math.inf
    mask = torch.rand(batch, tokens, generator=random) < case.padding
    landmarks, cotangent = normal(2, batch, heads, chunks, dim), normal(batch, heads, tokens, dim)
    entropy = normal(batch, heads, chunks) if case.kind == "tangent" else None

    def placed(x: Tensor) -> Tensor:
        return x.to(device, dtype)

    inputs = {"qkv": placed(qkv).requires_grad_()}
    if bias is not None:
        inputs["relative_bias"] = placed(bias).requires_grad_()
    projection.to(device, dtype)
    inputs |= dict(projection.named_parameters())
    return Arguments(
        inputs=inputs,
        options={
            "window_size": case.window,
            "chunk_size": case.chunk,
            "grid_size": case.grid_size,
            "num_prefix_tokens": case.prefix,
            "overlap": case.overlap,
            "chunk_overlap": case.chunk_overlap,
            "is_causal": case.is_causal,
            "projection": None if case.kind == "identity" else projection,
            "noise": placed(noise) if case.noise else None,
            "relative_bias": inputs.get("relative_bias"),
            "landmark_bias": placed(landmark_bias) if case.landmark_bias else None,
            "key_padding_mask": mask.to(device) if case.padding else None,
            "exclude_window_landmarks": case.exclude,
            "log_count_bias": case.log_count,
            "dropout_p": case.dropout_p,
            "scale": case.scale,
        },
        landmarks=placed(landmarks).requires_grad_(),
        entropy=None if entropy is None else placed(entropy).requires_grad_(),
        cotangent=placed(cotangent),
    )


SUMMARY_OPTIONS = (
    "chunk_size", "grid_size", "num_prefix_tokens", "chunk_overlap", "is_causal", "projection", "noise",
    "key_padding_mask", "scale",
)  # fmt: skip


def summary_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `chunk_summary`."""
    return {name: options[name] for name in SUMMARY_OPTIONS}


def window_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `window_attention`."""
    return {name: x for name, x in options.items() if name not in ("projection", "noise")}


def attend(functions: ModuleType, case: Case, given: Arguments) -> Tensor:
    """`eva_attention` of `functional` or `reference`, its dropout drawn from the seed of the case."""
    torch.manual_seed(case.seed)
    if case.packed:
        return functions.eva_attention_qkvpacked(given.inputs["qkv"], **given.options)
    return functions.eva_attention(*given.qkv(), **given.options)


def outcome(functions: ModuleType, case: Case, given: Arguments) -> dict[str, Tensor]:
    """Output, and gradients of all inputs."""
    return {"output": (output := attend(functions, case, given))} | gradients(
        output, given.cotangent, given.inputs
    )


def gradients(output: Any, cotangent: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(output, tuple(inputs.values()), cotangent, allow_unused=True)
    return {
        f"gradient of {name}": torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(inputs.items(), found, strict=True)
    }


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Within `tolerance` of the largest number of each tensor, and of 1 where all are smaller."""
    for name, x in expected.items():
        assert actual[name].shape == x.shape, name
        assert actual[name].dtype == x.dtype, name
        bound = tolerance * max(1.0, x.abs().max().item() if x.numel() else 0.0)
        torch.testing.assert_close(
            actual[name], x, rtol=0.0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name
