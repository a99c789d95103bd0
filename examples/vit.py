"""A small vision transformer whose attention is chosen by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eva_attn
from eva_attn import official

WINDOW = 7
LANDMARKS = 49
PERFORMER_FEATURES = 64

Pair = tuple[int, int]
MakeAttention = Callable[[int, int, Pair], nn.Module]  # of width, heads, grid size


class SelfAttention(nn.Module):
    """[B, N, C] -> [B, N, C]: projection to queries, keys and values, attention, output projection."""

    def __init__(self, dim: int, num_heads: int, grid_size: Pair) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        packed = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        return self.proj(self.attend(query, key, value).transpose(1, 2).reshape(x.shape))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError


class SoftmaxAttention(SelfAttention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class WindowAttention(SelfAttention):
    """EVA without its landmarks."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return eva_attn.functional.window_attention(
            query, key, value, window_size=WINDOW, grid_size=self.grid_size
        )


class NoAttention(SelfAttention):
    """Hands each token its own value: what a model costs beside its attention."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value


def eva_attention(dim: int, num_heads: int, grid_size: Pair) -> nn.Module:
    return eva_attn.EVAttention(
        dim, num_heads, window_size=WINDOW, num_landmarks=LANDMARKS, grid_size=grid_size
    )


def performer_attention(dim: int, num_heads: int, grid_size: Pair) -> nn.Module:
    arguments = {"dim": dim, "num_heads": num_heads, "approx_attn_dim": PERFORMER_FEATURES}
    return official.build("KernelizedAttention", arguments)


ATTENTION: dict[str, MakeAttention] = {
    "softmax": SoftmaxAttention,
    "eva": eva_attention,
    "window": WindowAttention,
    "performer": performer_attention,
    "none": NoAttention,
}


class Block(nn.Module):
    """Attention and a two-layer perceptron, each with its normalisation before and a residual around it."""

    def __init__(self, dim: int, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    """Square images of one channel [B, 1, side, side] -> logits [B, classes].

    Patches become tokens by a convolution and get learned positions; the mean over tokens is classified.
    `hidden` is the width between the layers of a perceptron, None = twice that of a token.
    """

    def __init__(
        self,
        attention: str | MakeAttention,
        *,
        image_size: int = 28,
        patch_size: int = 2,
        width: int = 64,
        depth: int = 2,
        heads: int = 2,
        hidden: int | None = None,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size: expected a divisor of {image_size}, got {patch_size}")
        side = image_size // patch_size
        self.patches = nn.Conv2d(1, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.empty(1, side * side, width))
        make = ATTENTION[attention] if isinstance(attention, str) else attention
        self.blocks = nn.Sequential(
            *(Block(width, make(width, heads, (side, side)), hidden or 2 * width) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.positions, std=0.5)  # of the size of the patches' features from the start
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        # A token's channels side by side: all that follows keeps the order of these.
        x = self.patches(images).flatten(2).mT.contiguous() + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def _init(module: nn.Module) -> None:
    """The same start for every kind of attention."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
