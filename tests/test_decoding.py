"""Causal EVA token by token against the same module on whole sequences."""

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import KINDS, seeded
from torch import Tensor, nn

from eva_attn import CausalEVAttention, rotary_embedding
from eva_attn.decoding import DecodingState

TOLERANCE = 1e-12


def module_of(dtype: torch.dtype = torch.float64, **options: Any) -> CausalEVAttention:
    """2 heads of dimension 6 in evaluation, whose parameters all matter."""
    options = {"window_size": 6, "chunk_size": 3, **options}
    module = CausalEVAttention(12, 2, **options, dtype=dtype).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def tokens_of(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 12, dtype=dtype)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def decode(module: CausalEVAttention, state: DecodingState, x: Tensor) -> Tensor:
    return torch.cat([module.step(x[:, [i]], state) for i in range(x.shape[1])], 1)


OPTIONS = {
    "plain": {},
    "window of one chunk": {"window_size": 3},
    "overlap": {"overlap": 4},
    "table": {"overlap": 1, "relative_bias": "table"},
    "t5": {"relative_bias": "t5", "log_count_bias": True},
    "exclude": {"overlap": 2, "exclude_window_landmarks": True, "log_count_bias": True},
    "qk norm": {"qk_norm": nn.LayerNorm, "projection": "key-only"},
    "rotary": {"rotary_embedding": rotary_embedding, "qk_norm": nn.LayerNorm},
    "tangent": {"projection": "tangent", "overlap": 2, "exclude_window_landmarks": True},
    "grouped": {"rotary_embedding": rotary_embedding, "num_kv_heads": 1, "overlap": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_equal_the_whole(name: str) -> None:
    torch.manual_seed(0)
    module = module_of(**OPTIONS[name])
    x = tokens_of(2, 26)
    assert_equal(decode(module, module.init_state(2, 26), x), module(x))


@seeded(80)
@given(data=st.data())
def test_any_split_equals_the_whole(data: st.DataObject) -> None:
    """Sequences of different lengths, in prefills with padding and steps; padding holds NaN."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    chunk = draw(st.integers(1, 4))
    projection = draw(st.sampled_from(KINDS))
    module = module_of(
        window_size=chunk * draw(st.integers(1, 3)),
        chunk_size=chunk,
        overlap=draw(st.integers(0, 5)),
        relative_bias=draw(st.sampled_from([None, "table", "t5"])),
        projection=projection,
        exclude_window_landmarks=draw(st.booleans()),
        log_count_bias=draw(st.booleans()) and projection != "tangent",
        rotary_embedding=draw(st.sampled_from([None, rotary_embedding])),
        num_kv_heads=draw(st.sampled_from([None, 1])),
    )
    batch = draw(st.integers(1, 3))
    lengths = st.lists(st.integers(0, 11), min_size=batch, max_size=batch)
    calls = draw(st.lists(st.one_of(st.just([1] * batch), lengths), min_size=1, max_size=8))

    totals = [sum(x) for x in zip(*calls, strict=True)]
    longest = max(1, *totals)
    whole = tokens_of(batch, longest)
    padding = torch.arange(longest) >= torch.tensor(totals)[:, None]
    expected = module(whole, key_padding_mask=padding)

    state = module.init_state(batch, longest)
    begin = [0] * batch
    for taken in calls:
        x = torch.full((batch, max(taken), 12), torch.nan, dtype=torch.float64)
        for b, (start, n) in enumerate(zip(begin, taken, strict=True)):
            x[b, :n] = whole[b, start : start + n]
        if taken == [1] * batch:
            out = module.step(x, state)
        else:
            mask = torch.arange(x.shape[1]) >= torch.tensor(taken)[:, None]
            out = module(x, state=state, key_padding_mask=mask)
        for b, (start, n) in enumerate(zip(begin, taken, strict=True)):
            assert_equal(out[b, :n], expected[b, start : start + n])
        begin = [start + n for start, n in zip(begin, taken, strict=True)]
        assert state.position.tolist() == begin


@pytest.mark.parametrize("first", [0, 1, 17])
@pytest.mark.parametrize(
    "options", [{}, OPTIONS["rotary"], OPTIONS["grouped"]], ids=["", "rotary", "grouped"]
)
def test_clones_reorders_and_resets(first: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = module_of(
        **{"overlap": 2, "relative_bias": "table", "exclude_window_landmarks": True, **options}
    )
    x, more = tokens_of(3, 17), tokens_of(3, 9)
    state = module.init_state(3, 40)
    module(x[:, :first], state=state)
    module(x[:, first:], state=state)

    copy = state.clone()
    copy.reorder([2, 0, 2])
    expected = module(torch.cat([x[[2, 0, 2]], more], 1))[:, 17:]
    assert_equal(decode(module, copy, more), expected)

    copy = state.clone()
    copy.reset(torch.tensor([1]))
    assert copy.position.tolist() == [17, 0, 17]
    out = torch.cat([module(more[:, :4], state=copy), decode(module, copy, more[:, 4:])], 1)
    assert_equal(out[[0, 2]], module(torch.cat([x, more], 1))[[0, 2], 17:])
    assert_equal(out[1], module(more)[1])

    copy.reset()
    assert_equal(decode(module, copy, more), module(more))
    assert_equal(decode(module, state, more), module(torch.cat([x, more], 1))[:, 17:])


def test_a_reset_sequence_is_rid_of_nan() -> None:
    module = module_of()
    state = module.init_state(2, 20)
    x = tokens_of(2, 10)
    x[0] = torch.nan
    assert module(x, state=state)[0].isnan().all()
    state.reset([0])
    more = tokens_of(2, 4)
    assert_equal(decode(module, state, more)[0], module(more)[0])


def test_memory_is_fixed() -> None:
    module = module_of(overlap=2)
    state = module.init_state(2, 50)
    before = {name: x.data_ptr() for name, x in vars(state).items() if isinstance(x, Tensor)}
    module(tokens_of(2, 31), state=state)
    decode(module, state, tokens_of(2, 19))
    after = {name: x.data_ptr() for name, x in vars(state).items() if isinstance(x, Tensor)}
    assert before == after
    assert state.landmark_key.shape == (2, 2, 17, 6)
    assert state.window_key.shape == (2, 2, 8, 6)
    assert not any(x.requires_grad for x in vars(state).values() if isinstance(x, Tensor))


def test_same_bits_again() -> None:
    torch.manual_seed(0)
    module = module_of(torch.float32)
    x = tokens_of(2, 20, torch.float32)
    first, second = module.init_state(2, 20), module.init_state(2, 20)
    assert torch.equal(decode(module, first, x), decode(module, second, x))


def test_saves_and_loads() -> None:
    module = module_of()
    state = module.init_state(2, 20)
    x = tokens_of(2, 20)
    module(x[:, :11], state=state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.serialization.safe_globals([DecodingState]):
        loaded = torch.load(file)
    assert_equal(decode(module, loaded, x[:, 11:]), module(x)[:, 11:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = module_of(dtype, relative_bias="table")
    x = tokens_of(2, 20, dtype)
    state = module.init_state(2, 20)
    assert state.window_key.dtype == state.landmark_value.dtype == dtype
    out = torch.cat([module(x[:, :7], state=state), decode(module, state, x[:, 7:])], 1)
    assert out.dtype == dtype
    # Sums of 12 numbers of order 1 in another order, rounded to the dtype a few times.
    bound = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, module(x), rtol=bound, atol=bound)


def test_autocast() -> None:
    torch.manual_seed(0)
    module = module_of(torch.float32)
    x = tokens_of(2, 20, torch.float32)
    state = module.init_state(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.cat([module(x[:, :7], state=state), decode(module, state, x[:, 7:])], 1)
    assert out.dtype == torch.bfloat16
    assert state.window_key.dtype == torch.float32
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)


def test_a_step_compiles_once() -> None:
    torch.manual_seed(0)
    module = module_of(
        relative_bias="t5", exclude_window_landmarks=True, num_kv_heads=1, rotary_embedding=rotary_embedding
    )
    x = tokens_of(2, 20)
    state = module.init_state(2, 20)
    module(x[:, :4], state=state)
    torch._dynamo.reset()
    step = torch.compile(module.step, fullgraph=True, backend="aot_eager")
    out = [step(x[:, [4]], state)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        out += [step(x[:, [i]], state) for i in range(5, 20)]
    assert_equal(torch.cat(out, 1), module(x)[:, 4:])


def test_training_mode_changes_nothing_but_output_dropout() -> None:
    module = module_of(attn_drop=0.5).train()
    x = tokens_of(2, 9)
    assert_equal(decode(module, module.init_state(2, 9), x), module.eval()(x))


def held(state: DecodingState) -> list[Tensor]:
    return [x.clone() for x in vars(state).values() if isinstance(x, Tensor)]


def test_refuses_more_than_there_is_room_for() -> None:
    """Before anything is written, and by what the sequences are, not by how they got there."""
    module = module_of()
    state = module.init_state(2, 8)
    x = tokens_of(2, 9)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 8:] = True
    attempts = [
        (lambda: module(x, state=state), 0),
        (lambda: module(x[:, :1], state=state), 8),
        (lambda: module.step(x[:, :1], state), 8),
    ]
    for attempt, length in attempts:
        if length and not state.position.any():
            module(x, state=state, key_padding_mask=mask)
        before = held(state)
        with pytest.raises(ValueError, match=r"state: expected .* max_length = 8 tokens, got 9"):
            attempt()
        assert all(map(torch.equal, held(state), before))
    state.reset([0])
    with pytest.raises(ValueError, match="max_length = 8"):
        module.step(x[:, :1], state)
    state.reorder([0, 0])
    assert_equal(decode(module, state, x[:, :8]), module(x[:, :8]))


@pytest.mark.parametrize(
    ("shape", "arguments", "error", "words"),
    [
        ((2, 3, 13), {}, ValueError, ["x", "(2, 3, 13)", "[B, N, 12]"]),
        ((3, 3, 12), {}, ValueError, ["state", "(3, 2, 6, 6)", "(2, 2, 6, 6)"]),
        ((2, 3, 12), {"noise": torch.zeros(2, 2, 1, 6)}, ValueError, ["noise", "None"]),
        (
            (2, 3, 12),
            {"key_padding_mask": torch.tensor([[False, True, False]] * 2)},
            ValueError,
            ["key_padding_mask", "end"],
        ),
        (
            (2, 3, 12),
            {"key_padding_mask": torch.zeros(2, 4).bool()},
            ValueError,
            ["key_padding_mask", "(2, 4)"],
        ),
        ((2, 3, 12), {"key_padding_mask": torch.zeros(2, 3)}, TypeError, ["key_padding_mask", "float32"]),
    ],
)
def test_refuses(shape: Any, arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    module = module_of()
    state = module.init_state(2, 8)
    before = held(state)
    with pytest.raises(error) as raised:
        module(torch.zeros(shape, dtype=torch.float64), state=state, **arguments)
    assert all(word in str(raised.value) for word in words), raised.value
    assert all(map(torch.equal, held(state), before))


def test_refuses_otherwise() -> None:
    module = module_of()
    state = module.init_state(2, 8)
    with pytest.raises(ValueError, match=r"x: expected \[B, 1, 12\], got \(2, 2, 12\)"):
        module.step(tokens_of(2, 2), state)
    with pytest.raises(ValueError, match="state: expected windows"):
        module_of(window_size=3).step(tokens_of(2, 1), state)
    with pytest.raises(ValueError, match=r"state: .* chunks of 2 tokens"):
        module_of(chunk_size=2).step(tokens_of(2, 1), state)
    with pytest.raises(ValueError, match=r"indices: expected one for each of 2 sequences, got shape \(1,\)"):
        state.reorder([0])
    for arguments, name in (((0, 8), "batch_size"), ((2, 0), "max_length")):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            module.init_state(*arguments)
