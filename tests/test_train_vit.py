"""The training script for timm's models: resumed runs equal unbroken ones, alone and in two processes."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import ROOT, kill_once_saved

pytest.importorskip("timm")

from examples import train_vit
from examples.train_vit import Options, Process, Training

KWARGS = {"patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}
TINY = Options(
    image_size=28,
    model_kwargs=KWARGS,
    window=2,
    landmarks=4,
    epochs=2,
    batch_size=8,
    warmup_epochs=0.5,
    ema=0.99,
    clip_norm=1.0,
)


@pytest.fixture(scope="session")
def options(tmp_path_factory):
    """Of a run on made-up digits."""
    folder = tmp_path_factory.mktemp("digits")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("mnist_train.csv", 90), ("mnist_test.csv", 20)):
        pixels = torch.randint(256, (count, 784), generator=generator).tolist()
        lines = [",".join(map(str, [i % 10, *row])) for i, row in enumerate(pixels)]
        (folder / name).write_text("label," + "x," * 783 + "x\n" + "\n".join(lines) + "\n")
    return replace(TINY, data=str(folder))


def arguments(options: Options) -> list[str]:
    kwargs = [f"{name}={value}" for name, value in options.model_kwargs.items()]
    fields = {name: getattr(options, name) for name in vars(options) if name != "model_kwargs"}
    given = [f"--{name.replace('_', '-')}={x}" for name, x in fields.items() if x is not None]
    return [*given, f"--threads={torch.get_num_threads()}", "--model-kwargs", *kwargs]


def assert_same(one: Training, other: Training) -> None:
    assert one.updates == other.updates
    for a, b in ((one.model, other.model), (one.ema.module, other.ema.module)):
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name


def advance(run: Training, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(run.advance())
        if run.step == 0:
            run.finish_epoch()
    return losses


PLAIN = {"auto_augment": "", "erase": 0.0, "flip": 0.0, "mixup": 0.0, "cutmix": 0.0, "crop_pct": 1.0}


@pytest.mark.parametrize(
    "settings",
    [{"attention": "eva"}, {"attention": "softmax", "workers": 2}, {"attention": "window", **PLAIN}],
    ids=lambda settings: settings["attention"],
)
def test_resumed_run_equals_unbroken_run(options, settings, tmp_path):
    options = replace(options, **settings)
    run = Training(options, Process(torch.device("cpu")))
    per_epoch = len(run.loader)
    advance(run, 3)
    run.save(tmp_path / "early.pt")
    advance(run, per_epoch)
    run.save(tmp_path / "late.pt")
    losses = advance(run, 2)
    for name, count in (("early.pt", per_epoch + 2), ("late.pt", 2)):
        resumed = Training(options, Process(torch.device("cpu")))
        resumed.restore(tmp_path / name)
        assert advance(resumed, count)[-2:] == losses
        assert_same(resumed, run)
        assert [{**row, "seconds": 0} for row in resumed.history] == [
            {**row, "seconds": 0} for row in run.history
        ]


def test_killed_process_goes_on(options, tmp_path):
    options = replace(options, epochs=500)
    command = [sys.executable, "-m", "examples.train_vit", *arguments(options)]
    command += ["--save-every=3", f"--output-dir={tmp_path}"]
    checkpoint = tmp_path / "last.pt"
    kill_once_saved(command, checkpoint, 120)

    resumed = Training(options, Process(torch.device("cpu")))
    resumed.restore(checkpoint)
    assert resumed.updates > 0
    advance(resumed, 3)
    unbroken = Training(options, Process(torch.device("cpu")))
    advance(unbroken, resumed.updates)
    assert_same(resumed, unbroken)


def test_command(options, tmp_path, capsys):
    options = replace(options, epochs=1, dtype="bfloat16")
    where = [f"--output-dir={tmp_path}"]
    train_vit.main([*arguments(options), *where, f"--export={tmp_path / 'model.pt2'}"])
    first = capsys.readouterr().out
    assert "vit_tiny_patch16_224, eva: test accuracy" in first
    train_vit.main([*arguments(replace(options, batch_size=5)), *where, "--evaluate"])
    assert capsys.readouterr().out == first

    row = next(csv.DictReader((tmp_path / "log.csv").open()))
    assert (row["epoch"], row["updates"]) == ("1", "11")
    assert f"{float(row['accuracy']):.2%}" in first

    content = torch.load(tmp_path / "last.pt", weights_only=True)
    model = train_vit.make_model(options, 10).eval()
    model.load_state_dict(content["ema"])
    program = torch.export.load(tmp_path / "model.pt2").module()
    images = torch.randn(5, 3, 28, 28)
    torch.testing.assert_close(program(images), model(images))


def test_image_folders(tmp_path):
    from PIL import Image

    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), (i * 40, 10, 99)).save(tmp_path / split / label / f"{i}.png")
    options = replace(TINY, data=str(tmp_path), batch_size=4, epochs=1)
    run = Training(options, Process(torch.device("cpu")))
    assert run.model.num_classes == 2
    assert (len(run.loader), len(run.test_loader)) == (2, 1)
    advance(run, 2)
    assert run.history[0]["accuracy"] in (0, 0.25, 0.5, 0.75, 1)


def test_refuses_to_resume_another_run(options, tmp_path):
    run = Training(options, Process(torch.device("cpu")))
    run.advance()
    run.save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="window 2 there, 4 here"):
        Training(replace(options, window=4), Process(torch.device("cpu"))).restore(tmp_path / "run.pt")


def test_two_processes(options, tmp_path):
    """DDP and FSDP by torchrun: what is resumed ends in the weights of the unbroken run, and both agree."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run(
        [*command, options.data, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ddp, fsdp = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("ddp", "fsdp"))
    for name, tensor in ddp["model"].items():
        torch.testing.assert_close(fsdp["model"][name], tensor, rtol=1e-3, atol=1e-4)


def _worker(data: str, folder: str) -> None:
    found = train_vit.init_distributed_device_so("cpu")
    process = Process(torch.device("cpu"), found["global_rank"], found["world_size"])
    for parallel in ("ddp", "fsdp"):
        options = replace(TINY, data=data, parallel=parallel)
        run, resumed = (Training(options, process) for _ in range(2))
        checkpoint = Path(folder) / f"{parallel}.pt"
        advance(run, 2)
        run.save(checkpoint)
        losses = advance(run, 5)  # into the next epoch
        resumed.restore(checkpoint)
        assert advance(resumed, 5) == losses
        for models in ((run.model, resumed.model), (run.ema.module, resumed.ema.module)):
            one, other = (train_vit.get_model_state_dict(x, options=train_vit.WHOLE) for x in models)
            assert all(torch.equal(x, other[name]) for name, x in one.items())  # none but in the first
        run.save(checkpoint)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _worker(*sys.argv[1:])
