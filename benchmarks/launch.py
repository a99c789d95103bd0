"""Host time of one attention call on CUDA: `python -m benchmarks.launch`.

Inputs so small that the GPU is always done first: what is left is what Python, the dispatcher and the
launches cost.
"""

import time

import torch
import torch.nn.functional as F

import eva_attn

from . import harness

CALLS = 200


def host_clock(call: harness.Call) -> float:
    """Seconds on the host of one call, of `CALLS` in a row."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / CALLS


def main() -> None:
    device = torch.device("cuda")
    print(harness.headline(harness.environment(device)))
    packed = torch.randn(1, 196, 3, 2, 64, device=device, dtype=torch.bfloat16)
    query, key, value = (x.transpose(1, 2).contiguous() for x in packed.unbind(2))
    projection = eva_attn.LandmarkProjection(64, device=device)
    bias = torch.randn(2, 13, 13, device=device)

    def eva() -> None:
        eva_attn.eva_attention_qkvpacked(
            packed, window_size=7, chunk_size=2, grid_size=(14, 14), projection=projection, relative_bias=bias
        )

    def softmax() -> None:
        F.scaled_dot_product_attention(query, key, value)

    calls = {"eva": torch.no_grad()(eva), "softmax": torch.no_grad()(softmax)}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(12):
        for name, call in calls.items():
            rounds[name].append(host_clock(call))
    timings = {name: harness.Timing(seconds[2:]) for name, seconds in rounds.items()}
    rows = [
        [name, f"{timing.median * 1e6:.1f}", f"{1 / timing.times_faster_than(timings['softmax']):.2f}"]
        for name, timing in timings.items()
    ]
    print(harness.format_table(["forward", "us on the host", "x softmax"], rows))


if __name__ == "__main__":
    main()
