"""`python -m eva_attn 8 3 784 64 --grid 28 28`: what softmax and EVA cost for queries [B, H, N, D]."""

import argparse
from pathlib import Path

import torch

from .advice import advise


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eva_attn", description=advise.__doc__.split("\n")[0])  # type: ignore[union-attr]
    for name in ("batch", "heads", "tokens", "head_dim"):
        parser.add_argument(name, type=int)
    parser.add_argument("--grid", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--device", default="cpu", help='default: "cpu"; also part of a name, such as H100')
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--table", type=Path, help="file that benchmarks.choices wrote")
    parsed = parser.parse_args(arguments)
    print(
        advise(
            (parsed.batch, parsed.heads, parsed.tokens, parsed.head_dim),
            device=parsed.device,
            dtype=getattr(torch, parsed.dtype) if parsed.dtype else None,
            grid_size=tuple(parsed.grid) if parsed.grid else None,
            is_causal=parsed.causal,
            table=parsed.table,
        )
    )


if __name__ == "__main__":
    main()
