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

from eva_attn import LandmarkProjection, eva_attention_qkvpacked
from eva_attn.advice import MEASURED, AttentionShape

from . import harness
from .attention import DTYPES
from .cases import Pair
from .peers import softmax_attention, softmax_backends

# Grids, without and with a class token, and lengths of sequences.
GRIDS = [(14, 14), (28, 28), (56, 56), (112, 112)]
LENGTHS = {"cpu": [512, 2048, 8192], "cuda": [512, 2048, 8192, 65536]}
HEAD_DIMS = {"cpu": [32, 64], "cuda": [32, 64, 128]}
TOKENS = {"cpu": 2**14, "cuda": 12 * 2**16}  # of all heads and sequences, so that the device is full


def shapes(device_type: str, head_dims: list[int]) -> Iterator[AttentionShape]:
    def shape(tokens: int, head_dim: int, **layout: Any) -> AttentionShape:
        heads = max(2, TOKENS[device_type] // tokens)
        return AttentionShape(1, heads, tokens, head_dim, **layout)

    for head_dim in head_dims:
        for grid in GRIDS:
            for prefix in (0, 1):
                yield shape(math.prod(grid), head_dim, grid_size=grid, num_prefix_tokens=prefix)
        for is_causal in (False, True):
            for length in LENGTHS[device_type]:
                yield shape(length, head_dim, is_causal=is_causal)


def measure(
    shape: AttentionShape, setting: Pair | None, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, float]:
    """Milliseconds a head of one sequence, forward and in training; softmax where `setting` is None."""
    tokens = shape.tokens + shape.num_prefix_tokens
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(shape.batch, tokens, 3, shape.heads, shape.head_dim, generator=generator)
    packed = packed.to(device, dtype)
    if setting is None:
        leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in packed.unbind(2)]
        backend = next(iter(softmax_backends(device.type, dtype).values()))
        function = softmax_attention(*leaves, shape.is_causal, backend)
    else:
        projection = LandmarkProjection(shape.head_dim, device=device, dtype=dtype)
        leaves = [packed.requires_grad_(), *projection.parameters()]
        geometry = shape.geometry(setting)

        def function() -> torch.Tensor:
            return eva_attention_qkvpacked(packed, projection=projection, **geometry)

    calls = {
        "forward": harness.forward_only(function),
        "training": harness.forward_and_backward(function, leaves),
    }
    timings = harness.measure(calls, device, repeats=repeats)
    per_head = 1e3 / (shape.batch * shape.heads)
    return {name: float(f"{timing.median * per_head:.4g}") for name, timing in timings.items()}


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
    facts = harness.environment(device)
    print(harness.headline(facts))
    results: list[dict[str, Any]] = []
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = options.json or MEASURED / f"{slug}-{dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**facts, "dtype": dtype})[:-1]
    for shape in shapes(device.type, options.head_dims or HEAD_DIMS[device.type]):
        about = {"kind": shape.kind, "tokens": shape.tokens, "head_dim": shape.head_dim}
        softmax = measure(shape, None, device, DTYPES[dtype], options.repeats)
        results.append({**about, "setting": None, **softmax})
        for setting in shape.settings():
            times = measure(shape, setting, device, DTYPES[dtype], options.repeats)
            results.append({**about, "setting": list(setting), **times})
            faster = softmax["training"] / times["training"]
            print(f"{shape}, {setting}: {times['training']:.4g} ms, {faster:.2f}x softmax", flush=True)
        lines = ",\n  ".join(map(json.dumps, results))
        path.write_text(f'{head}, "results": [\n  {lines}\n]}}\n')  # so far


if __name__ == "__main__":
    main()
