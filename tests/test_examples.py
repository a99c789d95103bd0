"""Training on digits: repeatable, resumable after a kill, and the demo's table and plot."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from processes import kill_once_saved

from examples import convert, demo, digits
from examples.running import write_atomically
from examples.train_digits import Options, Training, train
from examples.vit import ATTENTION, VisionTransformer

TINY = Options(
    patch_size=4,
    width=16,
    depth=1,
    heads=2,
    steps=6,
    batch_size=8,
    held_out=10,
    evaluations=3,
    learning_rate=1e-2,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Made-up digits: a bright row whose height tells the label."""
    folder = tmp_path_factory.mktemp("digits")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("mnist_train.csv", 90), ("mnist_test.csv", 20)):
        images = torch.randint(0, 60, (count, 28, 28), generator=generator)
        labels = torch.arange(count) % 10
        images[torch.arange(count), 2 * labels + 4] = 255
        rows = torch.cat([labels[:, None], images.flatten(1)], 1).tolist()
        lines = [",".join(map(str, row)) for row in rows]
        (folder / name).write_text("label," + "x," * 783 + "x\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def data(folder):
    return digits.load(folder)


def test_reads_digits(folder, data):
    train_set, test_set = data
    assert len(train_set), len(test_set) == (90, 20)
    assert train_set.images.shape == (90, 1, 28, 28)
    assert train_set.labels[:11].tolist() == [*range(10), 0]
    assert train_set.images[3, 0, 10].unique().tolist() == pytest.approx([(1 - 0.1307) / 0.3081])
    with pytest.raises(FileNotFoundError, match=r"mnist_train\.csv"):
        digits.load(folder / "nowhere")


def test_refuses_other_tables(tmp_path):
    (tmp_path / "mnist_train.csv").write_text("label,x\n3,4\n")
    with pytest.raises(ValueError, match="2 columns"):
        digits.load(tmp_path)


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_attention_learns(attention, data):
    _, report = train(replace(TINY, attention=attention, steps=40), *data)
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert [step for step, _, _ in report.curve] == [13, 27, 40]
    assert len(report.losses) == 40


def test_models_differ_in_little_but_attention():
    parameters = {
        name: sum(p.numel() for p in VisionTransformer(name, width=64, depth=2, heads=2).parameters())
        for name in ATTENTION
    }
    projection = 2 * (32 * 32 + 3 * 32)  # EVA's two Linear + LayerNorm on the head dimension, per block
    assert parameters == {
        name: parameters["softmax"] + (name == "eva") * 2 * projection for name in ATTENTION
    }


def test_patches_must_tile():
    with pytest.raises(ValueError, match="patch_size: expected a divisor of 28, got 5"):
        VisionTransformer("softmax", patch_size=5)


@pytest.mark.parametrize("attention", ["eva", "performer"])  # those that draw noise
def test_resumed_run_equals_unbroken_run(attention, data, tmp_path):
    options = replace(TINY, attention=attention, steps=12, evaluations=4)
    whole, report = train(options, *data)

    class Killed(BaseException):
        pass

    broken = Training(options, data[0][:-10])
    checkpoint = tmp_path / "run.pt"
    for _ in range(7):  # into the first epoch, past it, past the last save
        broken.advance()
        if broken.step == 5:
            broken.save(checkpoint)
    resumed, again = train(options, *data, checkpoint, resume=True)
    assert again.losses == report.losses
    assert again.test_accuracy == report.test_accuracy
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_killed_process_goes_on(folder, data, tmp_path):
    options = replace(TINY, steps=2000, evaluations=400)
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in vars(TINY)]
    command = [sys.executable, "-m", "examples.train_digits", *arguments]
    command += [f"--data={folder}", f"--output-dir={tmp_path}", f"--threads={torch.get_num_threads()}"]
    checkpoint = tmp_path / "eva.pt"
    kill_once_saved(command, checkpoint, 60)

    resumed = Training(options, data[0][:-10])
    resumed.restore(checkpoint)
    assert 0 < resumed.step < options.steps
    unbroken = Training(options, data[0][:-10])
    for _ in range(resumed.step + 3):
        unbroken.advance()
    for _ in range(3):
        resumed.advance()
    assert resumed.losses == unbroken.losses
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_refuses_to_resume_another_run(data, tmp_path):
    checkpoint = tmp_path / "run.pt"
    train(TINY, *data, checkpoint)
    with pytest.raises(ValueError, match="width 16 there, 32 here"):
        train(replace(TINY, width=32), *data, checkpoint, resume=True)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_converts_a_trained_model(folder, data, tmp_path, capsys):
    train(replace(TINY, attention="softmax"), *data, tmp_path / "softmax.pt")
    files = [
        f"--save={tmp_path / 'eva.pt'}",
        f"--json={tmp_path / 'eva.json'}",
        f"--plot={tmp_path / 'gap.png'}",
    ]
    sizes = ["--window=3", "--landmarks=4", "--steps=4", "--train-steps=2", "--learning-rate=1e-3"]
    convert.main(["digits", f"--checkpoint={tmp_path / 'softmax.pt'}", f"--data={folder}", *sizes, *files])
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "eva.json").read_text())
    assert len(content["scores"]) == 7
    for name, score in content["scores"].items():
        assert [*name.split(), f"{score:.4f}"] in [line.split() for line in printed.splitlines()]
    assert content["gaps"][0]["after"] < content["gaps"][0]["before"]
    assert "blocks.0.attention.landmark_projection.key.0.weight" in torch.load(tmp_path / "eva.pt")
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_demo(folder, tmp_path, capsys):
    arguments = [
        *("--patch-size=7", "--width=16", "--depth=1", "--steps=4", "--evaluations=2", "--batch-size=8"),
        *("--held-out=10", "--repeats=1", f"--data={folder}", f"--output-dir={tmp_path / 'demo'}"),
        f"--image={tmp_path / 'demo.png'}",
    ]
    threads = torch.get_num_threads()
    demo.main(arguments)
    first = capsys.readouterr().out
    for word in ("test accuracy", "step ms @16", "attention ms @784", "peak MiB @784", "tested at 16 tokens"):
        assert word in first
    assert all(name in first for name in demo.NAMES.values())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert set(content["reports"]) == set(demo.NAMES)
    assert torch.get_num_threads() == threads
