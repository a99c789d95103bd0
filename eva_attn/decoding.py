"""Causal EVA over sequences that grow, in memory that does not."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import functional

if TYPE_CHECKING:
    from .modules import LandmarkProjection


# By name: older versions of torch.compile cannot look through an object for its tensors.
STATE_TENSORS = (
    "window_key",
    "window_value",
    "landmark_key",
    "landmark_value",
    "key_sum",
    "query_sum",
    "head_position",
    "landmark_entropy",
)


@dataclass(eq=False)
class DecodingState:
    """What causal EVA keeps of B sequences, each at its own position: made by `CausalEVAttention.init_state`.

    W = window_size + overlap slots hold the latest tokens, token t in slot t % W; C = ceil(max_length /
    chunk_size). What lies beyond a sequence's position is never read.
    """

    max_length: int
    window_size: int
    chunk_size: int
    window_key: Tensor  # [B, H, W, D]
    window_value: Tensor  # [B, H, W, D]
    landmark_key: Tensor  # [B, H, C, D]
    landmark_value: Tensor  # [B, H, C, D]
    key_sum: Tensor  # [B, H, D], of the open chunk; float64 for float64, else float32
    query_sum: Tensor  # [B, H, D]
    head_position: Tensor  # int64 [B, H]: each head counts for itself, and waits for no other
    room: int  # tokens that every sequence can take in at least
    landmark_entropy: Tensor | None = None  # [B, H, C], of tangents; dtype of the sums

    @classmethod
    def zeros(
        cls,
        batch: int,
        num_heads: int,
        head_dim: int,
        *,
        max_length: int,
        window_size: int,
        chunk_size: int,
        overlap: int,
        tangent: bool = False,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "DecodingState":
        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, num_heads, *shape, device=device, dtype=dtype)

        num_chunks = -(-max_length // chunk_size)
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            max_length=max_length,
            window_size=window_size,
            chunk_size=chunk_size,
            window_key=zeros(window_size + overlap, head_dim),
            window_value=zeros(window_size + overlap, head_dim),
            landmark_key=zeros(num_chunks, head_dim),
            landmark_value=zeros(num_chunks, head_dim),
            key_sum=zeros(head_dim, dtype=accumulation),
            query_sum=zeros(head_dim, dtype=accumulation),
            head_position=zeros(dtype=torch.int64),
            room=max_length,
            landmark_entropy=zeros(num_chunks, dtype=accumulation) if tangent else None,
        )

    @property
    def position(self) -> Tensor:
        """int64 [B], the number of tokens taken in."""
        return self.head_position[:, 0]

    @property
    def overlap(self) -> int:
        return self.window_key.shape[2] - self.window_size

    def clone(self) -> "DecodingState":
        """A copy in memory of its own."""
        return replace(self, **{name: x.clone() for name, x in self.tensors().items()})

    def reorder(self, indices: Tensor | list[int]) -> None:
        """Puts the sequence that was at `indices[b]` at b, for each b, as beam search does."""
        indices = torch.as_tensor(indices, device=self.position.device)
        if indices.shape != self.position.shape:
            raise ValueError(
                f"indices: expected one for each of {len(self.position)} sequences, "
                f"got shape {tuple(indices.shape)}"
            )
        for x in self.tensors().values():
            x.copy_(x[indices])

    def reset(self, indices: Tensor | list[int] | None = None) -> None:
        """Empties the sequences at `indices`, None = all, so that others can start in their place."""
        if indices is None:
            self.head_position.zero_()
        else:
            self.head_position[torch.as_tensor(indices, device=self.head_position.device)] = 0

    def reserve(self, num_tokens: int) -> None:
        """ValueError unless every sequence can take in `num_tokens` more."""
        if self.room < num_tokens:  # counted anew only then, as that waits for the device
            self.require(self.position + num_tokens)
        else:
            self.room -= num_tokens

    def require(self, length: Tensor) -> None:
        """ValueError unless every sequence can grow to `length` [B]."""
        longest = int(length.max())
        if longest > self.max_length:
            raise ValueError(
                f"state: expected sequences of at most max_length = {self.max_length} tokens, got {longest}"
            )
        self.room = self.max_length - longest

    def tensors(self) -> dict[str, Any]:
        """What grows with the sequences, under the names that the operator has for it."""
        tensors = {name: getattr(self, name) for name in STATE_TENSORS}
        return {name: x for name, x in tensors.items() if x is not None}


def prefill(
    state: DecodingState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    projection: "LandmarkProjection | None",
    relative_bias: Tensor | None,
    exclude_window_landmarks: bool,
    log_count_bias: bool,
) -> Tensor:
    """Attention of the next tokens of each sequence, which `state` takes in.

    query, key, value: [B, H, T, D], key and value with H or fewer heads; key_padding_mask: bool [B, T],
    padding at the end, which is not taken in; result: [B, H, T, D], 0 at padding. Options are those of
    `eva_attention`. ValueError, before anything is written, where a sequence outgrows the state.
    """
    key, value = functional.expand_heads(query, key, value)
    num_tokens = _num_valid_tokens(query, key_padding_mask)
    state.require(state.position + num_tokens)
    if state.position.any():
        return advance(
            state,
            query,
            key,
            value,
            num_tokens,
            projection=projection,
            relative_bias=relative_bias,
            exclude_window_landmarks=exclude_window_landmarks,
            log_count_bias=log_count_bias,
        )

    landmarks = functional.chunk_summary(
        query,
        key,
        value,
        chunk_size=state.chunk_size,
        is_causal=True,
        projection=projection,
        key_padding_mask=key_padding_mask,
    )
    out = functional.window_attention(
        query,
        key,
        value,
        *landmarks,
        window_size=state.window_size,
        chunk_size=state.chunk_size,
        overlap=state.overlap,
        is_causal=True,
        relative_bias=relative_bias,
        key_padding_mask=key_padding_mask,
        exclude_window_landmarks=exclude_window_landmarks,
        log_count_bias=log_count_bias,
    )
    if query.shape[2]:
        _fill(state, query, key, value, landmarks, num_tokens)
    return out


def advance(
    state: DecodingState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_tokens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`prefill` token by token, of the first `num_tokens` [B] of each sequence, None = all.

    It never waits for the device; that there is room is for the caller to see to.
    """
    key, value = functional.expand_heads(query, key, value)
    return torch.ops.eva_attn.decode_step(
        query, key, value, **operator_arguments(state, **options), num_tokens=num_tokens
    )


def operator_arguments(
    state: DecodingState,
    *,
    projection: "LandmarkProjection | None",
    relative_bias: Tensor | None,
    exclude_window_landmarks: bool,
    log_count_bias: bool,
) -> dict[str, Any]:
    """The operator's form of the state and the options of `prefill`."""
    return {
        **state.tensors(),
        "window_size": state.window_size,
        "chunk_size": state.chunk_size,
        "overlap": state.overlap,
        "relative_bias": None if relative_bias is None else relative_bias.unsqueeze(1),
        "exclude_window_landmarks": exclude_window_landmarks,
        "log_count_bias": log_count_bias,
        **functional.projection_arguments(projection),
    }


def _num_valid_tokens(query: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """How many tokens of each sequence of `query` [B, H, N, D] are not padding: int64 [B].

    ValueError where padding is not at the end.
    """
    batch, _, num_tokens, _ = query.shape
    if key_padding_mask is None:
        return torch.full((batch,), num_tokens, device=query.device)
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected bool (True: padding), got {key_padding_mask.dtype}")
    if key_padding_mask.shape != (batch, num_tokens):
        raise ValueError(
            f"key_padding_mask: expected shape {(batch, num_tokens)}, got {tuple(key_padding_mask.shape)}"
        )
    valid = (~key_padding_mask).sum(1)
    if not torch.equal(key_padding_mask, torch.arange(num_tokens, device=query.device) >= valid[:, None]):
        raise ValueError("key_padding_mask: expected padding only at the end of a sequence, with a state")
    return valid


def _fill(
    state: DecodingState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: tuple[Tensor, ...],
    num_tokens: Tensor,
) -> None:
    """Puts sequences of `num_tokens` [B] tokens into the state, whatever it held."""
    buffers = (state.landmark_key, state.landmark_value, state.landmark_entropy)
    for buffer, x in zip(buffers, landmarks, strict=False):
        assert buffer is not None  # there is one for each that comes
        buffer[:, :, : x.shape[2]] = x[:, :, : buffer.shape[2]]
    end, device = num_tokens[:, None], num_tokens.device
    slots = state.window_key.shape[2]
    held = end - 1 - (end - 1 - torch.arange(slots, device=device)) % slots  # by each slot; negative: nothing
    for buffer, x in ((state.window_key, key), (state.window_value, value)):
        buffer.copy_(x.gather(2, _index(held.clamp(min=0), x)))
    member = end // state.chunk_size * state.chunk_size + torch.arange(state.chunk_size, device=device)
    for total, x in ((state.key_sum, key), (state.query_sum, query)):
        members = x.gather(2, _index(member.clamp(max=x.shape[2] - 1), x)).to(total.dtype)
        total.copy_(members.masked_fill((member >= end)[:, None, :, None], 0).sum(2))
    state.head_position.copy_(end.expand_as(state.head_position))


def _index(token: Tensor, x: Tensor) -> Tensor:
    """[B, n] -> [B, H, n, D], to gather tokens out of `x`."""
    return token[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
