"""Advice on settings: times between measured ones, none beyond, and softmax where it wins."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import eva_attn
from benchmarks import choices
from eva_attn import __main__, advice, advise

HERE = advice.device_name(torch.device("cpu"))


def row(tokens: int, head_dim: int, setting: list[int] | None, forward: float, training: float) -> dict:
    about = {"kind": "grid", "tokens": tokens, "head_dim": head_dim, "setting": setting}
    return {**about, "forward": forward, "training": training}


@pytest.fixture
def table(tmp_path):
    """Softmax quadratic, EVA linear in tokens, both linear in the head dimension."""
    rows = []
    for head_dim in (32, 64):
        for tokens in (196, 3136):
            rows.append(row(tokens, head_dim, None, head_dim * tokens**2 / 1e6, head_dim * tokens**2 / 2e5))
            rows.append(row(tokens, head_dim, [7, 49], head_dim * tokens / 1e3, head_dim * tokens / 2e2))
    path = tmp_path / "table.json"
    content = {"device": HERE, "date": "2020-01-01", "dtype": "float32", "results": rows}
    path.write_text(json.dumps(content))
    return path


def test_times_between_measured_ones(table):
    (found,) = advise((2, 3, 784, 48), grid_size=(28, 28), table=table)
    softmax, eva, *others = found.choices
    assert softmax.milliseconds == pytest.approx((6 * 48 * 784**2 / 1e6, 6 * 48 * 784**2 / 2e5))
    assert eva.milliseconds == pytest.approx((6 * 48 * 784 / 1e3, 6 * 48 * 784 / 2e2))
    assert all(x.milliseconds == (None, None) for x in others)
    assert found.best is softmax
    assert f"Take softmax: it is exact, and no choice here trains {advice._WORTH} times as fast" in str(found)
    (found,) = advise((2, 3, 3136, 64), grid_size=(56, 56), table=table)
    assert found.best.options == {"window_size": 7, "num_landmarks": 49}
    assert "Fastest in training: EVA, window 7 x 7, 49 landmarks, 3.1 times softmax" in str(found)
    assert "2020-01-01" in str(found)


@pytest.mark.parametrize(
    ("shape", "grid_size"),
    [((1, 1, 12544, 64), (112, 112)), ((1, 1, 784, 128), (28, 28)), ((1, 1, 784, 64), None)],
)
def test_no_times_beyond_measured_ones(table, shape, grid_size):
    (found,) = advise(shape, grid_size=grid_size, table=table)
    assert all(x.milliseconds == (None, None) for x in found.choices)
    assert found.best is None
    assert "outside what was measured" in str(found)


def test_says_where_nothing_was_measured(table):
    (found,) = advise((1, 1, 784, 64), grid_size=(28, 28), dtype=torch.float64, table=table)
    assert found.measured is None
    assert "No times were measured" in str(found)
    assert "-" in str(found).splitlines()[2].split()


def test_too_few_tokens(table):
    assert "Take softmax: these are too few tokens" in str(
        advise((1, 1, 49, 64), grid_size=(7, 7), table=table)
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_counts_what_runs_and_is_kept(is_causal):
    shape = (2, 3, 600, 16)
    (found,) = advise(shape, is_causal=is_causal)
    for choice in found.choices:
        query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
        kept: dict[int, int] = {}

        def keep(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            if choice.options is None:
                out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
            else:
                options = dict(choice.options)
                chunk = options.pop("chunk_size", None) or 600 // options.pop("num_landmarks")
                out = eva_attn.eva_attention(
                    query, key, value, chunk_size=chunk, is_causal=is_causal, **options
                )
        assert out.shape == shape
        # The CPU's softmax has no formula in torch.
        flops = counter.get_total_flops() if choice.options else 4 * 2 * 3 * 600**2 * 16
        assert choice.flops == flops
        assert choice.saved_bytes == pytest.approx(sum(kept.values()), rel=0.01)


def test_models(table):
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=448, depth=3, class_token=False, global_pool="avg"
    )
    keys = model.state_dict().keys()
    (found,) = advise(model, batch_size=4, table=table)
    assert model.state_dict().keys() == keys
    assert str(found.shape) == "batch 4, 3 heads of 64, 28 x 28 tokens, in 3 layers"
    assert found.choices[0].milliseconds[0] == pytest.approx(12 * 64 * 784**2 / 1e6)
    (prefixed,) = advise(timm.create_model("vit_tiny_patch16_224", img_size=448, depth=3), table=table)
    assert str(prefixed.shape) == "batch 1, 3 heads of 64, 28 x 28 tokens and 1 before them, in 3 layers"
    assert prefixed.best is None
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, batch_first=True), 2)
    (found,) = advise(encoder, num_tokens=1024)
    assert (found.shape.kind, found.shape.tokens, found.shape.layers) == ("sequence", 1024, 2)
    with pytest.raises(ValueError, match="num_tokens: expected the length"):
        advise(encoder)
    with pytest.raises(ValueError, match="found none"):
        advise(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_or_shape": (1, 2, 3)}, "model_or_shape: expected a module or"),
        ({"model_or_shape": (1, 2, 0, 4)}, "model_or_shape: expected positive"),
        ({"model_or_shape": (1, 2, 6, 4), "grid_size": (2, 4)}, "grid_size: .* of 6 tokens"),
        (
            {"model_or_shape": (1, 2, 6, 4), "grid_size": (2, 3), "is_causal": True},
            "grid_size: expected None",
        ),
        (
            {"model_or_shape": nn.Linear(2, 2), "is_causal": True},
            "grid_size, is_causal: expected for a shape",
        ),
        ({"model_or_shape": (1, 2, 6, 4), "device": "abacus"}, "device: expected one of this machine"),
        ({"model_or_shape": nn.Linear(2, 2), "batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        advise(**arguments)


@pytest.mark.parametrize("path", sorted(advice.MEASURED.glob("*.json")), ids=lambda path: path.stem)
def test_tables_of_the_package(path):
    content = json.loads(path.read_text())
    dtype = getattr(torch, content["dtype"])
    (found,) = advise((64, 12, 3136, 64), grid_size=(56, 56), device=content["device"], dtype=dtype)
    assert content["device"] in found.measured
    assert all(x.milliseconds[0] < x.milliseconds[1] for x in found.choices)


def test_commands(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(choices, "GRIDS", [(28, 28)])
    monkeypatch.setitem(choices.LENGTHS, "cpu", [256])
    monkeypatch.setitem(choices.TOKENS, "cpu", 784)
    path = tmp_path / "table.json"
    choices.main(["--head-dims=8", "--repeats=1", f"--json={path}"])
    assert "x softmax" in capsys.readouterr().out
    content = json.loads(path.read_text())
    settings = [row["setting"] for row in content["results"] if row["kind"] == "prefixed grid"]
    assert settings == [None, *map(list, advice.SETTINGS["grid"])]
    assert {row["kind"] for row in content["results"]} == {"grid", "prefixed grid", "sequence", "causal"}
    __main__.main([*["1", "2", "784", "8", "--grid", "28", "28"], f"--table={path}"])
    printed = capsys.readouterr().out
    assert f"1, 2 heads of 8, 28 x 28 tokens; float32 on {HERE}" in printed
    assert " - " not in printed
