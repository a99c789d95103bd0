"""The times that `eva_attn.advise` knows: `python -m benchmarks.choices --device cuda`.

EVA with each of its settings and softmax, at several lengths and head dimensions, forward and with backward,
in milliseconds a head of one sequence, medians. The table is part of the package: eva_attn/measured/.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eva_attn.advice import MEASURED, SETTINGS
from eva_attn.geometry import default_chunk_size

from . import harness
from .attention import DTYPES, PASSES, calls_of
from .cases import Case, Pair
from .peers import make_peers, softmax_backends

# Grids, and lengths of sequences.
SIZES: dict[str, dict[str, list[Pair]]] = {
    "cpu": {
        "grid": [(14, 14), (28, 28), (56, 56), (112, 112)],
        "sequence": [(1, 512), (1, 2048), (1, 8192)],
        "causal": [(1, 512), (1, 2048), (1, 8192)],
    },
    "cuda": {
        "grid": [(14, 14), (28, 28), (56, 56), (112, 112)],
        "sequence": [(1, 512), (1, 2048), (1, 8192), (1, 65536)],
        "causal": [(1, 512), (1, 2048), (1, 8192), (1, 65536)],
    },
}
HEAD_DIMS = {"cpu": [32, 64], "cuda": [32, 64, 128]}
TOKENS = {"cpu": 2**14, "cuda": 12 * 2**16}  # of all heads and sequences, so that the device is full


def cases(device_type: str, head_dims: list[int]) -> Iterator[tuple[str, Pair, Case]]:
    """Kind, setting and case."""
    for kind, sizes in SIZES[device_type].items():
        for head_dim in head_dims:
            for grid in sizes:
                tokens = math.prod(grid)
                heads = max(2 if device_type == "cpu" else 1, TOKENS[device_type] // tokens)
                for window, number in SETTINGS[kind]:
                    chunk = number if kind == "causal" else default_chunk_size(grid, number, kind == "grid")
                    if chunk == 1 or window >= max(grid):
                        continue
                    both = (lambda size: (size, size)) if kind == "grid" else (lambda size: (1, size))
                    case = Case(
                        f"{kind}_{tokens}_{window}_{number}_{head_dim}",
                        *(1, heads, 1, heads),
                        grid=grid,
                        window=both(window),
                        chunk=both(chunk),
                        head_dim=head_dim,
                        is_causal=kind == "causal",
                    )
                    yield kind, (window, number), case


def measure(case: Case, device: torch.device, dtype: str, peer: str, repeats: int) -> dict[str, float]:
    """Milliseconds a head of one sequence, forward and in training."""
    batch, heads = case.batch_and_heads(device.type)
    peers = make_peers(case, device, DTYPES[dtype], [peer])
    times = {}
    for name, backward in zip(("forward", "training"), PASSES.values(), strict=True):
        timing = harness.measure(calls_of(peers, backward), device, repeats=repeats)[peer]
        times[name] = float(f"{timing.median * 1e3 / (batch * heads):.4g}")
    return times


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32, on CUDA bfloat16")
    parser.add_argument("--head-dims", type=int, nargs="+", help="default: 32 64, on CUDA 128 as well")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: of the device, in the package")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    softmax = next(iter(softmax_backends(device.type, DTYPES[dtype])))
    facts = harness.environment(device)
    print(harness.headline(facts))
    results: list[dict[str, Any]] = []
    softmax_times: dict[str, dict[str, float]] = {}
    for kind, setting, case in cases(device.type, options.head_dims or HEAD_DIMS[device.type]):
        about = {"kind": kind, "tokens": case.tokens, "head_dim": case.head_dim}
        problem = f"{kind}, {case.tokens} tokens, D {case.head_dim}"
        if problem not in softmax_times:
            softmax_times[problem] = measure(case, device, dtype, softmax, options.repeats)
            results.append({**about, "setting": None, **softmax_times[problem]})
        times = measure(case, device, dtype, "eva", options.repeats)
        results.append({**about, "setting": list(setting), **times})
        faster = softmax_times[problem]["training"] / times["training"]
        print(f"{problem}, {setting}: {times['training']:.4g} ms a head, {faster:.2f}x {softmax}", flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = options.json or MEASURED / f"{slug}-{dtype}.json"
    head = json.dumps({**facts, "dtype": dtype, "softmax": softmax})[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(map(json.dumps, results))
    path.write_text(f'{head}, "results": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
