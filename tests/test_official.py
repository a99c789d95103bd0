"""`eva_attn.official` against what the authors' code computed (data/README.md), and its own limits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eva_attn import official

_GOLDEN = Path(__file__).parent / "data" / "official.safetensors"

# Largest difference by largest entry: rounding in float64 comes to 2e-15 here, a formula that is off to 1e-3.
_TOLERANCE = 1e-9

with safe_open(_GOLDEN, "pt") as _file:
    _CASES = {name: json.loads(text) for name, text in sorted(_file.metadata().items())}

# The operator that a case goes through. The others have padding, a bias that is not one of offsets, or chunks
# that leave out tokens, or are causal or KernelizedAttention.
_OPERATORS = {
    "eva1d_attndrop": "eva_attention_qkvpacked",
    "eva1d_plain_train": "eva_attention_qkvpacked",
    "eva1d_t5_overlap_noln_train": "eva_attention_qkvpacked",
    "eva2d_noln_eval": "eva_attention_qkvpacked",
    "eva2d_none_train": "eva_attention_qkvpacked",
    "eva2d_overlap_rpe_train": "eva_attention_qkvpacked",
    "eva2d_plain_train": "eva_attention_qkvpacked",
    "eva2d_rpe_eval": "eva_attention_qkvpacked",
    "eva2d_rpe_train": "eva_attention_qkvpacked",
    "local2d_rpe": "window_attention",
}


class _Calls(TorchDispatchMode):
    """Operators of eva_attn that run, with their results; backward ones are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, tuple[Tensor, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        namespace, name = func.name().split("::")
        if namespace == "eva_attn" and not name.endswith("_backward"):
            self.results[name] = result
        return result


def _load(case: str) -> dict[str, Tensor]:
    with safe_open(_GOLDEN, "pt") as file:
        return {
            name.removeprefix(f"{case}/"): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 (a file is no mapping)
            if name.startswith(f"{case}/")
        }


def _module(case: str, tensors: dict[str, Tensor]) -> nn.Module:
    info = _CASES[case]
    module = official.build(info["module"], json.loads(info["kwargs"])).double()
    state = {
        name.split(".", 1)[1]: t for name, t in tensors.items() if name.startswith(("param.", "buffer."))
    }
    module.load_state_dict(state, strict=True)
    return module.train(info["train"])


def _build(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A module in float64 whose parameters are all well away from 0."""
    generator = torch.Generator().manual_seed(seed)
    module = official.build(name, kwargs).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _close(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, name
    assert (actual - expected).abs().max() <= _TOLERANCE * expected.abs().max(), name


def _plain_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (official.LocalAttention, official.EVA):
        monkeypatch.setattr(module, "_has_offset_bias", lambda self: False)


def _golden(case: str, tensors: dict[str, Tensor]) -> _Calls:
    """Runs a case forward and backward, checks all that was recorded but the middle of it."""
    module = _module(case, tensors)
    x = tensors["x"].requires_grad_()
    with _Calls() as calls:
        out = module(x, key_padding_mask=tensors.get("key_padding_mask"), noise=tensors.get("noise"))
    out.backward(tensors["grad_out"])
    results = {"out": out, "grad_x": x.grad}
    results |= {f"grad.{name}": parameter.grad for name, parameter in module.named_parameters()}
    assert {name for name in tensors if name.startswith("grad.")} == set(results) - {"out", "grad_x"}
    for name, actual in results.items():
        _close(name, actual, tensors[name])
    return calls


@pytest.mark.parametrize("case", _CASES)
def test_golden(case: str) -> None:
    tensors = _load(case)
    calls = _golden(case, tensors)
    assert list(calls.results) == ([_OPERATORS[case]] if case in _OPERATORS else [])
    if "mid.mean_key" in tensors and case in _OPERATORS:
        _, _, landmarks, statistics = calls.results[_OPERATORS[case]]
        mean_key, mean_query = statistics.view_as(landmarks)
        _close("mid.landmark_key", landmarks[0], tensors["mid.landmark_key"])
        _close("mid.mean_key", mean_key, tensors["mid.mean_key"])
        if "mid.landmark_query" in tensors:
            landmark_query = _module(case, tensors).adaptive_mu_q(mean_query)
            _close("mid.landmark_query", landmark_query, tensors["mid.landmark_query"])


@pytest.mark.parametrize("case", _CASES)
def test_golden_in_plain_pytorch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _plain_only(monkeypatch)
    seen: dict[str, Tensor] = {}

    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        name = names[module]
        seen[f"mid.landmark_{name}"] = output
        seen[f"mid.mean_{name}"] = inputs[0]

    names: dict[nn.Module, str] = {}
    build = official.build

    def build_and_watch(name: str, kwargs: dict[str, Any]) -> nn.Module:
        module = build(name, kwargs)
        for part in ("key", "query"):
            projection = getattr(module, f"adaptive_mu_{part[0]}", None)
            if projection is not None:
                names[projection] = part
                projection.register_forward_hook(record)
        return module

    monkeypatch.setattr(official, "build", build_and_watch)
    tensors = _load(case)
    assert not _golden(case, tensors).results
    for name, expected in tensors.items():
        if name.startswith("mid."):
            _close(name, seen[name], expected)


@pytest.mark.parametrize("case", _CASES)
def test_state_dict_has_the_authors_names(case: str) -> None:
    tensors = _load(case)
    state = _module(case, tensors).state_dict()
    expected = {n.split(".", 1)[1]: t for n, t in tensors.items() if n.startswith(("param.", "buffer."))}
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in expected.items()}
    if "relative_position_index" in state:
        fresh = official.build(_CASES[case]["module"], _CASES[case]["kwargs"])
        assert torch.equal(fresh.relative_position_index, expected["relative_position_index"])


# What the recorded cases do not have: ragged ends, chunks larger than windows, odd head dimensions.
_COVERED = [
    ("EVA", {"window_size": 5, "num_landmarks": 4}, (2, 18)),
    ("EVA", {"window_size": 4, "num_landmarks": 3}, (2, 8)),
    ("EVA", {"window_size": 5, "num_landmarks": 3, "overlap_window": True}, (2, 18)),
    ("EVA", {"window_size": 3, "num_landmarks": 1, "use_t5_rpe": True}, (2, 11)),
    ("EVA", {"window_size": 8, "num_landmarks": 2, "use_t5_rpe": True, "overlap_window": True}, (1, 29)),
    ("EVA", {"window_size": 40, "num_landmarks": 5, "use_t5_rpe": True, "adaptive_proj": "none"}, (2, 80)),
    ("EVA", {"window_size": 1, "num_landmarks": 6, "overlap_window": True, "adaptive_proj": "no-ln"}, (2, 6)),
    ("EVA", {"window_size": 2, "num_landmarks": 6, "attn_2d": True, "use_rpe": True}, (2, 4, 6)),
    (
        "EVA",
        {"window_size": 3, "num_landmarks": 2, "attn_2d": True, "overlap_window": True, "use_rpe": True},
        (1, 6, 3),
    ),
    ("EVA", {"window_size": 4, "num_landmarks": 1, "attn_2d": True, "qkv_bias": False}, (2, 4, 4)),
    ("LocalAttention", {"window_size": 5}, (2, 18)),
    ("LocalAttention", {"window_size": 4, "overlap_window": True}, (2, 4, 5)),
    ("LocalAttention", {"window_size": 3, "attn_2d": True, "overlap_window": True, "use_rpe": True}, (2, 36)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "kwargs", "shape"), _COVERED)
def test_operators_compute_what_plain_pytorch_computes(
    name: str, kwargs: dict[str, Any], shape: tuple[int, ...], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _build(name, dim=15, num_heads=3, **kwargs).train(training)
    x = _random(*shape, 15)
    grad_out = _random(*shape, 15, seed=2)
    inputs = [x, *module.parameters()]

    def run() -> list[Tensor]:
        torch.manual_seed(3)  # the noise
        out = module(x.requires_grad_())
        return [out, *torch.autograd.grad(out, inputs, grad_out)]

    with _Calls() as calls:
        through_operators = run()
    assert list(calls.results) == [
        "window_attention" if name == "LocalAttention" else "eva_attention_qkvpacked"
    ]
    _plain_only(monkeypatch)
    for index, (actual, expected) in enumerate(zip(through_operators, run(), strict=True)):
        # Where a chunk has one key, its projection's gradient is 0 but for rounding.
        assert (actual - expected).abs().max() <= _TOLERANCE * expected.abs().max() + 1e-13, index


@pytest.mark.parametrize(
    ("name", "kwargs", "shape"),
    [
        ("EVA", {"dim": 8, "num_heads": 2, "window_size": 4, "num_landmarks": 3}, (2, 9, 8)),
        ("KernelizedAttention", {"dim": 8, "num_heads": 2, "approx_attn_dim": 6}, (2, 3, 3, 8)),
        (
            "CausalEVAttention",
            {
                "embed_dim": 8,
                "num_heads": 2,
                "dropout": 0.3,
                "attn_args": {"window_size": 4, "chunk_size": 2, "causal": True, "adaptive_proj": "qk"},
            },
            (9, 2, 8),
        ),
    ],
)
def test_noise_is_drawn_in_training_alone(name: str, kwargs: dict[str, Any], shape: tuple[int, ...]) -> None:
    module, x = _build(name, **kwargs), _random(*shape)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    torch.manual_seed(0)
    first, second = module(x, key_padding_mask=mask), module(x, key_padding_mask=mask)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, module(x, key_padding_mask=mask))
    module.eval()
    assert torch.equal(module(x, key_padding_mask=mask), module(x, key_padding_mask=mask))


def test_causal_dropout_scales_what_it_keeps() -> None:
    args = {"window_size": 4, "chunk_size": 2, "causal": True, "adaptive_proj": "qk"}
    module = _build("CausalEVAttention", embed_dim=4, num_heads=1, dropout=0.5, attn_args=args)
    x = _random(8, 1, 4)
    torch.manual_seed(0)
    mean = module(x.expand(-1, 4000, -1), noise=torch.zeros(4000, 1, 4, 4)).mean(1, keepdim=True)
    # The deviation of the mean of 4000 is under 0.01: six of them.
    torch.testing.assert_close(mean, module.eval()(x), atol=0.06, rtol=0)


def test_causal_sees_no_later_token() -> None:
    args = {"window_size": 8, "num_chunks": 4, "causal": True, "adaptive_proj": "no-ln", "use_t5_rpe": True}
    module = _build("CausalEVAttention", embed_dim=6, num_heads=2, attn_args=args).eval()
    x = _random(22, 2, 6)  # in 24 tokens, 4 chunks of 6 that straddle windows of 8
    changed = x.clone()
    changed[13:] += 1
    assert torch.equal(module(x)[:13], module(changed)[:13])
    assert not torch.equal(module(x)[13:], module(changed)[13:])


def test_fully_masked_window_is_the_mean_of_its_values() -> None:
    module = _build("LocalAttention", dim=6, num_heads=2, window_size=3, overlap_window=True)
    x = _random(2, 9, 6)
    out = module(x, key_padding_mask=torch.ones(2, 9, dtype=torch.bool))
    value = nn.functional.pad(module.qkv(x)[..., 12:], (0, 0, 1, 1))  # zeros outside the sequence count
    means = torch.stack([value[:, start : start + 5].mean(1) for start in (0, 3, 6)], 1)
    torch.testing.assert_close(out, module.proj(means).repeat_interleave(3, 1), atol=1e-14, rtol=1e-12)


def test_mask_dtypes_and_forms_of_kwargs_agree() -> None:
    kwargs = {"dim": 8, "num_heads": 2, "window_size": 4, "num_landmarks": 3}
    module = _build("EVA", **kwargs).eval()
    again = official.build("EVA", json.dumps(kwargs)).double().eval()
    again.load_state_dict(module.state_dict())
    x, mask = _random(2, 12, 8), torch.arange(12) >= torch.tensor([[12], [7]])
    assert torch.equal(module(x, key_padding_mask=mask), again(x, key_padding_mask=mask.to(torch.uint8)))


def test_defaults_are_the_authors() -> None:
    eva = official.build("EVA", {"dim": 8, "num_heads": 2})
    assert eva.window == (1, 2)
    assert eva.num_landmarks == 49
    assert eva.qkv.bias is not None
    assert len(eva.adaptive_mu_q) == len(eva.adaptive_mu_k) == 2
    assert official.build("KernelizedAttention", {"dim": 8, "num_heads": 2}).eval_proj.shape == (2, 64, 4)


@pytest.mark.parametrize("kwargs", [{}, {"attn_2d": True, "use_rpe": True}, {"use_t5_rpe": True}])
def test_offset_bias_by_definition(kwargs: dict[str, Any]) -> None:
    module = _build("EVA", dim=8, num_heads=2, window_size=4, overlap_window=True, **kwargs)
    bias = module.offset_bias()
    if not kwargs:
        assert bias is None
        return
    pairs = module._window_bias()  # [H, I, J]
    w, e = 4, 2
    query, key = torch.arange(w), torch.arange(-e, w + e)
    index = key - query[:, None] + w + e - 1
    if "attn_2d" in kwargs:
        expected = bias[:, index[:, None, :, None], index[None, :, None, :]].reshape(2, w * w, -1)
    else:
        expected = bias[:, index]
    assert torch.equal(pairs, expected)


_CAUSAL = {"embed_dim": 8, "num_heads": 2}
_CAUSAL_ARGS = {"window_size": 4, "chunk_size": 2, "causal": True, "adaptive_proj": "qk"}


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("Softmax", {}, ValueError, "name: expected one of 'EVA', 'LocalAttention', .* got 'Softmax'"),
        ("EVA", [], TypeError, "kwargs: expected a mapping"),
        (
            "EVA",
            {"dim": 8},
            TypeError,
            "missing argument 'num_heads'; supported: dim, num_heads, .*window_size",
        ),
        (
            "EVA",
            {"dim": 8, "num_heads": 2, "chunks": 3},
            TypeError,
            "unknown argument 'chunks'; supported: dim",
        ),
        (
            "LocalAttention",
            {"dim": 8, "num_heads": 2, "num_landmarks": 3},
            TypeError,
            "'num_landmarks'; supported",
        ),
        ("EVA", {"dim": 8, "num_heads": 3}, ValueError, "dim: expected a multiple of num_heads = 3, got 8"),
        (
            "EVA",
            {"dim": 8, "num_heads": 2, "window_size": 0},
            ValueError,
            "window_size: expected at least 1, got 0",
        ),
        (
            "EVA",
            {"dim": 8, "num_heads": 2, "window_size": 2.0},
            TypeError,
            "window_size: expected an int, got 2.0",
        ),
        (
            "EVA",
            {"dim": 8, "num_heads": 2, "num_landmarks": 0},
            ValueError,
            "num_landmarks: expected at least 1",
        ),
        ("EVA", {"dim": 8, "num_heads": 2, "attn_2d": 1}, TypeError, "attn_2d: expected a bool, got 1"),
        (
            "EVA",
            {"dim": 8, "num_heads": 2, "attn_drop": 1.0},
            ValueError,
            r"attn_drop: expected .*\[0, 1\), got 1.0",
        ),
        (
            "EVA",
            {"dim": 8, "num_heads": 2, "proj_drop": -0.1},
            ValueError,
            "proj_drop: expected a probability",
        ),
        (
            "EVA",
            {"dim": 8, "num_heads": 2, "adaptive_proj": "qk"},
            ValueError,
            "adaptive_proj: .*'no-ln', 'none'",
        ),
        (
            "EVA",
            {"dim": 8, "num_heads": 2, "use_rpe": True, "use_t5_rpe": True},
            ValueError,
            "use_rpe, use_t5_rpe",
        ),
        (
            "EVA",
            {"dim": 8, "num_heads": 2, "window_size": 4, "attn_2d": True, "use_t5_rpe": True},
            ValueError,
            r"use_t5_rpe: .* got 4, where distances up to 15",
        ),
        (
            "KernelizedAttention",
            {"dim": 8, "num_heads": 2, "proj_method": "relu"},
            ValueError,
            "only 'favorp'",
        ),
        (
            "KernelizedAttention",
            {"dim": 8, "num_heads": 2, "cos_weighting": True},
            ValueError,
            "cos_weighting",
        ),
        (
            "KernelizedAttention",
            {"dim": 8, "num_heads": 2, "sample_scheme": "fixed"},
            ValueError,
            "only 'default'",
        ),
        ("CausalEVAttention", _CAUSAL, TypeError, "missing argument 'attn_args'; supported: embed_dim"),
        ("CausalEVAttention", {**_CAUSAL, "attn_args": 3}, TypeError, "attn_args: expected a mapping, got 3"),
        (
            "CausalEVAttention",
            {**_CAUSAL, "attn_args": {**_CAUSAL_ARGS, "window": 3}},
            TypeError,
            "attn_args: unknown argument 'window'; supported: window_size",
        ),
        (
            "CausalEVAttention",
            {**_CAUSAL, "attn_args": {**_CAUSAL_ARGS, "causal": False}},
            ValueError,
            r"attn_args\['causal'\]: only True is offered, got False",
        ),
        (
            "CausalEVAttention",
            {**_CAUSAL, "attn_args": {**_CAUSAL_ARGS, "chunk_size": 3}},
            ValueError,
            "expected a divisor of window_size = 4, got 3",
        ),
        (
            "CausalEVAttention",
            {**_CAUSAL, "attn_args": {**_CAUSAL_ARGS, "chunk_size": None}},
            ValueError,
            "expected chunk_size or num_chunks, got neither",
        ),
        (
            "CausalEVAttention",
            {**_CAUSAL, "attn_args": {**_CAUSAL_ARGS, "adaptive_proj": "default"}},
            ValueError,
            "adaptive_proj: expected one of 'qk', 'no-ln', got 'default'",
        ),
        (
            "CausalEVAttention",
            {**_CAUSAL, "attn_args": _CAUSAL_ARGS, "kdim": 4},
            ValueError,
            "kdim: .*= 8.* got 4",
        ),
        ("CausalEVAttention", {**_CAUSAL, "attn_args": _CAUSAL_ARGS, "q_noise": 0.1}, ValueError, "q_noise"),
    ],
)
def test_bad_arguments(name: str, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        official.build(name, kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "shape", "inputs", "error", "message"),
    [
        ("EVA", {}, (2, 9), {}, ValueError, r"x: expected \[B, N, 8\], got shape \(2, 9\)"),
        ("EVA", {}, (2, 9, 6), {}, ValueError, "x: expected"),
        ("EVA", {}, (2, 3, 3, 8), {}, ValueError, "x: expected"),
        ("EVA", {"attn_2d": True}, (2, 9, 8), {}, ValueError, r"x: expected \[B, height, width, 8\]"),
        (
            "EVA",
            {"attn_2d": True},
            (2, 4, 3, 8),
            {},
            ValueError,
            "multiples of window_size = 2, got a grid of 4 x 3",
        ),
        (
            "EVA",
            {"num_landmarks": 9},
            (2, 8, 8),
            {},
            ValueError,
            "num_landmarks: expected at most the 8 tokens, got 9",
        ),
        (
            "EVA",
            {"num_landmarks": 3},
            (2, 8, 8),
            {"noise": (2, 2, 2, 4)},
            ValueError,
            "noise: expected shape",
        ),
        (
            "EVA",
            {"num_landmarks": 3, "window_size": 7},
            (2, 14, 8),
            {},
            ValueError,
            "must tile .* 1 x 4 .* 1 x 14",
        ),
        (
            "EVA",
            {"num_landmarks": 4, "mask": (2, 7)},
            (2, 8, 8),
            {},
            ValueError,
            r"key_padding_mask: .*\(2, 8\)",
        ),
        ("LocalAttention", {}, (2, 8, 8), {"noise": (2, 2, 2, 4)}, ValueError, "noise: expected None"),
        ("LocalAttention", {"attn_2d": True}, (2, 2, 8, 8), {}, ValueError, "x: expected a square grid"),
        ("LocalAttention", {"attn_2d": True}, (2, 8, 8), {}, ValueError, "x: expected a square grid"),
        ("KernelizedAttention", {}, (2, 8, 8), {"noise": (2, 64, 3)}, ValueError, r"noise: .*\(2, 64, 4\)"),
    ],
)
def test_bad_input(
    name: str,
    kwargs: dict[str, Any],
    shape: tuple[int, ...],
    inputs: dict[str, tuple[int, ...]],
    error: type[Exception],
    message: str,
) -> None:
    kwargs = dict(kwargs)
    mask = kwargs.pop("mask", None)
    module = official.build(name, {"dim": 8, "num_heads": 2, **kwargs})
    options = {key: torch.zeros(size) for key, size in inputs.items()}
    if mask is not None:
        options["key_padding_mask"] = torch.zeros(mask, dtype=torch.bool)
    with pytest.raises(error, match=message):
        module(torch.zeros(shape), **options)


def test_mask_of_another_dtype() -> None:
    module = official.build("KernelizedAttention", {"dim": 8, "num_heads": 2})
    with pytest.raises(TypeError, match=r"key_padding_mask: expected bool or uint8, got torch.float32"):
        module(torch.zeros(2, 8, 8), key_padding_mask=torch.zeros(2, 8))


def test_causal_chunks_that_do_not_tile() -> None:
    args = {**_CAUSAL_ARGS, "window_size": 5, "chunk_size": None, "num_chunks": 3}
    module = official.build("CausalEVAttention", {**_CAUSAL, "attn_args": args})
    with pytest.raises(ValueError, match=r"chunks of 3 for num_chunks=3 on 10 tokens"):
        module(torch.zeros(7, 2, 8))
    with pytest.raises(ValueError, match=r"x: expected \[N, B, 8\]"):
        module(torch.zeros(8, 2, 7))


def test_offset_bias_is_refused_where_offsets_do_not_determine_it() -> None:
    for kwargs in ({"use_rpe": True}, {"attn_2d": True, "use_t5_rpe": True, "window_size": 7}):
        module = official.build("EVA", {"dim": 8, "num_heads": 2, **kwargs})
        with pytest.raises(ValueError, match="offset_bias"):
            module.offset_bias()
