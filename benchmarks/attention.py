"""The attention core against its peers: `python -m benchmarks.attention`.

EVA runs through `eva_attn.eva_attention_qkvpacked`, `scaled_dot_product_attention` on contiguous q, k, v,
in the same process, call by call in turn. "x sdpa" (on CUDA "x cudnn", its fastest backend) is softmax's
time over the peer's, both of the same round, median over rounds. GFLOP/s and GB/s divide what the mathematics
needs at least (`benchmarks.cases`) by the time taken, whatever was really computed or moved; "x floor" is the
time taken over that of copying the least bytes.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import harness
from .cases import CASES, SWEEP, Case, least_bytes
from .peers import Peer, make_peers, softmax_backends

DEFAULT_CASES = {
    "cpu": ["deit_s_196", "deit_t_784", "pvt_3136", "grid_16384", "causal_8192_d64"],
    "cuda": ["deit_s_196", "deit_t_784", "pvt_3136", "grid_16384", "seq_65536"],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = {"forward": False, "forward + backward": True}


@dataclass
class Result:
    """One peer on one case; times in milliseconds, memory in bytes."""

    case: str
    shape: list[int]
    dtype: str
    threads: int
    direction: str
    peer: str
    milliseconds: float
    fastest: float
    softmax: str  # what the next one compares with
    times_faster_than_softmax: float
    times_faster_than_first_threads: float  # with the first number of threads that was asked for
    gflops: float
    gbs: float
    of_matmul: float
    over_floor: float
    rounds: int
    peak_bytes: int | None = None


def calls_of(peers: dict[str, Peer], backward: bool) -> dict[str, harness.Call]:
    return {
        name: harness.forward_and_backward(peer.function, peer.leaves)
        if backward
        else harness.forward_only(peer.function)
        for name, peer in peers.items()
    }


def all_calls(
    case: Case, device: torch.device, dtype: str, peers: list[str] | None
) -> dict[tuple[str, str], harness.Call]:
    """By direction and peer."""
    chosen = make_peers(case, device, DTYPES[dtype], peers)
    return {
        (direction, name): call
        for direction, backward in PASSES.items()
        for name, call in calls_of(chosen, backward).items()
    }


def with_threads(threads: int, call: harness.Call) -> harness.Call:
    def run() -> object:
        torch.set_num_threads(threads)
        return call()

    return run


def run_case(
    case: Case,
    device: torch.device,
    dtype: str,
    ceilings: dict[int, dict[str, float]],
    *,
    repeats: int,
    peers: list[str] | None = None,
    memory: bool = True,
) -> list[Result]:
    """Measures the peers on `case` with the numbers of threads in `ceilings`, all in the same rounds."""
    batch, heads = case.batch_and_heads(device.type)
    chosen = make_peers(case, device, DTYPES[dtype], peers)
    softmax = next(iter(softmax_backends(device.type, DTYPES[dtype])))
    peaks: dict[tuple[int, str, str], int | None] = {}
    for threads in ceilings if memory else ():
        torch.set_num_threads(threads)
        measured = harness.peak_memory(all_calls, case, device, dtype, peers, device=device)
        peaks |= {(threads, *key): peak for key, peak in measured.items()}
    results = []
    for direction, backward in PASSES.items():
        calls = {
            (threads, name): with_threads(threads, call)
            for threads in ceilings
            for name, call in calls_of(chosen, backward).items()
        }
        timings = harness.measure(calls, device, repeats=repeats)
        for (threads, name), timing in timings.items():
            gflops = batch * heads * chosen[name].flops(case, backward) / timing.median / 1e9
            gbs = batch * heads * least_bytes(case, DTYPES[dtype].itemsize, backward) / timing.median / 1e9
            results.append(
                Result(
                    case=case.name,
                    shape=[batch, heads, *case.grid, case.head_dim],
                    dtype=dtype,
                    threads=threads,
                    direction=direction,
                    peer=name,
                    milliseconds=timing.median * 1e3,
                    fastest=min(timing.seconds) * 1e3,
                    softmax=softmax,
                    times_faster_than_softmax=timing.times_faster_than(timings[threads, softmax]),
                    times_faster_than_first_threads=timing.times_faster_than(
                        timings[next(iter(ceilings)), name]
                    ),
                    gflops=gflops,
                    gbs=gbs,
                    of_matmul=gflops / ceilings[threads]["matmul_gflops"],
                    over_floor=ceilings[threads]["copy_gbs"] / gbs,
                    rounds=len(timing.seconds),
                    peak_bytes=peaks.get((threads, direction, name)),
                )
            )
    return results


def title(case: Case, device: torch.device, dtype: str, threads: int) -> str:
    batch, heads = case.batch_and_heads(device.type)
    (height, width), (rows, columns) = case.grid, case.window
    return (
        f"{case.name}: B {batch}, H {heads}, {height} x {width} tokens, D {case.head_dim}, windows {rows} x "
        f"{columns}, {case.landmarks} landmarks, {dtype}, {threads} threads"
    )


def table(results: list[Result]) -> str:
    """The peers of one case, dtype and number of threads, forward above forward + backward."""
    header = ["", "ms", f"x {results[0].softmax}", "GFLOP/s", "of matmul", "GB/s", "x floor", "peak MiB"]
    rows = []
    for direction in PASSES:
        rows.append([f"{direction}:"] + [""] * (len(header) - 1))
        for r in results:
            if r.direction == direction:
                rows.append(
                    [
                        f"  {r.peer}",
                        f"{r.milliseconds:.3f}" if r.milliseconds < 10 else f"{r.milliseconds:.1f}",
                        f"{r.times_faster_than_softmax:.2f}",
                        f"{r.gflops:.0f}",
                        f"{r.of_matmul:.0%}",
                        f"{r.gbs:.1f}",
                        f"{r.over_floor:.2f}",
                        "-" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.1f}",
                    ]
                )
    return harness.format_table(header, rows)


def scaling_table(results: list[Result]) -> str:
    """How much faster EVA and softmax get with threads."""
    threads = list(dict.fromkeys(r.threads for r in results))
    header = ["", *(f"{n} threads, ms" for n in threads), *(f"x of {threads[0]}" for _ in threads[1:])]
    by_key = {(r.case, r.dtype, r.direction, r.peer, r.threads): r for r in results}
    rows = []
    for case, dtype, direction, peer in dict.fromkeys(key[:-1] for key in by_key):
        if peer in ("eva", results[0].softmax):
            of_peer = [by_key[case, dtype, direction, peer, n] for n in threads]
            times = [f"{r.milliseconds:.2f}" for r in of_peer]
            ratios = [f"{r.times_faster_than_first_threads:.2f}" for r in of_peer[1:]]
            rows.append([f"{case} {dtype} {direction}, {peer}", *times, *ratios])
    return harness.format_table(header, rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    names = [*CASES, *SWEEP]
    parser.add_argument("--cases", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--sweep", action="store_true", help="the cases sweep_*: 49 to 50,176 tokens")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=list(DTYPES),
        help="default: float32 (and bfloat16 for deit_t_784) on the CPU, bfloat16 on CUDA",
    )
    parser.add_argument(
        "--peers", nargs="+", metavar="PEER", help="only these, beside eva and softmax (default: all)"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", help="CPU threads; several print how the time scales"
    )
    parser.add_argument("--repeats", type=int, default=20, help="rounds (default: 20)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against tokens, and a roofline")
    return parser.parse_args(arguments)


def dtypes_of(case: str, options: argparse.Namespace) -> list[str]:
    if options.dtype:
        return options.dtype
    if options.device == "cuda":
        return ["bfloat16"]
    return ["float32", "bfloat16"] if case == "deit_t_784" else ["float32"]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    all_threads = options.threads or [torch.get_num_threads()]
    names = list(SWEEP) if options.sweep else options.cases or DEFAULT_CASES[options.device]
    cases = [(CASES | SWEEP)[name] for name in names]
    facts = harness.environment(device)
    print(harness.headline(facts))

    everything: list[Result] = []
    ceilings: dict[str, dict[int, dict[str, float]]] = {}
    for case in cases:
        for dtype in dtypes_of(case.name, options):
            if dtype not in ceilings:
                ceilings[dtype] = {}
                for threads in all_threads:
                    torch.set_num_threads(threads)
                    ceilings[dtype][threads] = limits = harness.roofline(device, DTYPES[dtype])
                    print(
                        f"{threads} threads, {dtype}: matrix product {limits['matmul_gflops']:.0f} GFLOP/s, "
                        f"copy {limits['copy_gbs']:.1f} GB/s"
                    )
            peers = options.peers
            if peers is not None:
                peers = ["eva", *softmax_backends(device.type, DTYPES[dtype]), *peers]
            results = run_case(
                case,
                device,
                dtype,
                ceilings[dtype],
                repeats=options.repeats,
                peers=peers,
                memory=not options.no_memory,
            )
            for threads in all_threads:
                of_threads = [result for result in results if result.threads == threads]
                print(f"\n{title(case, device, dtype, threads)}\n{table(of_threads)}\n", flush=True)
            everything += results
    if len(all_threads) > 1:
        print(scaling_table(everything))
    content = {
        **facts,
        "ceilings": [
            {"threads": threads, "dtype": dtype, **limits}
            for dtype, by_threads in ceilings.items()
            for threads, limits in by_threads.items()
        ],
        "results": [asdict(result) for result in everything],
    }
    if options.json:
        harness.write_json(options.json, content)
    if options.plot:
        from .plot import draw

        draw(content, options.plot)


if __name__ == "__main__":
    main()
