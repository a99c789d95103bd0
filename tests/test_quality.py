"""What is compared is comparable, tasks are what they say, the command writes what it prints."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import quality
from benchmarks.quality import TASKS, Options, Training
from benchmarks.quality_models import VARIANTS, make_model, num_parameters
from examples.digits import Digits

TINY = Options("digits", "EVA", 2, steps=4, batch_size=4, width=16, depth=1, held_out=6, evaluations=2)


@pytest.fixture(scope="module")
def data():
    """Made-up digits: a bright row whose height tells the label."""
    labels = torch.arange(60) % 10
    images = torch.zeros(60, 1, 28, 28)
    images[torch.arange(60), 0, 2 * labels + 4] = 3
    return Digits(images, labels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_as_many_parameters(variant):
    sizes = {"width": 64, "image_size": 28, "patch_size": 2, "depth": 2, "heads": 1}
    with torch.device("meta"):
        eva, model = (num_parameters(make_model(name, **sizes)) for name in ("EVA", variant))
    assert abs(model - eva) <= 2 * (4 * (2 * 64 + 1) + 13 * 13)  # half of 8 units a layer, or a bias


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains(variant, data):
    run = Training(replace(TINY, variant=variant, patch_size=1), data)
    before = [p.clone() for p in run.model.parameters()]
    assert run.advance().isfinite()
    assert any(not torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))


def test_augmented_sdpa_is_eva_without_noise(data):
    ours, theirs = (
        Training(replace(TINY, variant=name, patch_size=1), data)
        for name in ("EVA, no noise", "augmented SDPA, no noise")
    )
    theirs.model.load_state_dict(ours.model.state_dict())
    losses = [float(run.advance()) for run in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # of float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_graphed_steps_are_eager_steps_on_cuda(data):
    graphed, eager = (
        Training(replace(TINY, variant="softmax", steps=8, device="cuda"), data) for _ in range(2)
    )
    eager.train_step = eager._train_step
    for _ in range(8):
        assert float(graphed.advance()) == pytest.approx(float(eager.advance()), rel=1e-4)  # of float32


def test_pairs_are_the_same_every_other_time(data):
    task = TASKS["same"]
    data = task.select(data)
    generator = torch.Generator().manual_seed(0)
    chosen = task.choose(data.labels, torch.randint(len(data), (4000,), generator=generator), generator)
    first, second = data.labels[chosen].unbind(1)
    # Deviation of a share of 4,000 coins: 0.008.
    assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.04)
    counts = torch.bincount(3 * first + second, minlength=9).view(3, 3)
    assert (counts[~torch.eye(3, dtype=torch.bool)] / 4000 - 1 / 12).abs().max() < 0.03
    assert set(chosen[:, 1].tolist()) == set(range(len(data)))

    images, labels = task.compose(data, chosen[:5])
    assert images.shape == (5, 1, 56, 56)
    assert torch.equal(images[:, :, :28, :28], data.images[chosen[:5, 0]])
    assert torch.equal(images[:, :, 28:, 28:], data.images[chosen[:5, 1]])
    assert (images[:, :, :28, 28:] < -0.4).all()  # no ink
    assert torch.equal(labels[:, 0], (first == second)[:5].long())
    assert torch.equal(labels[:, 1:], data.labels[chosen[:5]])


def test_windows_alone_cannot_compare():
    """What they say of a pair is a sum of what each digit gives."""
    torch.manual_seed(0)
    sizes = {"image_size": 56, "patch_size": 4, "depth": 2, "heads": 1, "classes": 8}
    model = make_model("window only", 16, **sizes).double().eval()
    task, generator = TASKS["same"], torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 28, 28, dtype=torch.float64, generator=generator)
    pairs = torch.tensor([[0, 2], [0, 3], [1, 2], [1, 3]])
    canvas, _ = task.compose(Digits(images, torch.arange(4)), pairs)
    a, b, c, d = model(canvas)
    torch.testing.assert_close(a - b, c - d, rtol=1e-9, atol=1e-12)
    a, b, c, d = make_model("softmax", 16, **sizes).double().eval()(canvas)
    assert (a - b - c + d).abs().max() > 1e-6


def test_command_prints_writes_and_draws(monkeypatch, data, tmp_path, capsys):
    monkeypatch.setattr(quality.digits, "load", lambda _: (data, data))
    preset = quality.Preset(
        seeds=2,
        workers=1,
        tasks={
            "digits": (TINY, ("softmax", "EVA")),
            "same": (replace(TINY, task="same", patch_size=8), ("softmax", "EVA")),
        },
    )
    monkeypatch.setitem(quality.PRESETS, "tiny", preset)
    path = tmp_path / "quality.json"
    flags = ["--preset=tiny", "--repeats=1", f"--json={path}", f"--plot={path.with_suffix('.png')}"]
    quality.main(flags)
    printed = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert {"date", "commit", "device", "torch", "command", "seeds"} <= set(content)
    assert list(content["tasks"]) == ["digits", "same"]
    for name, tokens, things in (("digits", 196, 1), ("same", 49, 3)):
        task = content["tasks"][name]
        assert task["tokens"] == tokens
        assert f"{name}: {tokens} tokens" in printed
        assert [row["variant"] for row in task["results"]] == ["softmax", "EVA"]
        for row in task["results"]:
            assert [len(scores) for scores in row["scores"]] == [2] * things
            assert row["training_s"] == pytest.approx(4 * row["step_ms"] / 1e3)
            assert f"{row['mean'][0]:.2%}" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    quality.main([*flags[:2], "--tasks=same", "--time-limit=0"])
    assert "tokens" not in capsys.readouterr().out
