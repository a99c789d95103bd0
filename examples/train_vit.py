"""Trains a vision transformer of timm with EVA, softmax or window attention: `python -m examples.train_vit`.

On digits, or on a folder of images with train/ and val/ in it:

    python -m examples.train_vit --data digits --model vit_tiny_patch16_224 --image-size 28 \\
        --model-kwargs patch_size=2 embed_dim=64 depth=2 num_heads=2 --auto-augment "" --erase 0 --flip 0 \\
        --mixup 0 --cutmix 0 --crop-scale 0.8 --crop-pct 1 --epochs 1 --warmup-epochs 0.1 --batch-size 32
    torchrun --nproc-per-node 8 -m examples.train_vit --data /data/imagenet --model deit_small_patch16_224 \\
        --image-size 448 --device cuda --dtype bfloat16 --compile --workers 8 --ema 0.9999

A run that was killed and goes on with `--resume`, in as many processes, ends in the same weights as one that
was not: a checkpoint holds all states of random numbers, and where in the data it was made.
"""

import argparse
import csv
import io
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.layers import Attention
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs, random_seed
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from eva_attn import replace_attention
from eva_attn.functional import window_attention

from . import digits
from .digits import Digits
from .running import DTYPES, Progress, add_fields, autocast, from_parsed, write_atomically

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Options:
    """What determines a run. Those of the recipe default to DeiT's (Touvron et al., 2021)."""

    data: str = "digits"
    model: str = "vit_tiny_patch16_224"
    attention: str = "eva"
    window: int = 7
    landmarks: int = 49
    image_size: int | None = field(default=None, metadata={"none": "the model's"})
    classes: int | None = field(default=None, metadata={"none": "those of the training images"})
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    epochs: int = 300
    batch_size: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    clip_norm: float = 0.0
    schedule: str = "cosine"
    warmup_epochs: float = 5.0
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    crop_scale: float = 0.08
    crop_pct: float = 0.0
    flip: float = 0.5
    color_jitter: float = 0.3
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    drop_path: float = 0.1
    ema: float = 0.0
    workers: int = 0
    parallel: str = "ddp"
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Process:
    """One of `world_size` that train together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


class DigitImages(Dataset):
    """Digits as timm's loaders take them: images of PIL, through `transform`."""

    def __init__(self, digits: Digits) -> None:
        self.digits = digits
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = ((self.digits.images[index, 0] * 0.3081 + 0.1307) * 255).round().to(torch.uint8)
        return self.transform(Image.fromarray(pixels.numpy()).convert("RGB")), int(self.digits.labels[index])


class WindowAttention(nn.Module):
    """The projections of timm's `Attention` around EVA without its landmarks."""

    def __init__(self, attention: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.qkv, self.proj, self.proj_drop = attention.qkv, attention.proj, attention.proj_drop
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.num_heads = attention.num_heads
        self.options = {name: options[name] for name in ("window_size", "grid_size", "num_prefix_tokens")}

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> the same."""
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        out = window_attention(self.q_norm(query), self.k_norm(key), value, **self.options)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


def make_model(options: Options, classes: int) -> nn.Module:
    """A model of timm, with the attention of `options`."""
    size = {} if options.image_size is None else {"img_size": options.image_size}
    kwargs = {"num_classes": classes, "drop_path_rate": options.drop_path, **size, **options.model_kwargs}
    model = timm.create_model(options.model, **kwargs)
    if options.attention == "eva":
        replace_attention(model, window_size=options.window, num_landmarks=options.landmarks)
    elif options.attention == "window":
        replace_attention(
            model, window_size=options.window, include="*.attn", converters={Attention: WindowAttention}
        )
    return model


def make_datasets(data: str) -> tuple[Any, Any, int]:
    """Images to train on, images to judge by, and the number of classes of the former.

    `data` is "digits", a folder with the tables of `examples.digits`, or one with train/ and val/.
    """
    folder = None if data == "digits" else Path(data)
    if folder is None or (folder / "mnist_train.csv").exists():
        train_set, test_set = map(DigitImages, digits.load(folder))
        return train_set, test_set, 10
    train_set, test_set = (
        create_dataset("", root=data, split=split, is_training=split == "train") for split in ("train", "val")
    )
    return train_set, test_set, len(train_set.reader.class_to_idx)


class Training:
    """A run, at an update of an epoch.

    `history` holds a row for each epoch done.
    """

    def __init__(self, options: Options, process: Process) -> None:
        self.options, self.process = options, process
        train_set, test_set, classes = make_datasets(options.data)
        self.classes = options.classes or classes
        torch.manual_seed(options.seed)  # one start for all processes
        self.model = make_model(options, self.classes).to(process.device)
        self.ema = ModelEmaV3(self.model, decay=options.ema, use_warmup=True) if options.ema else None
        self.parallel: nn.Module = self.model
        if process.world_size > 1 and options.parallel == "fsdp":
            for model in (self.model, self.ema.module) if self.ema else (self.model,):
                for block in getattr(model, "blocks", ()):
                    fully_shard(block)
                fully_shard(model)
        elif process.world_size > 1:
            device_ids = [process.device] if process.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=device_ids)
        random_seed(options.seed, process.rank)

        config = resolve_data_config(
            {"img_size": options.image_size, "crop_pct": options.crop_pct or None}, model=self.model
        )
        shared = {
            "batch_size": options.batch_size,
            "use_prefetcher": False,
            "distributed": process.world_size > 1,
            "num_workers": options.workers,
            "persistent_workers": False,  # they would carry random numbers from one epoch into the next
            "pin_memory": process.device.type == "cuda",
            **{name: config[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct")},
        }
        self.loader = create_loader(
            train_set,
            is_training=True,
            scale=(options.crop_scale, 1.0),
            hflip=options.flip,
            color_jitter=options.color_jitter,
            auto_augment=options.auto_augment or None,
            re_prob=options.erase,
            re_mode="pixel",
            **shared,
        )
        self.test_loader = create_loader(test_set, **shared)
        if not len(self.loader):
            raise ValueError(
                f"batch_size: expected at most {len(train_set)} images, got {options.batch_size}"
            )
        self.mixup = None
        if options.mixup or options.cutmix:
            self.mixup = Mixup(
                options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=self.classes
            )
        self.criterion = (
            SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(options.smoothing)
        )
        self.optimizer = create_optimizer_v2(
            self.model, opt=options.optimizer, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=options.schedule,
            num_epochs=options.epochs,
            warmup_epochs=options.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=len(self.loader),
        )
        self.total_updates = options.epochs * len(self.loader)
        self.epoch, self.step = 0, 0  # in the epoch
        self.loss_sum = 0.0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self._batches: Iterator[Any] | None = None

    @property
    def updates(self) -> int:
        return self.epoch * len(self.loader) + self.step

    def advance(self) -> float:
        """One update; returns its loss in this process."""
        begin = time.perf_counter()
        if self._batches is None:
            self._batches = self._start_epoch()
        images, labels = (x.to(self.process.device, non_blocking=True) for x in next(self._batches))
        if self.mixup:
            images, labels = self.mixup(images, labels)
        self.parallel.train()
        with autocast(self.process.device, self.options.dtype):
            logits = self.parallel(images)
        loss = self.criterion(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of update {self.updates} is {value}")
        self.loss_sum += value
        self.step += 1
        self.scheduler.step_update(self.updates)
        if self.ema:
            self.ema.update(self.model, self.updates)
        if self.step == len(self.loader):
            self._batches = None
            self.epoch, self.step = self.epoch + 1, 0
        self.seconds += time.perf_counter() - begin
        return value

    def _start_epoch(self) -> Iterator[Any]:
        """The batches of this epoch, from `step` on."""
        if self.process.world_size > 1:
            self.loader.sampler.set_epoch(self.epoch)
        if self.step == 0:
            self._epoch_rng = rng_state()
            return iter(self.loader)
        here = rng_state()
        set_rng_state(self._epoch_rng)
        batches = iter(self.loader)
        for _ in range(self.step):
            next(batches)
        set_rng_state(here)
        return batches

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the test images whose class is found, by the average of the weights if there is one.

        In several processes the first images are counted twice where their number is not a multiple.
        """
        model = self.ema.module if self.ema else self.model
        model.eval()
        counts = torch.zeros(2, dtype=torch.float64, device=self.process.device)
        here = rng_state()
        for images, labels in self.test_loader:
            with autocast(self.process.device, self.options.dtype):
                found = model(images.to(self.process.device)).argmax(-1)
            counts[0] += (found == labels.to(found)).sum()
            counts[1] += len(labels)
        set_rng_state(here)  # those of an evaluation leave the run as it was
        if self.process.world_size > 1:
            dist.all_reduce(counts)
        return (counts[0] / counts[1]).item()

    def finish_epoch(self) -> dict[str, float]:
        """Evaluates; returns the row of the epoch that has just ended."""
        row = {
            "epoch": self.epoch,
            "updates": self.updates,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": sum(self._of_all(self.loss_sum)) / self.process.world_size / len(self.loader),
            "accuracy": self.accuracy(),
            "seconds": round(self.seconds, 3),
        }
        self.loss_sum = 0.0
        self.history.append(row)
        return row

    def save(self, path: Path) -> None:
        """Writes the checkpoint, in the first process. A kill leaves the old one or the new one, whole."""
        content = {
            "options": asdict(self.options),
            "classes": self.classes,
            "model": get_model_state_dict(self.model, options=WHOLE),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE),
            "ema": get_model_state_dict(self.ema.module, options=WHOLE) if self.ema else None,
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self._of_all(self.loss_sum),
            "seconds": self.seconds,
            "history": self.history,
            "rng": self._of_all(rng_state()),
            "epoch_rng": self._of_all(self._epoch_rng),
        }
        if self.process.rank == 0:
            write_atomically(path, lambda file: torch.save(content, file))
        if self.process.world_size > 1:
            dist.barrier()

    def _of_all(self, value: Any) -> list[Any]:
        """`value` of each process."""
        values = [value]
        if self.process.world_size > 1:
            values = [None] * self.process.world_size
            dist.all_gather_object(values, value)
        return values

    def restore(self, path: Path) -> None:
        """Goes back to a checkpoint. ValueError where that is of a run with other options."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        ours, theirs = asdict(self.options), content["options"]
        if differing := [name for name in ours if ours[name] != theirs.get(name)]:
            raise ValueError(
                f"{path} is of another run: "
                + ", ".join(f"{name} {theirs.get(name)!r} there, {ours[name]!r} here" for name in differing)
            )
        if len(content["rng"]) != self.process.world_size:
            raise ValueError(
                f"{path} is of {len(content['rng'])} processes, and these are {self.process.world_size}"
            )
        set_model_state_dict(self.model, content["model"], options=WHOLE)
        set_optimizer_state_dict(self.model, self.optimizer, content["optimizer"], options=WHOLE)
        if self.ema:
            set_model_state_dict(self.ema.module, content["ema"], options=WHOLE)
        self.epoch, self.step, self.seconds = content["epoch"], content["step"], content["seconds"]
        self.history = content["history"]
        self.loss_sum = content["loss_sum"][self.process.rank]
        self._epoch_rng = content["epoch_rng"][self.process.rank]
        set_rng_state(content["rng"][self.process.rank])
        self._batches = None

    def load_weights(self, path: Path) -> None:
        """Takes the weights alone, of any run of this model; their average if there is one."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        for model in (self.model, self.ema.module) if self.ema else (self.model,):
            set_model_state_dict(model, content["ema"] or content["model"], options=WHOLE)


def rng_state() -> dict[str, Any]:
    """Of all generators that training draws from."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (timm draws from it)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    kind, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """As a table in CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0])
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def train(run: Training, folder: Path, save_every: int, tensorboard: bool) -> None:
    """Trains to the end, with a progress bar; checkpoints and logs go to `folder`."""
    is_first = run.process.rank == 0
    writer = None
    if tensorboard and is_first:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=run.updates)
    progress = Progress(run.options.attention, run.total_updates)
    while run.updates < run.total_updates:
        loss = run.advance()
        if run.step == 0:
            row = run.finish_epoch()
            if is_first:
                write_history(run.history, folder / "log.csv")
            for name in ("learning_rate", "loss", "accuracy") if writer else ():
                writer.add_scalar(name, row[name], run.updates)
        if run.step == 0 or (save_every and run.updates % save_every == 0):
            run.save(folder / "last.pt")
        if is_first:
            known = f"{run.history[-1]['accuracy']:7.2%}" if run.history else "      -"
            progress.show(run.updates, f"loss {loss:6.4f}  test {known}  {run.seconds:6.1f} s")
    if is_first:
        progress.close()
    if writer:
        writer.close()


def export(checkpoint: Path, path: Path) -> None:
    """Writes the model of a checkpoint, with the average of the weights if there is one, by `torch.export`.

    The program takes images [B, 3, height, width] for any B.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    options = Options(**content["options"])
    model = make_model(options, content["classes"]).eval()
    model.load_state_dict(content["ema"] or content["model"])
    size = resolve_data_config({"img_size": options.image_size}, model=model)["input_size"]
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, *size),), dynamic_shapes=({0: batch},))
    write_atomically(path, lambda file: torch.export.save(program, file))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_vit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choices = {
        "attention": ["eva", "softmax", "window"],
        "parallel": ["ddp", "fsdp"],
        "dtype": list(DTYPES),
    }
    add_fields(parser, Options(), choices, without=("model_kwargs",))
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        action=ParseKwargs,
        default={},
        metavar="NAME=VALUE",
        help="for timm.create_model, such as depth=4, pretrained=True or checkpoint_path=FILE",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("vit"), help="default: vit")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if any")
    parser.add_argument("--save-every", type=int, default=0, help="updates (default: 0, each epoch alone)")
    parser.add_argument("--evaluate", action="store_true", help="only judge the checkpoint")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the trained model there (.pt2)")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument(
        "--tensorboard", action="store_true", help="log for it, too (pip install tensorboard)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    options = from_parsed(Options, parsed)
    found = init_distributed_device_so(options.device)
    process = Process(torch.device(found["device"]), found["global_rank"], found["world_size"])
    if process.device.index is not None:  # a GPU of several
        torch.cuda.set_device(process.device)
    checkpoint = parsed.output_dir / "last.pt"
    run = Training(options, process)
    if parsed.compile:
        run.model.compile()
    if parsed.evaluate:
        run.load_weights(checkpoint)
    else:
        if parsed.resume and checkpoint.exists():
            run.restore(checkpoint)
        train(run, parsed.output_dir, parsed.save_every, parsed.tensorboard)
    accuracy = run.accuracy()
    if process.rank == 0:
        print(f"{options.model}, {options.attention}: test accuracy {accuracy:.2%}; checkpoint {checkpoint}")
        if parsed.export:
            export(checkpoint, parsed.export)
    if process.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
