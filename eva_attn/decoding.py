"""Causal EVA over sequences that grow, in memory that does not."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import functional

if TYPE_CHECKING:
    from .modules import LandmarkProjection


@dataclass(eq=False)
class DecodingState:
    """What causal EVA keeps of B sequences, each at its own position: made by `CausalEVAttention.init_state`.

    W = window_size + overlap and R = chunk_size slots hold the latest tokens, token t in slot t % W and
    t % R; C = ceil(max_length / R). What a sequence has not reached yet is 0.
    """

    max_length: int
    window_size: int
    position: Tensor  # int64 [B], the number of tokens taken in
    window_key: Tensor  # [B, H, W, D]
    window_value: Tensor  # [B, H, W, D]
    chunk_query: Tensor  # [B, H, R, D]
    landmark_key: Tensor  # [B, H, C, D]
    landmark_value: Tensor  # [B, H, C, D]
    room: int  # tokens that every sequence can take in at least

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
        device: torch.device,
        dtype: torch.dtype,
    ) -> "DecodingState":
        def slots(number: int) -> Tensor:
            return torch.zeros(batch, num_heads, number, head_dim, device=device, dtype=dtype)

        num_chunks = -(-max_length // chunk_size)
        return cls(
            max_length=max_length,
            window_size=window_size,
            position=torch.zeros(batch, dtype=torch.int64, device=device),
            window_key=slots(window_size + overlap),
            window_value=slots(window_size + overlap),
            chunk_query=slots(chunk_size),
            landmark_key=slots(num_chunks),
            landmark_value=slots(num_chunks),
            room=max_length,
        )

    @property
    def chunk_size(self) -> int:
        return self.chunk_query.shape[2]

    @property
    def overlap(self) -> int:
        return self.window_key.shape[2] - self.window_size

    def clone(self) -> "DecodingState":
        """A copy in memory of its own."""
        return replace(self, **{name: x.clone() for name, x in self._tensors().items()})

    def reorder(self, indices: Tensor | list[int]) -> None:
        """Puts the sequence that was at `indices[b]` at b, for each b, as beam search does."""
        indices = torch.as_tensor(indices, device=self.position.device)
        if indices.shape != self.position.shape:
            raise ValueError(
                f"indices: expected one for each of {len(self.position)} sequences, "
                f"got shape {tuple(indices.shape)}"
            )
        for x in self._tensors().values():
            x.copy_(x[indices])

    def reset(self, indices: Tensor | list[int] | None = None) -> None:
        """Empties the sequences at `indices`, None = all, so that others can start in their place."""
        if indices is not None:
            indices = torch.as_tensor(indices, device=self.position.device)
        for x in self._tensors().values():
            x[slice(None) if indices is None else indices] = 0

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

    def _tensors(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}


def num_valid_tokens(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """How many tokens of each sequence of `x` [B, N, ...] are not padding: int64 [B].

    ValueError where padding is not at the end.
    """
    batch, num_tokens = x.shape[:2]
    if key_padding_mask is None:
        return torch.full((batch,), num_tokens, device=x.device)
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected bool (True: padding), got {key_padding_mask.dtype}")
    if key_padding_mask.shape != (batch, num_tokens):
        raise ValueError(
            f"key_padding_mask: expected shape {(batch, num_tokens)}, got {tuple(key_padding_mask.shape)}"
        )
    valid = (~key_padding_mask).sum(1)
    if not torch.equal(key_padding_mask, _padding(valid, num_tokens)):
        raise ValueError("key_padding_mask: expected padding only at the end of a sequence, with a state")
    return valid


def prefill(
    state: DecodingState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_tokens: Tensor,
    *,
    projection: "LandmarkProjection | None",
    relative_bias: Tensor | None,
    exclude_window_landmarks: bool,
    log_count_bias: bool,
) -> Tensor:
    """Attention of the next tokens of each sequence, of which `state` takes in the first `num_tokens` [B].

    query, key, value: [B, H, T, D]; result: the same, 0 beyond `num_tokens`. Options are those of
    `eva_attention`. ValueError, before anything is written, where a sequence outgrows the state.
    """
    state.require(state.position + num_tokens)
    length = query.shape[2]
    if length == 0:
        return query
    padding = _padding(num_tokens, length)
    query, key, value = (x.masked_fill(padding[:, None, :, None], 0) for x in (query, key, value))
    if state.position.any():
        size = state.chunk_size
        pieces = [
            advance(
                state,
                query[:, :, start : start + size],
                key[:, :, start : start + size],
                value[:, :, start : start + size],
                (num_tokens - start).clamp(0, size),
                projection=projection,
                relative_bias=relative_bias,
                exclude_window_landmarks=exclude_window_landmarks,
                log_count_bias=log_count_bias,
            )
            for start in range(0, length, size)
        ]
        return torch.cat(pieces, 2)

    landmarks = functional.chunk_summary(
        query,
        key,
        value,
        chunk_size=state.chunk_size,
        is_causal=True,
        projection=projection,
        key_padding_mask=padding,
    )
    for buffer, x in zip((state.landmark_key, state.landmark_value), landmarks, strict=True):
        buffer[:, :, : x.shape[2]] = x[:, :, : buffer.shape[2]]
    for buffer, x in _latest(state, query, key, value):
        token = _held(num_tokens[:, None], buffer.shape[2]).clamp(min=0)
        buffer.copy_(x.gather(2, _index(token, x)))
    state.position.copy_(num_tokens)
    return functional.window_attention(
        query,
        key,
        value,
        *landmarks,
        window_size=state.window_size,
        chunk_size=state.chunk_size,
        overlap=state.overlap,
        is_causal=True,
        relative_bias=relative_bias,
        key_padding_mask=padding,
        exclude_window_landmarks=exclude_window_landmarks,
        log_count_bias=log_count_bias,
    )


def advance(
    state: DecodingState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_tokens: Tensor,
    *,
    projection: "LandmarkProjection | None",
    relative_bias: Tensor | None,
    exclude_window_landmarks: bool,
    log_count_bias: bool,
) -> Tensor:
    """`prefill` of at most a chunk's tokens, so that at most one chunk of each sequence ends among them.

    It never waits for the device; that there is room is for the caller to see to.
    """
    length, dim, device = query.shape[2], query.shape[3], query.device
    window, overlap, size = state.window_size, state.overlap, state.chunk_size
    begin = state.position[:, None]
    position = begin + torch.arange(length, device=device)  # [B, T]
    taken = ~_padding(num_tokens, length)

    chunk = begin // size
    member = chunk * size + torch.arange(size, device=device)  # [B, R]
    landmarks = functional.chunk_summary(
        _tokens(state.chunk_query, query, begin, member),
        _tokens(state.window_key, key, begin, member),
        _tokens(state.window_value, value, begin, member),
        chunk_size=size,
        is_causal=True,
        projection=projection,
    )
    ends = begin + num_tokens[:, None] >= (chunk + 1) * size
    for buffer, x in zip((state.landmark_key, state.landmark_value), landmarks, strict=True):
        _write(buffer, x, chunk.clamp(max=buffer.shape[2] - 1), ends)

    accumulation = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = torch.cat([state.window_key, key, state.landmark_key], 2).to(accumulation)
    values = torch.cat([state.window_value, value, state.landmark_value], 2).to(accumulation)
    logits = dim**-0.5 * query.to(accumulation) @ keys.mT  # [B, H, T, W + T + C]
    in_window, on_landmarks = logits.split([window + overlap + length, state.landmark_key.shape[2]], -1)

    key_position = torch.cat([_held(begin, window + overlap), position], 1)[:, None]  # [B, 1, W + T]
    window_start = position // window * window - overlap
    offset = key_position - position[:, :, None]  # [B, T, W + T]
    sees_key = (offset <= 0) & (key_position >= window_start.clamp(min=0)[:, :, None])
    if relative_bias is not None:
        far = window + overlap - 1
        in_window += relative_bias[:, offset.clamp(-far, far) + far].transpose(0, 1)
    # The first token that no landmark which is seen holds.
    bound = window_start if exclude_window_landmarks else position // size * size
    landmark_start = torch.arange(state.landmark_key.shape[2], device=device) * size
    sees_landmark = landmark_start < bound[:, :, None]  # [B, T, C]
    if log_count_bias:
        on_landmarks += math.log(size)
    visible = torch.cat([sees_key, sees_landmark], -1)[:, None]
    out = logits.masked_fill(~visible, -math.inf).softmax(-1) @ values

    for buffer, x in _latest(state, query, key, value):
        _write(buffer, x, position % buffer.shape[2], taken)
    state.position += num_tokens
    return out.masked_fill(~taken[:, None, :, None], 0).to(query.dtype)


def _latest(
    state: DecodingState, query: Tensor, key: Tensor, value: Tensor
) -> tuple[tuple[Tensor, Tensor], ...]:
    """The buffers of the latest tokens, each with the tokens that it takes in."""
    return (state.chunk_query, query), (state.window_key, key), (state.window_value, value)


def _padding(num_tokens: Tensor, length: int) -> Tensor:
    """Whether each of `length` tokens is beyond the first `num_tokens` [B]: [B, length]."""
    return torch.arange(length, device=num_tokens.device) >= num_tokens[:, None]


def _held(end: Tensor, slots: int) -> Tensor:
    """The last token before `end` [B, 1] in each slot, token t being in slot t % slots; negative for none."""
    last = end - 1
    return last - (last - torch.arange(slots, device=end.device)) % slots


def _tokens(buffer: Tensor, x: Tensor, begin: Tensor, token: Tensor) -> Tensor:
    """[B, H, n, D] of `token` [B, n], out of the buffer, and from `begin` [B, 1] on out of `x`.

    Any others stand for tokens that are in neither.
    """
    slots = buffer.shape[2]
    place = torch.where(token < begin, token % slots, token - begin + slots)
    place = place.clamp(max=slots + x.shape[2] - 1)
    return torch.cat([buffer, x], 2).gather(2, _index(place, x))


def _write(buffer: Tensor, x: Tensor, slot: Tensor, wanted: Tensor) -> None:
    """Puts `x` [B, H, n, D] into `slot` [B, n] of the buffer where `wanted` [B, n]."""
    index = _index(slot, x)
    x = torch.where(wanted[:, None, :, None], x.to(buffer.dtype), buffer.gather(2, index))
    buffer.scatter_(2, index, x)


def _index(token: Tensor, x: Tensor) -> Tensor:
    """[B, n] -> [B, H, n, D], to gather from, or scatter into, tokens like those of `x`."""
    return token[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
