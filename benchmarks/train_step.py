"""A whole training step of a vision transformer, by attention: `python -m benchmarks.train_step`.

The defaults are DeiT-tiny with patch 8: 224 x 224 images, 784 tokens, width 192, depth 12, 3 heads; bfloat16
autocast, AdamW, torch.compile. All models live in one process and take turns; "none" hands each token its own
value, and so says what a model costs beside its attention.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.vit import ATTENTION, VisionTransformer

from . import harness


def training_step(attention: str, options: argparse.Namespace, device: torch.device) -> harness.Call:
    """The call that trains one new model on one batch of noise."""
    torch.manual_seed(0)
    model = VisionTransformer(
        attention,
        image_size=options.image_size,
        patch_size=options.patch_size,
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        hidden=4 * options.width,
        classes=1000,
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    images = torch.randn(options.batch, 1, options.image_size, options.image_size, device=device)
    labels = torch.randint(1000, (options.batch,), device=device)
    forward = torch.compile(model, mode=options.mode) if options.compile else model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--attention", nargs="+", choices=list(ATTENTION), default=["softmax", "eva", "window", "none"]
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--mode",
        choices=("default", "reduce-overhead", "max-autotune"),
        default="default",
        help="of torch.compile; reduce-overhead replays CUDA graphs, where the host is too slow to launch",
    )
    parser.add_argument("--repeats", type=int, default=20, help="rounds (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    facts = harness.environment(device)
    tokens = (options.image_size // options.patch_size) ** 2
    print(harness.headline(facts))
    print(
        f"batch {options.batch}, {tokens} tokens, width {options.width}, depth {options.depth}, "
        f"{options.heads} heads, bfloat16 autocast, AdamW, "
        f"{f'compiled ({options.mode})' if options.compile else 'eager'}"
    )
    steps = {name: training_step(name, options, device) for name in options.attention}
    timings = harness.measure(steps, device, repeats=options.repeats, warmup=5)
    rows = [
        [name, f"{timing.median * 1e3:.2f}", f"{options.batch / timing.median:.0f}"]
        for name, timing in timings.items()
    ]
    print(harness.format_table(["attention", "ms a step", "images/s"], rows))
    if options.json:
        arguments_used = {k: v for k, v in vars(options).items() if k != "json"}
        milliseconds = {name: timing.median * 1e3 for name, timing in timings.items()}
        harness.write_json(options.json, {**facts, **arguments_used, "milliseconds": milliseconds})


if __name__ == "__main__":
    main()
