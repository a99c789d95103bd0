"""A byte-level language model with causal EVA: `python -m examples.byte_lm`, then `--generate "def "`.

Trains on the sources of Python's standard library on this machine, or on `--text`, and reports bits per byte
of text it never trained on. What a step sees follows from the seed and its number alone, so that `--resume`
goes on as if nothing had happened.
"""

import argparse
import hashlib
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eva_attn
from benchmarks import harness

from .running import DTYPES, GraphedStep, Progress, Run, add_fields, autocast, from_parsed

BYTES = 256
HELD_OUT = 20  # one of so many files, or of so many bytes of a single file


@dataclass(frozen=True)
class Options:
    """What determines a run."""

    attention: str = "eva"
    positions: str = "sines"
    context: int = 1024
    window: int = 128
    chunk: int = 32
    width: int = 128
    depth: int = 4
    heads: int = 2
    steps: int = 500
    batch_size: int = 4
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    evaluations: int = 5
    evaluated_bytes: int = 32_768
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


class KeyValueCache:
    """Keys and values [B, H, max_length, D] of the `length` tokens so far."""

    def __init__(self, batch_size: int, heads: int, max_length: int, head_dim: int, like: Tensor) -> None:
        self.key, self.value = (like.new_empty(batch_size, heads, max_length, head_dim) for _ in range(2))
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> None:
        end = self.length + key.shape[2]
        if end > self.key.shape[2]:
            raise ValueError(f"the cache holds {self.key.shape[2]} tokens, and these would be {end}")
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end


class SoftmaxAttention(nn.Module):
    """Causal softmax attention [B, N, C] -> [B, N, C], with a cache that grows by every token."""

    def __init__(self, dim: int, num_heads: int, *, is_rotary: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_rotary = is_rotary
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, state: KeyValueCache | None = None) -> Tensor:
        batch, tokens, dim = x.shape
        packed = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        if self.is_rotary:
            start = 0 if state is None else state.length
            position = torch.arange(start, start + tokens, device=x.device)
            query, key = (eva_attn.rotary_embedding(x, position) for x in (query, key))
        out = self.attend(query, key, value) if state is None else self.go_on(query, key, value, state)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    step = forward

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def go_on(self, query: Tensor, key: Tensor, value: Tensor, state: KeyValueCache) -> Tensor:
        """Attention of the tokens after those in `state`, which takes them in."""
        state.append(key, value)
        position = torch.arange(state.length, device=query.device)
        start = state.length - query.shape[2]
        first = self.first_seen(start)
        mask = self.sees(position[start:, None], position[first:])
        keys, values = (x[:, :, first : state.length] for x in (state.key, state.value))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    def first_seen(self, token: int) -> int:
        return 0

    def sees(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return key_position <= query_position

    def init_state(self, batch_size: int, max_length: int) -> KeyValueCache:
        head_dim = self.proj.in_features // self.num_heads
        return KeyValueCache(batch_size, self.num_heads, max_length, head_dim, self.qkv.weight)


class WindowAttention(SoftmaxAttention):
    """Causal attention inside blocks of `window` tokens: EVA without its landmarks."""

    def __init__(self, dim: int, num_heads: int, window: int, *, is_rotary: bool) -> None:
        super().__init__(dim, num_heads, is_rotary=is_rotary)
        self.window = window

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return eva_attn.functional.window_attention(
            query, key, value, window_size=self.window, is_causal=True
        )

    def first_seen(self, token: int) -> int:
        return token // self.window * self.window

    def sees(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        same_block = key_position // self.window == query_position // self.window
        return same_block & (key_position <= query_position)


def make_attention(options: Options) -> nn.Module:
    is_rotary = options.positions == "rotary"
    if options.attention == "softmax":
        return SoftmaxAttention(options.width, options.heads, is_rotary=is_rotary)
    if options.attention == "window":
        return WindowAttention(options.width, options.heads, options.window, is_rotary=is_rotary)
    return eva_attn.CausalEVAttention(
        options.width,
        options.heads,
        window_size=options.window,
        chunk_size=options.chunk,
        rotary_embedding=eva_attn.rotary_embedding if is_rotary else None,
    )


class Block(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        width = options.width
        self.attention_norm = nn.LayerNorm(width)
        self.attention = make_attention(options)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        attended = self.attention_norm(x)
        if state is not None and x.shape[1] == 1:
            attended = self.attention.step(attended, state)
        else:
            attended = self.attention(attended, state=state)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class ByteModel(nn.Module):
    """Bytes [B, N] -> logits of the byte after each [B, N, 256].

    Positions are sines added to the embedding, or rotations of queries and keys: none is the last.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.has_sines = options.positions == "sines"
        self.embedding = nn.Embedding(BYTES, options.width)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.depth))
        self.norm = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, BYTES)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, text: Tensor, states: list[Any] | None = None, start: int = 0) -> Tensor:
        """`states` hold the `start` bytes before `text`, and take it in."""
        x = self.embedding(text)
        if self.has_sines:
            x = x + sines(start, text.shape[1], x.shape[2], x.device).to(x.dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, None if states is None else states[i])
        return self.head(self.norm(x))

    def init_states(self, batch_size: int, max_length: int) -> list[Any]:
        return [block.attention.init_state(batch_size, max_length) for block in self.blocks]


def sines(start: int, length: int, width: int, device: torch.device) -> Tensor:
    """[length, width]: sines and cosines of wavelengths from 2 pi to 10,000 times that."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angle = torch.arange(start, start + length, device=device)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]


def read_text(path: Path | None) -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out, uint8.

    Of a folder (None: the standard library) the files whose name's hash says so are held out, of a single
    file its end.
    """
    if path is not None and path.is_file():
        content = path.read_bytes()
        cut = len(content) - len(content) // HELD_OUT
        parts = content[:cut], content[cut:]
    else:
        folder = path or Path(sysconfig.get_path("stdlib"))
        pattern = "*" if path else "*.py"
        files = [
            file
            for file in sorted(folder.rglob(pattern))
            if file.is_file() and "site-packages" not in file.relative_to(folder).parts
        ]
        kept: tuple[list[bytes], list[bytes]] = ([], [])
        for file in files:
            name = file.relative_to(folder).as_posix()
            is_held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
            kept[is_held_out].append(file.read_bytes())
        parts = b"\n".join(kept[0]), b"\n".join(kept[1])
    train, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts if part)
    return train, held_out


class Training(Run):
    """A run on text."""

    def __init__(self, options: Options, train: Tensor, held_out: Tensor) -> None:
        for name, part in (("text to train on", train), ("text held out", held_out)):
            if len(part) <= options.context:
                raise ValueError(f"context: the {name} has {len(part)} bytes, too few for {options.context}")
        self.train, self.held_out = train, held_out
        torch.manual_seed(options.seed)
        super().__init__(options, ByteModel(options).to(options.device), options.steps, betas=(0.9, 0.95))
        self._train_step = GraphedStep(self._update)

    def advance(self) -> float:
        """One step; returns its loss in bits per byte."""
        begin = time.perf_counter()
        options = self.options
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)
        starts = torch.randint(
            len(self.train) - options.context, (options.batch_size,), generator=generator
        ).tolist()
        text = torch.stack([self.train[i : i + options.context + 1] for i in starts]).to(self.device).long()
        self.start_step()
        bits = self._train_step(text).item() / math.log(2)
        self.seconds += time.perf_counter() - begin
        self.step += 1
        return bits

    def _update(self, text: Tensor) -> Tensor:
        self.model.train()
        self.optimizer.zero_grad()
        loss = self._loss(text)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def _loss(self, text: Tensor) -> Tensor:
        with autocast(self.device, self.options.dtype):
            logits = self.model(text[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())

    @torch.inference_mode()
    def bits_per_byte(self) -> float:
        """Of the first `evaluated_bytes` held out, in pieces of `context`."""
        self.model.eval()
        context = self.options.context
        pieces = min(len(self.held_out) - 1, self.options.evaluated_bytes) // context
        text = torch.stack([self.held_out[i * context : (i + 1) * context + 1] for i in range(pieces)])
        losses = [
            self._loss(batch.to(self.device).long()) * len(batch)
            for batch in text.split(self.options.batch_size)
        ]
        return float(sum(losses)) / pieces / math.log(2)


def train(options: Options, text: tuple[Tensor, Tensor], checkpoint: Path, resume: bool) -> Training:
    """Trains with a progress bar, and saves a checkpoint at each evaluation."""
    run = Training(options, *text)
    if resume and checkpoint.exists():
        run.restore(checkpoint)
    evaluate_at = {round((i + 1) * options.steps / options.evaluations) for i in range(options.evaluations)}
    progress = Progress(options.attention, options.steps)
    while run.step < options.steps:
        bits = run.advance()
        if run.step in evaluate_at:
            run.curve.append((run.step, run.seconds, run.bits_per_byte()))
            run.save(checkpoint)
        known = f"{run.curve[-1][2]:5.3f}" if run.curve else "    -"
        progress.show(run.step, f"{bits:5.3f} bits/byte  held-out {known}  {run.seconds:6.1f} s")
    progress.close()
    return run


@torch.inference_mode()
def generate(
    model: ByteModel,
    prompt: bytes,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """`length` bytes after `prompt`, one by one. Temperature 0 takes the likeliest, `top_k` 0 all bytes."""
    model.eval()
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    states = model.init_states(1, len(prompt) + length)
    text = torch.tensor([list(prompt)], device=device)
    start = 0
    for _ in range(length):
        logits = model(text, states, start)[0, -1].float()
        start += text.shape[1]
        if temperature == 0:
            chosen = logits.argmax()[None]
        else:
            if 0 < top_k < BYTES:
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        text = chosen[None]
        yield int(chosen)


def stream(model: ByteModel, options: argparse.Namespace) -> None:
    """Writes prompt and continuation to the terminal as they come."""
    prompt = options.generate.encode()
    if not prompt:
        raise ValueError("generate: expected a prompt of at least one byte")
    sys.stdout.buffer.write(prompt)
    begin = time.perf_counter()
    for byte in generate(
        model,
        prompt,
        options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.generation_seed,
    ):
        sys.stdout.buffer.write(bytes([byte]))
        sys.stdout.buffer.flush()
    rate = options.length / (time.perf_counter() - begin)
    print(f"\n{rate:.0f} bytes a second", file=sys.stderr)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.byte_lm", description=__doc__)
    choices = {
        "attention": ["eva", "softmax", "window"],
        "positions": ["sines", "rotary"],
        "dtype": list(DTYPES),
    }
    add_fields(parser, Options(), choices)
    parser.add_argument("--text", type=Path, help="file or folder (default: the standard library's sources)")
    parser.add_argument("--output-dir", type=Path, default=Path("checkpoints"), help="default: checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if any")
    parser.add_argument("--generate", metavar="PROMPT", help="go on from a prompt with the trained model")
    parser.add_argument("--length", type=int, default=500, help="bytes to generate (default: 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="default: 0.8; 0 is greedy")
    parser.add_argument("--top-k", type=int, default=40, help="default: 40; 0 for all")
    parser.add_argument("--generation-seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what training gave there")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    checkpoint = parsed.output_dir / f"byte_lm_{parsed.attention}.pt"
    if parsed.generate is not None:
        if not checkpoint.exists():
            raise SystemExit(f"there is no {checkpoint} yet: train first, without --generate")
        content = torch.load(checkpoint, map_location=parsed.device, weights_only=True)
        model = ByteModel(Options(**content["options"])).to(parsed.device)
        model.load_state_dict(content["model"])
        stream(model, parsed)
        return
    options = from_parsed(Options, parsed)
    run = train(options, read_text(parsed.text), checkpoint, parsed.resume)
    parameters = sum(p.numel() for p in run.model.parameters())
    print(
        f"{options.attention}: {parameters:,} parameters, {run.curve[-1][2]:.3f} bits per byte held out "
        f"after {run.step} steps of {options.batch_size} x {options.context} bytes in {run.seconds:.1f} s; "
        f"checkpoint {checkpoint}"
    )
    if parsed.json:
        results = {"options": asdict(options), "parameters": parameters, "bytes": len(run.train),
                   "curve": run.curve}  # fmt: skip
        harness.write_json(parsed.json, {**harness.environment(run.device), **results})


if __name__ == "__main__":
    main()
