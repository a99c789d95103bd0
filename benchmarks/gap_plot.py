"""Pictures for `benchmarks.gap`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from eva_attn import estimators

from .cases import Case
from .gap_estimators import Problem, mean_query, sample_weights
from .gap_models import DigitsTransformer, layers

CURVES = {
    "RFA": "#999999",
    "RFA, orthogonal": "#555555",
    "window only": "#2e86ab",
    "chunk means only": "#7cb518",
    "Nystromformer": "#edae49",
    "EVA": "#d1495b",
    "EVA, partition and counts": "#8d3b72",
    "tangent at 0": "#5f4bb6",
    "tangent at mean query": "#111111",
    "tangent at coarse attention": "#2a9d8f",
}


def draw(content: dict[str, Any], path: Path) -> None:
    """A row for each model: error against operations over all settings, and by layer at the first."""
    models = list(dict.fromkeys(r["model"] for r in content["results"]))
    figure, rows = plt.subplots(
        len(models), 2, figsize=(13, 4.8 * len(models)), layout="constrained", squeeze=False
    )
    for model, (left, right) in zip(models, rows, strict=True):
        results = [r for r in content["results"] if r["model"] == model]
        against_operations(left, results)
        by_layer(right, results)
        left.set_title(f"{model}: mean over layers")
        right.set_title(f"{model}: window {results[0]['window']}, chunk {results[0]['chunk']}")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"{content['device']}, torch {content['torch']}, {content['date']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def against_operations(axes: Axes, results: list[dict[str, Any]]) -> None:
    """Every setting is a point; the line joins those that no cheaper one of the same kind beats."""
    for name, color in CURVES.items():
        points = sorted(
            (r["over_softmax"], sum(r["layer_error"]) / len(r["layer_error"]))
            for r in results
            if r["estimator"] == name
        )
        best = [p for i, p in enumerate(points) if all(p[1] < error for _, error in points[:i])]
        axes.loglog(*zip(*points, strict=True), ".", color=color, alpha=0.4)
        axes.loglog(*zip(*best, strict=True), color=color, label=name)
    axes.set(xlabel="operations, those of softmax = 1", ylabel="relative error", ylim=(None, 2))
    axes.grid(alpha=0.3, which="both")


def by_layer(axes: Axes, results: list[dict[str, Any]]) -> None:
    """Lines are layers' errors, dots those of heads."""
    for name, color in CURVES.items():
        result = next(r for r in results if r["estimator"] == name)
        axes.semilogy(result["layer_error"], color=color)
        for layer, heads in enumerate(result["head_error"]):
            axes.semilogy([layer] * len(heads), heads, ".", color=color, alpha=0.25, markersize=4)
    axes.set(xlabel="layer", xticks=range(len(results[0]["layer_error"])), ylim=(None, 2))
    axes.grid(alpha=0.3, which="both")


def draw_landmarks(model: DigitsTransformer, window: int, chunk: int, path: Path) -> None:
    """What landmarks are made of, and what one query sees through them, in the last layer's first head.

    A row is an image. Maps of landmarks show the weight of each token in its chunk's, where 1 is that of a
    mean. The query, a red cross, is that with most of its attention outside its window.
    """
    images = model.inputs[:3]
    query, key, value = (x[:, :1] for x in layers(model, images)[-1])
    count = len(images)
    case = Case("picture", count, 1, count, 1, model.grid, (window, window), (chunk, chunk), query.shape[-1])
    problem = Problem(0, query, key, value, case)
    identity = torch.eye(case.tokens, device=query.device).expand(count, 1, -1, -1)
    softmax = estimators.softmax_attention(query, key, identity)
    tangent = estimators.tangent_weights(mean_query(problem), key, problem.member)
    tokens = softmax.masked_fill(problem.exact, 0).sum(-1).argmax(-1)  # [B, 1]

    def of_landmarks(weights: Tensor) -> Tensor:
        return (weights * problem.member.sum(-1, keepdim=True)).sum(-2)

    def of_query(attention: Tensor) -> Tensor:
        return attention.take_along_dim(tokens[..., None, None], 2)[:, :, 0].sqrt()

    def seen(weights: Tensor) -> Tensor:
        """The weight of each token for each query, in the window and by the landmarks: [B, 1, N, N]."""
        mass = estimators.evidence_bound(query, key, weights).masked_fill(problem.in_window, -torch.inf)
        return estimators.eva(query, key, identity, problem.exact, weights, mass)

    columns = {
        "image": images,
        "EVA's landmark values": of_landmarks(sample_weights(problem)),
        "landmarks at mean query": of_landmarks(tangent),
        "query: softmax": of_query(softmax),
        "query: chunk means": of_query(seen(problem.mean.expand_as(tangent))),
        "query: at mean query": of_query(seen(tangent)),
    }
    figure, rows = plt.subplots(
        count, len(columns), figsize=(2.2 * len(columns), 2.3 * count), layout="constrained", squeeze=False
    )
    for i, row in enumerate(rows):
        for axes, (title, pictures) in zip(row, columns.items(), strict=True):
            is_image = title == "image"
            axes.imshow(
                pictures[i].numpy(force=True).reshape((28, 28) if is_image else model.grid),
                cmap="gray" if is_image else "viridis",
            )
            if title.startswith("query"):
                y, x = divmod(int(tokens[i]), model.grid[1])
                axes.plot(x, y, "r+")
            axes.set(xticks=[], yticks=[], title=title if i == 0 else "")
            axes.title.set_fontsize(9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
