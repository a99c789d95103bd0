"""Attention of the models that `benchmarks.quality` trains: what the demo compares, and ablations of EVA."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eva_attn
from eva_attn import functional, geometry
from examples.vit import (
    LANDMARKS,
    WINDOW,
    MakeAttention,
    Pair,
    SelfAttention,
    SoftmaxAttention,
    VisionTransformer,
    WindowAttention,
    performer_attention,
)

from .peers import augmented_sdpa


class NoiselessEVA(eva_attn.EVAttention):
    """EVA that trains as it is evaluated: without noise."""

    def train(self, mode: bool = True) -> "NoiselessEVA":
        return super().train(False)


class _ProjectedAttention(SelfAttention):
    """With the landmark projections of EVA and chunks of its size."""

    def __init__(self, dim: int, num_heads: int, grid_size: Pair) -> None:
        super().__init__(dim, num_heads, grid_size)
        self.landmark_projection = eva_attn.LandmarkProjection(dim // num_heads)
        self.chunk_size = geometry.default_chunk_size(grid_size, LANDMARKS, True)


class LandmarkAttention(_ProjectedAttention):
    """EVA without its window: softmax over landmarks alone."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        noise = None
        if self.training:
            chunk = (self.chunk_size, self.chunk_size)
            noise = functional.draw_noise(query.shape, self.grid_size, chunk, query.device)
        landmarks = functional.chunk_summary(
            query,
            key,
            value,
            chunk_size=self.chunk_size,
            grid_size=self.grid_size,
            projection=self.landmark_projection,
            noise=noise,
        )
        return F.scaled_dot_product_attention(query, *landmarks)


class AugmentedAttention(_ProjectedAttention):
    """EVA without noise as it is written without the operators: for windows that tile the grid."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        window, chunk = (WINDOW, WINDOW), (self.chunk_size, self.chunk_size)
        return augmented_sdpa(
            query, key, value, self.grid_size, window, chunk, self.landmark_projection, None
        )


def eva(module: type[eva_attn.EVAttention] = eva_attn.EVAttention, **options: Any) -> MakeAttention:
    options = {"window_size": WINDOW, "num_landmarks": LANDMARKS, **options}

    def make(dim: int, num_heads: int, grid_size: Pair) -> nn.Module:
        return module(dim, num_heads, grid_size=grid_size, **options)

    return make


PARTITION = {"exclude_window_landmarks": True, "log_count_bias": True}
VARIANTS: dict[str, MakeAttention] = {
    "softmax": SoftmaxAttention,
    "EVA": eva(),
    "window only": WindowAttention,
    "landmarks only": LandmarkAttention,
    "Performer": performer_attention,
    "EVA, 16 landmarks": eva(num_landmarks=16),
    "EVA, 196 landmarks": eva(num_landmarks=196),
    "EVA, no noise": eva(NoiselessEVA),
    "augmented SDPA, no noise": AugmentedAttention,
    "EVA, linear": eva(projection="linear"),
    "EVA, key-only": eva(projection="key-only"),
    "EVA, identity": eva(projection="identity"),
    "EVA, tangent": eva(projection="tangent"),
    "EVA, tangent, excluded, no noise": eva(
        NoiselessEVA, projection="tangent", exclude_window_landmarks=True
    ),
    "EVA, table bias": eva(relative_bias="table"),
    "EVA, overlap 3": eva(overlap=3),
    "EVA, chunk overlap 1": eva(chunk_overlap=1),
    "EVA, excluded": eva(exclude_window_landmarks=True),
    "EVA, counts": eva(log_count_bias=True),
    "EVA, excluded, counts": eva(**PARTITION),
    "EVA, identity, excluded, counts, no noise": eva(NoiselessEVA, projection="identity", **PARTITION),
}


def make_model(variant: str, width: int, **sizes: Any) -> VisionTransformer:
    """A model with as many parameters as one with EVA has, to within a few of its perceptrons' hidden units.

    Those have twice the width in EVA's, and elsewhere what makes up for the landmark projections.
    """

    def model(variant: str, hidden: int) -> VisionTransformer:
        return VisionTransformer(VARIANTS[variant], width=width, hidden=hidden, **sizes)

    hidden = 2 * width
    with torch.device("meta"):
        missing = num_parameters(model("EVA", hidden)) - num_parameters(model(variant, hidden))
    units = missing / (sizes["depth"] * (2 * width + 1))
    return model(variant, hidden + 8 * round(units / 8))


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
