"""The language model learns, resumes, generates what its parallel pass would, and reads text as it says."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import byte_lm as seeds
from examples import byte_lm
from examples.byte_lm import ByteModel, Options, Training, generate

KINDS = ["eva", "softmax", "window"]
TINY = Options(
    context=24,
    window=8,
    chunk=4,
    width=16,
    depth=2,
    heads=2,
    steps=8,
    batch_size=2,
    evaluations=2,
    evaluated_bytes=96,
)


def text(length=600):
    return torch.tensor(list((b"abcdefgh" * length)[:length]), dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_learns(kind):
    options = replace(TINY, attention=kind, steps=60, learning_rate=1e-2)
    run = Training(options, text(), text(200))
    before = run.bits_per_byte()
    for _ in range(60):
        run.advance()
    assert before > 7  # eight bits are what a byte has
    assert run.bits_per_byte() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_at_a_time_is_the_parallel_pass(kind):
    torch.manual_seed(0)
    model = ByteModel(replace(TINY, attention=kind)).double().eval()
    tokens = torch.randint(256, (2, 30))
    states = model.init_states(2, 30)
    with torch.no_grad():
        expected = model(tokens)
        pieces = [model(tokens[:, :13], states, 0)]
        pieces += [model(tokens[:, i : i + 1], states, i) for i in range(13, 30)]
    # Float64 rounding over sums of a few hundred terms of order 1.
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_generates_greedily_what_the_whole_pass_says(kind):
    torch.manual_seed(0)
    model = ByteModel(replace(TINY, attention=kind)).double().eval()
    prompt = b"def f("
    written = bytes(generate(model, prompt, 20, temperature=0))
    whole = torch.tensor([list(prompt + written)])
    with torch.no_grad():
        likeliest = model(whole).argmax(-1)[0, len(prompt) - 1 : -1]
    assert list(written) == likeliest.tolist()


def test_sampling_follows_its_seed_and_top_k():
    torch.manual_seed(0)
    model = ByteModel(TINY)
    first, again, other = (bytes(generate(model, b"x", 30, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    greedy = bytes(generate(model, b"x", 30, temperature=0))
    assert bytes(generate(model, b"x", 30, top_k=1)) == greedy


def test_resumed_run_ends_as_an_unbroken_one(tmp_path):
    parts = text(), text(200)
    whole = byte_lm.train(TINY, parts, tmp_path / "whole.pt", resume=False)
    broken = Training(TINY, *parts)
    for _ in range(4):
        broken.advance()
    broken.save(tmp_path / "broken.pt")
    resumed = byte_lm.train(TINY, parts, tmp_path / "broken.pt", resume=True)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="seed 0 there, 1 here"):
        Training(replace(TINY, seed=1), *parts).restore(tmp_path / "broken.pt")


def test_held_out_files_are_whole_and_apart(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_bytes(bytes([i]) * 5)
    train, held_out = byte_lm.read_text(tmp_path)
    newline = ord("\n")
    seen, kept = ({x for x in part.tolist() if x != newline} for part in (train, held_out))
    assert seen | kept == set(range(60)) - {newline}
    assert not seen & kept
    assert 1 <= len(kept) <= 10


def test_end_of_a_single_file_is_held_out(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    train, held_out = byte_lm.read_text(path)
    assert train.tolist() == list(range(190))
    assert held_out.tolist() == list(range(190, 200))


def test_command_trains_and_generates(tmp_path, capfdbinary):
    path = tmp_path / "text"
    path.write_bytes(b"abcdefgh" * 200)
    sizes = {
        "context": 16,
        "window": 8,
        "chunk": 4,
        "width": 16,
        "depth": 1,
        "steps": 2,
        "evaluations": 1,
    }
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    byte_lm.main([*flags, f"--text={path}", f"--output-dir={tmp_path}"])
    assert b"bits per byte held out after 2 steps" in capfdbinary.readouterr().out
    byte_lm.main(["--generate=abc", "--length=5", f"--output-dir={tmp_path}"])
    out, err = capfdbinary.readouterr()
    assert out.startswith(b"abc")
    assert len(out) == 3 + 5
    assert b"bytes a second" in err


def test_seeds_are_merged(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes(b"abcdefgh" * 200)
    sizes = [
        "--context=16",
        "--window=8",
        "--chunk=4",
        "--width=16",
        "--depth=1",
        "--steps=2",
        "--evaluations=2",
    ]

    def train(attention: str, seed: int, *flags: str) -> str:
        written = tmp_path / f"{attention}-{seed}.json"
        arguments = [f"--attention={attention}", f"--seed={seed}", f"--json={written}", *flags]
        byte_lm.main([*sizes, f"--text={path}", f"--output-dir={tmp_path}", *arguments])
        return str(written)

    runs = [train("window", 0), train("eva", 1), train("eva", 0)]
    merged = tmp_path / "merged.json"
    seeds.main([*runs, f"--json={merged}"])
    assert "step 2" in capsys.readouterr().out
    content = json.loads(merged.read_text())
    assert "--context 16" in content["command"]
    eva, window = content["results"]
    assert (eva["attention"], eva["seeds"], eva["steps"]) == ("eva", [0, 1], [1, 2])
    assert (window["attention"], window["seeds"], window["deviation"]) == ("window", [0], [0, 0])
    first, second = (curve[-1][2] for curve in eva["curves"])
    assert eva["mean"][-1] == pytest.approx((first + second) / 2, abs=1e-4)
    assert eva["deviation"][-1] == pytest.approx(abs(first - second) / 2**0.5, abs=2e-4)

    with pytest.raises(ValueError, match="differ in more than attention and seed"):
        seeds.main([*runs, train("eva", 2, "--width=8")])
