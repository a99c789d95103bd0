"""One step of causal decoding against softmax over its cache: `python -m benchmarks.decode`.

"attention" is attention alone, to which query, key and value of the new token are given; "module" has the
projections before and after it as well, and softmax's appends to its cache. EVA takes in the last tokens
before `context`. On the CPU 16 steps in a row are timed, on CUDA the replay of a CUDA graph of one.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import eva_attn
from eva_attn import decoding

from . import harness
from .attention import DTYPES

WARMUP = 2
CPU_STEPS = 16  # that are timed together: alone, a step waits for its code more than for its data


def in_a_row(call: harness.Call) -> harness.Call:
    def calls() -> None:
        for _ in range(CPU_STEPS):
            call()

    return calls


def captured(call: harness.Call) -> harness.Call:
    """The replay of `call`, which is run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Softmax:
    """Attention to a cache of `context` tokens, of which a step writes the last."""

    def __init__(self, module: eva_attn.CausalEVAttention, batch: int, context: int) -> None:
        self.module = module
        weight = module.qkv.weight
        shape = (2, batch, module.num_heads, context, module.head_dim)
        self.key, self.value = torch.randn(shape, device=weight.device, dtype=weight.dtype)

    def attend(self, query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, self.key, self.value)

    def step(self, x: Tensor) -> Tensor:
        query, key, value = self.module.qkv(x).view(len(x), 3, self.module.num_heads, -1).unbind(1)
        self.key[:, :, -1], self.value[:, :, -1] = key, value
        return self.module.proj(self.attend(query.unsqueeze(2)).transpose(1, 2).reshape(x.shape))

    @property
    def bytes(self) -> int:
        return 2 * self.key.numel() * self.key.element_size()


def make_steps(options: argparse.Namespace, context: int) -> tuple[dict[str, harness.Call], int, int]:
    """The calls, and the bytes that EVA and softmax keep of their tokens."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    heads, dim, batch = options.heads, options.head_dim, options.batch
    torch.manual_seed(0)
    module = eva_attn.CausalEVAttention(
        heads * dim,
        heads,
        window_size=options.window,
        chunk_size=options.chunk,
        relative_bias="table",
        device=device,
        dtype=dtype,
    ).eval()
    softmax = Softmax(module, batch, context)
    x = torch.randn(batch, 1, heads * dim, device=device, dtype=dtype)
    query, key, value = torch.randn(3, batch, heads, 1, dim, device=device, dtype=dtype)

    def full_state() -> decoding.DecodingState:
        num_steps = WARMUP + options.repeats
        num_steps = 2 * num_steps * CPU_STEPS if device.type == "cpu" else num_steps + 1  # half not timed
        state = module.init_state(batch, max(context, num_steps))
        for tensor in state.tensors().values():
            if tensor.is_floating_point():
                tensor.normal_()
        state.head_position.fill_(max(0, context - num_steps))
        return state

    state, module_state = full_state(), full_state()
    arguments = decoding.operator_arguments(state, **module.decoding_options())
    steps: dict[str, harness.Call] = {
        "eva attention": lambda: torch.ops.eva_attn.decode_step(query, key, value, **arguments),
        "softmax attention": lambda: softmax.attend(query),
        "eva module": lambda: module.step(x, module_state),
        "softmax module": lambda: softmax.step(x),
    }
    timed = captured if device.type == "cuda" else in_a_row
    steps = {name: timed(step) for name, step in steps.items()}
    kept = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    return steps, kept, softmax.bytes


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32, on CUDA bfloat16")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 65536], metavar="TOKENS")
    parser.add_argument("--batch", type=int, help="default: 1, on CUDA 8")
    parser.add_argument("--heads", type=int, help="default: 4, on CUDA 16")
    parser.add_argument("--head-dim", type=int, help="default: 64, on CUDA 128")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=50, help="rounds (default: 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory against context")
    options = parser.parse_args(arguments)
    on_cuda = options.device == "cuda"
    for name, cpu, cuda in (("dtype", "float32", "bfloat16"), ("batch", 1, 8), ("heads", 4, 16),
                            ("head_dim", 64, 128)):  # fmt: skip
        if getattr(options, name) is None:
            setattr(options, name, cuda if on_cuda else cpu)
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    facts = harness.environment(device)
    print(harness.headline(facts))
    print(
        f"batch {options.batch}, {options.heads} heads of {options.head_dim}, {options.dtype}, "
        f"window {options.window}, chunk {options.chunk}; microseconds a step"
    )
    per_call = CPU_STEPS if device.type == "cpu" else 1
    results = []
    for context in options.contexts:
        steps, state_bytes, cache_bytes = make_steps(options, context)
        timings = harness.measure(steps, device, repeats=options.repeats, warmup=WARMUP)
        results.append(
            {
                "context": context,
                "state_bytes": state_bytes,
                "cache_bytes": cache_bytes,
                **{name.replace(" ", "_") + "_us": t.median / per_call * 1e6 for name, t in timings.items()},
                **{
                    f"{part}_times_faster": timings[f"eva {part}"].times_faster_than(
                        timings[f"softmax {part}"]
                    )
                    for part in ("attention", "module")
                },
            }
        )
    header = ["context", "eva", "softmax", "faster", "eva module", "softmax module", "faster", "state MiB",
              "cache MiB"]  # fmt: skip
    rows = [
        [
            str(r["context"]),
            f"{r['eva_attention_us']:.1f}",
            f"{r['softmax_attention_us']:.1f}",
            f"{r['attention_times_faster']:.1f}x",
            f"{r['eva_module_us']:.1f}",
            f"{r['softmax_module_us']:.1f}",
            f"{r['module_times_faster']:.1f}x",
            f"{r['state_bytes'] / 2**20:.1f}",
            f"{r['cache_bytes'] / 2**20:.1f}",
        ]
        for r in results
    ]
    print(harness.format_table(header, rows))
    content = {**facts, "options": vars(options) | {"json": None, "plot": None}, "results": results}
    if options.json:
        harness.write_json(options.json, content)
    if options.plot:
        draw(content, options.plot)


def draw(content: dict[str, Any], path: Path) -> None:
    """Time of a step, and memory that the tokens so far take, against the length of the context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    results, options = content["results"], content["options"]
    contexts = [r["context"] for r in results]
    for name, kept, color in (("eva", "state", "#d1495b"), ("softmax", "cache", "#333333")):
        for part, style in (("attention", "-"), ("module", "--")):
            left.loglog(contexts, [r[f"{name}_{part}_us"] for r in results], style, marker=".", color=color,
                        label=f"{name} {part}")  # fmt: skip
        right.loglog(contexts, [r[f"{kept}_bytes"] / 2**20 for r in results], marker=".", color=color,
                     label=f"{name}: {kept}")  # fmt: skip
    left.set(xlabel="context, tokens", ylabel="microseconds a step")
    right.set(xlabel="context, tokens", ylabel="MiB of one layer")
    for axes in (left, right):
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{content['device']}, torch {content['torch']}, {content['date']}; batch {options['batch']}, "
        f"{options['heads']} heads of {options['head_dim']}, {options['dtype']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
