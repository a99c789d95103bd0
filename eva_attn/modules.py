"""Modules: the parameters around the functions of `eva_attn.functional`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import decoding, geometry
from .decoding import DecodingState
from .functional import draw_noise, eva_attention, eva_attention_qkvpacked, is_tangent, refuse_counts
from .geometry import Pair, Size

_PROJECTION_KINDS = ("linear-layernorm", "linear", "key-only", "identity", "tangent")


class LandmarkProjection(nn.Module):
    """What turns the mean key and query of a chunk into its landmark key and query, shared by all heads.

    It holds parameters only, for `eva_attention(projection=...)` to use.

    Args:
        head_dim: D.
        kind: "linear-layernorm": `Linear(D, D)` then `LayerNorm(D)` for key and for query, as in Zheng et al.
            (ICLR 2023); "linear": without the norms; "key-only": with the norm, for the key alone, so that
            the random features are centred on 0; "identity": no parameters; "tangent": none either, see
            below.

    Of a "tangent" the landmark is not made from the mean key. With the mean query of the chunk (plus noise)
    as w and p = softmax(scale * w.k_m) over its tokens m, its key is sum p_m k_m, its value sum p_m v_m, and
    the entropy H(p) = -sum p_m log p_m is added to its logits: then the logit is the tangent at w of the
    chunk's log mass, log sum exp(scale * q.k_m), which lies below it for every q. Nearest to softmax without
    training, so the one to convert trained models with. Source: docs/theory.md, "The mass of a chunk".

    Linear weights start as a truncated normal of deviation 0.02 and their biases at 0, as the authors' do.
    ValueError for another kind.
    """

    key: nn.Sequential | None
    query: nn.Sequential | None

    def __init__(
        self,
        head_dim: int,
        kind: str = "linear-layernorm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in _PROJECTION_KINDS:
            raise ValueError(
                f"projection: expected one of {', '.join(map(repr, _PROJECTION_KINDS))}, got {kind!r}"
            )
        _at_least("head_dim", head_dim, 1)
        self.kind = kind

        def branch() -> nn.Sequential:
            layers: list[nn.Module] = [nn.Linear(head_dim, head_dim, device=device, dtype=dtype)]
            if kind != "linear":
                layers.append(nn.LayerNorm(head_dim, device=device, dtype=dtype))
            return nn.Sequential(*layers)

        self.key = branch() if kind not in ("identity", "tangent") else None
        self.query = branch() if kind in ("linear-layernorm", "linear") else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the layers of both branches."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class _EVA(nn.Module):
    """What the modules have in common: landmark projection, relative bias and the other options."""

    t5_buckets: Tensor

    def _init_eva(
        self,
        num_heads: int,
        head_dim: int,
        *,
        window_size: Size,
        chunk_size: Size | None,
        num_landmarks: int = 1,
        grid_size: Pair | None = None,
        overlap: Size,
        chunk_overlap: Size = 0,
        is_causal: bool = False,
        projection: str,
        relative_bias: str | None,
        attn_drop: float,
        num_prefix_tokens: int = 0,
        exclude_window_landmarks: bool,
        log_count_bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        _at_least("num_landmarks", num_landmarks, 1)
        _at_least("num_prefix_tokens", num_prefix_tokens, 0)
        sizes = {
            "window_size": (window_size, 1),
            "overlap": (overlap, 0),
            "chunk_overlap": (chunk_overlap, 0),
        }
        if chunk_size is not None:
            sizes["chunk_size"] = (chunk_size, 1)
        for name, (size, minimum) in sizes.items():
            for length in geometry.pair(name, size, (1, 1), 1):
                _at_least(name, length, minimum)
        if grid_size is not None:
            for length in geometry.grid(grid_size, 0, 0):
                _at_least("grid_size", length, 1)
        if not 0 <= attn_drop < 1:
            raise ValueError(f"attn_drop: expected a probability in [0, 1), got {attn_drop}")
        if relative_bias not in (None, "table", "t5"):
            raise ValueError(f"relative_bias: expected None, 'table' or 't5', got {relative_bias!r}")
        refuse_counts(log_count_bias, projection == "tangent")

        self.num_heads = num_heads
        self.head_dim = head_dim
        self.window_size = window_size
        self.num_landmarks = num_landmarks
        self.chunk_size = chunk_size
        self.grid_size = grid_size
        self.overlap = overlap
        self.chunk_overlap = chunk_overlap
        self.is_causal = is_causal
        self.relative_bias_kind = relative_bias
        self.attn_drop = attn_drop
        self.num_prefix_tokens = num_prefix_tokens
        self.exclude_window_landmarks = exclude_window_landmarks
        self.log_count_bias = log_count_bias
        self.landmark_projection = LandmarkProjection(head_dim, projection, device=device, dtype=dtype)

        self._bias_is_2d = grid_size is not None or not isinstance(window_size, int)
        if relative_bias == "t5" and self._bias_is_2d:
            raise ValueError(
                "relative_bias: 't5' is supported on sequences, 'table' on grids as well, "
                f"got 't5' with grid_size = {grid_size}, window_size = {window_size}"
            )
        if relative_bias is None:
            self.register_parameter("relative_bias", None)
        else:
            layout = (1, 1) if self._bias_is_2d else None
            window, beyond = (
                geometry.pair("window_size", window_size, layout, 1),
                geometry.pair("overlap", overlap, layout, 0),
            )
            self._reach = (window[0] + beyond[0], window[1] + beyond[1])
            offsets = [2 * reach - 1 for reach in self._reach[0 if self._bias_is_2d else 1 :]]
            if relative_bias == "t5":
                # Follows from the arguments, so it is in no checkpoint.
                buckets = torch.empty(offsets, dtype=torch.int64, device=device)
                self.register_buffer("t5_buckets", buckets, persistent=False)
                shape = [geometry.t5_num_buckets(self._reach[1]), 1 if is_causal else num_heads]
            else:
                shape = [num_heads, *offsets]
            self.relative_bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what is not in a submodule: the relative bias."""
        if self.relative_bias is not None:
            nn.init.trunc_normal_(self.relative_bias, std=0.02)
        if self.relative_bias_kind == "t5":
            reach = self._reach[1]
            offsets = torch.arange(1 - reach, reach, device=self.t5_buckets.device)
            self.t5_buckets.copy_(
                geometry.t5_buckets(offsets, geometry.t5_num_buckets(reach), reach, self.is_causal)
            )

    def _options(
        self,
        batch: int,
        num_tokens: int,
        device: torch.device,
        grid_size: Pair | None,
        key_padding_mask: Tensor | None,
        noise: Tensor | None,
    ) -> dict[str, Any]:
        """The arguments of `eva_attention` beside queries, keys and values; draws noise in training."""
        grid = geometry.grid(grid_size, num_tokens, self.num_prefix_tokens)
        chunk_size = self.chunk_size
        if chunk_size is None:
            chunk_size = geometry.default_chunk_size(grid, self.num_landmarks, grid_size is not None)
        if noise is None and self.training:
            shape = (batch, self.num_heads, num_tokens, self.head_dim)
            noise = draw_noise(shape, grid, geometry.pair("chunk_size", chunk_size, grid_size, 1), device)
        return {
            "window_size": self.window_size,
            "chunk_size": chunk_size,
            "grid_size": grid_size,
            "num_prefix_tokens": self.num_prefix_tokens,
            "overlap": self.overlap,
            "chunk_overlap": self.chunk_overlap,
            "is_causal": self.is_causal,
            "projection": self.landmark_projection,
            "noise": noise,
            "relative_bias": self._offset_bias(),
            "key_padding_mask": key_padding_mask,
            "exclude_window_landmarks": self.exclude_window_landmarks,
            "log_count_bias": self.log_count_bias,
            "dropout_p": self.attn_drop if self.training else 0.0,
        }

    def _offset_bias(self) -> Tensor | None:
        """The relative bias by offset, as `eva_attention` takes it."""
        if self.relative_bias_kind != "t5":
            return self.relative_bias
        return self.relative_bias[self.t5_buckets].t() * self.head_dim**-0.5

    def _check_bias_fits(self, grid_size: Pair | None) -> None:
        if self.relative_bias is not None and self._bias_is_2d != (grid_size is not None):
            expected = "(height, width)" if self._bias_is_2d else "None"
            raise ValueError(
                f"grid_size: expected {expected}, as relative_bias = {self.relative_bias_kind!r} was made, "
                f"got {grid_size}"
            )

    def extra_repr(self) -> str:
        options = {
            "num_heads": self.num_heads,
            "window_size": self.window_size,
            "chunk_size": self.chunk_size,
            "grid_size": self.grid_size,
            "overlap": self.overlap,
            "chunk_overlap": self.chunk_overlap,
            "relative_bias": self.relative_bias_kind,
            "num_prefix_tokens": self.num_prefix_tokens,
            "exclude_window_landmarks": self.exclude_window_landmarks,
            "log_count_bias": self.log_count_bias,
            "attn_drop": self.attn_drop,
        }
        if self.chunk_size is None:
            options["num_landmarks"] = self.num_landmarks
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value)


class _ProjectedEVA(_EVA):
    """A packed projection to queries, keys and values before EVA, and one of its output after it."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rotary_embedding: Callable[[Tensor, Tensor], Tensor] | None = None,
        qkv_bias: bool,
        qk_norm: Callable[[int], nn.Module] | None,
        proj_bias: bool,
        proj_drop: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **options: Any,
    ) -> None:
        super().__init__()
        _at_least("num_heads", num_heads, 1)
        if dim < 1 or dim % num_heads:
            raise ValueError(f"dim: expected a positive multiple of num_heads = {num_heads}, got {dim}")
        head_dim = dim // num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
            )
        self.dim = dim
        rows = dim + 2 * self.num_kv_heads * head_dim
        self.qkv = nn.Linear(dim, rows, bias=qkv_bias, device=device, dtype=dtype)
        self.rotary_embedding = rotary_embedding
        self.q_norm = qk_norm(head_dim).to(device=device, dtype=dtype) if qk_norm else None
        self.k_norm = qk_norm(head_dim).to(device=device, dtype=dtype) if qk_norm else None
        self._init_eva(num_heads, head_dim, device=device, dtype=dtype, **options)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def _attend(
        self, x: Tensor, grid_size: Pair | None, key_padding_mask: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        """[B, N, dim] -> [B, H, N, D]."""
        options = self._options(x.shape[0], x.shape[1], x.device, grid_size, key_padding_mask, noise)
        is_altered = self.q_norm is not None or self.rotary_embedding is not None
        if is_altered or self.num_kv_heads != self.num_heads:
            return eva_attention(*self._unpacked(x), **options)
        return eva_attention_qkvpacked(self._packed(x), **options)

    def _packed(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, 3, H, D], where keys and values have as many heads as queries."""
        return self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.num_heads, self.head_dim)

    def _unpacked(self, x: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, dim], of which the first tokens stand at `start` [B], None = 0 -> query [B, H, N, D], key
        and value [B, num_kv_heads, N, D]."""
        if self.num_kv_heads == self.num_heads:
            query, key, value = self._packed(x).unbind(2)
        else:
            heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
            query, key, value = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if self.rotary_embedding is not None:
            position = torch.arange(x.shape[1], device=x.device)
            if start is not None:
                position = start.unsqueeze(1) + position
            query, key = self.rotary_embedding(query, position), self.rotary_embedding(key, position)
        return query, key, value

    def _output(self, out: Tensor, shape: torch.Size) -> Tensor:
        """[B, H, N, D] -> `shape`."""
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(shape)))

    def extra_repr(self) -> str:
        grouped = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        return f"dim={self.dim}, {super().extra_repr()}{grouped}"


class EVAttention(_ProjectedEVA):
    """Multi-head self-attention with EVA, in place of softmax attention.

    Args:
        dim: channels of input and output. `num_heads` divides it.
        window_size, chunk_size, overlap, chunk_overlap: see `eva_attn.eva_attention`.
        num_prefix_tokens, exclude_window_landmarks, log_count_bias: likewise.
        num_landmarks: where `chunk_size` is None, it is n // num_landmarks for n tokens after the prefix, on
            a grid the integer root of that both ways, and at least 1.
        grid_size: (height, width) of the tokens after the prefix, where `forward` is not told.
        projection: kind of `LandmarkProjection`.
        relative_bias: None; "table": one trained value per head and offset, for a grid iff `grid_size` or a
            pair as `window_size` is given here; "t5": one per head and T5 bucket of the offset (Raffel et
            al., 2020), sequences only.
        qk_norm: makes from the head dimension a module for the queries, and one for the keys, [B, N, H, D].
        attn_drop, proj_drop: dropout of attention weights and of the output, in training.

    Parameters are `qkv`, `proj`, `landmark_projection`, `relative_bias`, `q_norm` and `k_norm`. Linear layers
    start as torch's do, relative biases as a truncated normal of deviation 0.02, `landmark_projection` as
    written there. ValueError for arguments that are not supported, by name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window_size: Size = 7,
        num_landmarks: int = 49,
        chunk_size: Size | None = None,
        grid_size: Pair | None = None,
        overlap: Size = 0,
        chunk_overlap: Size = 0,
        projection: str = "linear-layernorm",
        relative_bias: str | None = None,
        qkv_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
        exclude_window_landmarks: bool = False,
        log_count_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            window_size=window_size,
            num_landmarks=num_landmarks,
            chunk_size=chunk_size,
            grid_size=grid_size,
            overlap=overlap,
            chunk_overlap=chunk_overlap,
            projection=projection,
            relative_bias=relative_bias,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            num_prefix_tokens=num_prefix_tokens,
            exclude_window_landmarks=exclude_window_landmarks,
            log_count_bias=log_count_bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        *,
        grid_size: Pair | None = None,
        key_padding_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Attention among the tokens of `x`, in its shape.

        Args:
            x: [B, N, dim], or [B, height, width, dim], whose shape is then the grid (no prefix tokens).
            grid_size: stands in for that given at construction.
            key_padding_mask: bool [B, N], on a grid [B, height width]; True = padding.
            noise: [B, H, C, D]; None draws it from N(0, 1) in training, in float32, and is 0 otherwise.
        """
        grid_size = self._grid_size(x.shape, grid_size)
        return self._output(self._attend(x.flatten(1, -2), grid_size, key_padding_mask, noise), x.shape)

    def _grid_size(self, shape: torch.Size, grid_size: Pair | None) -> Pair | None:
        """The grid that an `x` of `shape` lies on, None for a sequence; refuses what does not fit."""
        prefix = self.num_prefix_tokens
        if len(shape) not in (3, 4) or shape[-1] != self.dim:
            raise ValueError(
                f"x: expected [B, N, {self.dim}] or [B, height, width, {self.dim}], got {tuple(shape)}"
            )
        if len(shape) == 4:
            if prefix:
                raise ValueError(
                    f"x: expected [B, N, {self.dim}] with num_prefix_tokens = {prefix}, got {tuple(shape)}"
                )
            own = (shape[1], shape[2])
            if grid_size is not None and tuple(grid_size) != own:
                raise ValueError(f"grid_size: expected None or that of x, {own}, got {grid_size}")
            grid_size = own
        else:
            if shape[1] < prefix:
                raise ValueError(
                    f"x: expected at least num_prefix_tokens = {prefix} tokens, got {tuple(shape)}"
                )
            grid_size = self.grid_size if grid_size is None else grid_size
        self._check_bias_fits(grid_size)
        return grid_size


class CausalEVAttention(_ProjectedEVA):
    """Causal multi-head self-attention with EVA, for whole sequences and token by token.

    A token attends to the tokens of its window up to itself, those of `overlap` before it, and the landmarks
    of all chunks that ended before its own.

    Args:
        chunk_size: divides `window_size`.
        relative_bias: None; "table": one trained value per head and offset; "t5": one per T5 bucket of the
            offset, shared by all heads.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`, each for as many heads of queries in
            a row (grouped-query attention); None = `num_heads`. The rows of `qkv` are queries, keys, values.
        rotary_embedding: turns queries and keys, after `qk_norm`: a function or module of [B, H, N, D] and
            their int64 positions [N] or [B, N], such as `eva_attn.rotary_embedding`. Landmarks are made of
            what it returns. None = none.

    Other arguments, parameters and errors are those of `EVAttention`.

    Generation: `state = module.init_state(batch_size, max_length)`, then `module(x, state=state)` for a
    prompt, or for any further tokens, and `module.step(x, state)` for one token of each sequence. However a
    sequence is split, it gives what it gives as a whole in evaluation.
    """

    window_size: int
    chunk_size: int
    overlap: int

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window_size: int = 256,
        chunk_size: int = 128,
        overlap: int = 0,
        projection: str = "linear-layernorm",
        relative_bias: str | None = None,
        num_kv_heads: int | None = None,
        rotary_embedding: Callable[[Tensor, Tensor], Tensor] | None = None,
        qkv_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        exclude_window_landmarks: bool = False,
        log_count_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("window_size", window_size), ("chunk_size", chunk_size), ("overlap", overlap)):
            if not isinstance(size, int):
                raise TypeError(f"{name}: expected an int, got {size!r}")
        super().__init__(
            dim,
            num_heads,
            window_size=window_size,
            chunk_size=chunk_size,
            overlap=overlap,
            is_causal=True,
            projection=projection,
            relative_bias=relative_bias,
            num_kv_heads=num_kv_heads,
            rotary_embedding=rotary_embedding,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            exclude_window_landmarks=exclude_window_landmarks,
            log_count_bias=log_count_bias,
            device=device,
            dtype=dtype,
        )
        if window_size % chunk_size:
            raise ValueError(
                f"chunk_size: expected a divisor of window_size = {window_size}, got {chunk_size}"
            )

    def forward(
        self,
        x: Tensor,
        *,
        state: DecodingState | None = None,
        key_padding_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Attention of each token of `x` to itself and those before it, in its shape.

        Args:
            x: [B, N, dim].
            state: holds what came before `x`, and takes `x` in; then there are no gradients, and neither
                noise nor dropout of attention weights.
            key_padding_mask: bool [B, N]; True = padding, with a state at the end of each sequence only,
                which then moves on by its own length.
            noise: [B, H, C, D]; None draws it from N(0, 1) in training, in float32, and is 0 otherwise.

        ValueError, before anything is written, where a sequence would outgrow the state's `max_length`.
        """
        self._check_x(x)
        if state is None:
            return self._output(self._attend(x, None, key_padding_mask, noise), x.shape)
        if noise is not None:
            raise ValueError("noise: expected None with a state, where there is none")
        self._check_state(state, x)
        with torch.no_grad():
            tokens = self._unpacked(x, state.position)
            out = decoding.prefill(state, *tokens, key_padding_mask, **self.decoding_options())
            return self._output(out, x.shape)

    @torch.no_grad()
    def step(self, x: Tensor, state: DecodingState) -> Tensor:
        """Attention of the next token of each sequence, `x` [B, 1, dim], in its shape; `state` takes it in.

        ValueError as of `forward`; on CUDA not in compiled code or a CUDA graph, where what comes of a token
        too many is undefined.
        """
        self._check_x(x)
        if x.shape[1] != 1:
            raise ValueError(f"x: expected [B, 1, {self.dim}], got {tuple(x.shape)}")
        self._check_state(state, x)
        if not torch.compiler.is_compiling():
            state.reserve(1)
        out = decoding.advance(state, *self._unpacked(x, state.position), **self.decoding_options())
        return self._output(out, x.shape)

    def init_state(self, batch_size: int, max_length: int) -> DecodingState:
        """The state of `batch_size` empty sequences of at most `max_length` tokens each.

        Its memory, on the device and in the dtype of the weights, grows with `max_length` by a landmark for
        every chunk alone, and is all allocated here.
        """
        _at_least("batch_size", batch_size, 1)
        _at_least("max_length", max_length, 1)
        weight = self.qkv.weight
        return DecodingState.zeros(
            batch_size,
            self.num_heads,
            self.head_dim,
            max_length=max_length,
            window_size=self.window_size,
            chunk_size=self.chunk_size,
            overlap=self.overlap,
            tangent=is_tangent(self.landmark_projection),
            device=weight.device,
            dtype=weight.dtype,
        )

    def _check_x(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x: expected [B, N, {self.dim}], got {tuple(x.shape)}")

    def _check_state(self, state: DecodingState, x: Tensor) -> None:
        expected = (x.shape[0], self.num_heads, self.window_size + self.overlap, self.head_dim)
        if state.window_key.shape != expected or state.chunk_size != self.chunk_size:
            raise ValueError(
                f"state: expected windows {expected} and chunks of {self.chunk_size} tokens, "
                f"got {tuple(state.window_key.shape)} and {state.chunk_size}"
            )
        if (state.landmark_entropy is not None) != is_tangent(self.landmark_projection):
            raise ValueError(
                f"state: expected one made for projection = {self.landmark_projection.kind!r}, got one "
                f"{'without' if state.landmark_entropy is None else 'with'} entropies of tangents"
            )

    def decoding_options(self) -> dict[str, Any]:
        """The arguments of `decoding.advance` beside state, queries, keys and values."""
        return {
            "projection": self.landmark_projection,
            "relative_bias": self._offset_bias(),
            "exclude_window_landmarks": self.exclude_window_landmarks,
            "log_count_bias": self.log_count_bias,
        }


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
