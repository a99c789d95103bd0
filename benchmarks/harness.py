"""How every benchmark here measures: peers in one process, call by call in turn; medians, ratios of a round.

A machine's clock and its neighbours drift: what runs side by side is comparable, what ran minutes apart is
not.
"""

import argparse
import ctypes
import datetime
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Call = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)

_GLIBC_TRIM_THRESHOLD, _GLIBC_MMAP_THRESHOLD = -1, -3
_CACHE_BYTES = 512 << 20  # more than any last-level cache
_HEAD_START_CYCLES = 4_000_000  # about 2 ms, in which the host queues a call's kernels


@dataclass(frozen=True)
class Timing:
    """Seconds of each round's call, in the order of rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def times_faster_than(self, other: "Timing") -> float:
        """Median over rounds of the other's time over this one's, both of the same round."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    repeats: int = 20,
    warmup: int = 2,
    time_limit: float = 30.0,
) -> dict[str, Timing]:
    """Times all `calls` interleaved: each round runs every one of them once, starting with another each time.

    Stops after `repeats` rounds, or once `time_limit` seconds have passed and five rounds are done. On
    CUDA, events time the kernels, with a cold L2 cache and the host running ahead. On a CPU a call that is
    not timed goes before each that is: while a slow peer runs for half a second, a virtual machine takes back
    the memory of the others, and to get it again takes longer than the call.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    for call in calls.values():
        for _ in range(warmup):
            clock(call)
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 5 and time.perf_counter() - start > time_limit:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(clock(calls[name]))
    return {name: Timing(values) for name, values in seconds.items()}


def _cpu_clock(call: Call) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_clock(device: torch.device) -> Callable[[Call], float]:
    cold = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)  # filling it evicts the cache
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(call: Call) -> float:
        cold.zero_()
        torch.cuda._sleep(_HEAD_START_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return clock


def peak_memory(
    make_calls: Callable[..., Mapping[Key, Call]], *arguments: Any, device: torch.device
) -> dict[Key, int | None]:
    """Most bytes that each call of `make_calls(*arguments)` holds beyond what existed before and its outputs.

    On CUDA the allocator's peak. On the CPU the peak of resident memory, which sees the scratch memory of
    every library as well; Linux with glibc only, None elsewhere. It is measured in a new process, which
    imports `make_calls`: in an old one, blocks that were freed before are used again unseen.
    """
    if device.type == "cuda":
        return {key: _peak_on_cuda(call, device) for key, call in make_calls(*arguments).items()}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peaks_on_cpu, torch.get_num_threads(), make_calls, arguments).result()


def _peak_on_cuda(call: Call, device: torch.device) -> int:
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = call()
    return max(0, torch.cuda.max_memory_allocated(device) - before - _bytes_of(outputs))


def _peaks_on_cpu(
    threads: int, make_calls: Callable[..., Mapping[Key, Call]], arguments: tuple[Any, ...]
) -> dict[Key, int | None]:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    can_measure = hasattr(libc, "malloc_trim") and os.access("/proc/self/clear_refs", os.W_OK)
    if can_measure:  # large blocks come from the system and go back to it at once
        libc.mallopt(_GLIBC_MMAP_THRESHOLD, 64 << 10)
        libc.mallopt(_GLIBC_TRIM_THRESHOLD, 64 << 10)
    return {
        key: _peak_on_cpu(call, libc) if can_measure else None for key, call in make_calls(*arguments).items()
    }


def _peak_on_cpu(call: Call, libc: ctypes.CDLL) -> int:
    call()
    peaks = []
    for _ in range(3):
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = _resident("VmRSS")
        outputs = call()
        peaks.append(_resident("VmHWM") - before - _bytes_of(outputs))
        del outputs
    return max(0, sorted(peaks)[1])


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:", 1)[1].split(maxsplit=1)[0]) << 10


def _bytes_of(outputs: Any) -> int:
    if isinstance(outputs, Tensor):
        return outputs.numel() * outputs.element_size()
    return sum(map(_bytes_of, outputs)) if isinstance(outputs, (tuple, list)) else 0


def forward_only(function: Callable[[], Tensor]) -> Call:
    """The call that makes `function`'s output and records no graph."""
    return torch.no_grad()(function)


def forward_and_backward(function: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    """The call that makes `function`'s output and the gradients of `leaves`, for one cotangent."""
    with torch.no_grad():
        cotangent = torch.randn_like(function())

    def call() -> tuple[Tensor, ...]:
        output = function()
        return output, *torch.autograd.grad(output, leaves, cotangent)

    return call


def roofline(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The machine's limits with the threads set now: matrix product, and copy counted as read and written."""
    if device.type == "cpu":
        n, dtype = 2048, torch.float32  # what the kernels convert half precision to
    else:
        n = 8192
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    source, target = (torch.ones(_CACHE_BYTES // 8, dtype=torch.int32, device=device) for _ in range(2))
    calls: dict[str, Call] = {
        "matmul": lambda: torch.mm(a, b, out=out),
        "copy": lambda: target.copy_(source),
    }
    timings = measure(calls, device, repeats=10)
    return {
        "matmul_gflops": 2 * n**3 / min(timings["matmul"].seconds) / 1e9,
        "copy_gbs": 2 * source.numel() * source.element_size() / min(timings["copy"].seconds) / 1e9,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    import eva_attn
    from eva_attn.advice import device_name

    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": device_name(device),
        "eva_attn": {name: x for name, x in eva_attn.build_info().items() if name != "library"},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if device.type == "cpu":
        facts["threads"] = torch.get_num_threads()
    return facts


def command(module: str, arguments: list[str] | None) -> str:
    """What was typed to run a module of this package; `arguments` None: those of this process."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *(arguments or sys.argv[1:])])


def headline(facts: dict[str, Any]) -> str:
    """`environment` in a line."""
    version = f"eva_attn {facts['eva_attn']['version']} ({facts['commit']})"
    return f"{facts['device']}; torch {facts['torch']}, {version}; {facts['date']}"


def _commit() -> str:
    root = Path(__file__).parents[1]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def draw_json(
    module: str,
    description: str | None,
    source: str,
    draw: Callable[[dict[str, Any], Path], None],
    arguments: list[str] | None,
) -> None:
    """The command of a module that draws what `benchmarks.<source> --json` wrote."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    parser.add_argument("json", type=Path, help=f"what `python -m benchmarks.{source} --json` wrote")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    draw(json.loads(options.json.read_text()), options.picture)


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their longest cell; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
