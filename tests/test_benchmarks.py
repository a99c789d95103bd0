"""The harness measures what it says, peers compute the same thing, the command writes what it prints."""

import json
import sys
import time

import pytest
import torch

from benchmarks import attention, cases, decode, harness, train_step
from benchmarks.cases import CASES, SWEEP, Case
from benchmarks.peers import make_peers

CPU = torch.device("cpu")
MIB = 2**20
SMALL = Case("small", 2, 2, 2, 2, grid=(6, 8), window=(3, 4), chunk=(3, 2), head_dim=8)


def test_eva_needs_fewer_operations_as_stated():
    for name, fewer in (("deit_t_784", 8), ("pvt_3136", 32), ("grid_16384", 128)):
        case = CASES[name]
        joint = cases._window_pairs(case) + case.tokens * case.landmarks
        assert case.tokens**2 / joint == fewer


@pytest.mark.parametrize("is_causal", [False, True])
def test_window_pairs_of_ragged_windows(is_causal):
    case = Case("ragged", 1, 1, 1, 1, grid=(1, 11), window=(1, 4), chunk=(1, 2), is_causal=is_causal)
    position = torch.arange(11)
    visible = position[:, None] // 4 == position // 4
    if is_causal:
        visible &= position <= position[:, None]
    assert cases._window_pairs(case) == visible.sum()


def test_landmark_pairs_of_causal_attention():
    case = Case("causal", 1, 1, 1, 1, grid=(1, 12), window=(1, 4), chunk=(1, 2), head_dim=1, is_causal=True)
    summaries = 8 * 12 + 4 * 6
    # A query of chunk c sees c landmarks: 2 (0 + 1 + ... + 5) pairs.
    assert cases.eva_flops(case, False) - cases.window_flops(case, False) - summaries == 4 * 30


def test_measure_takes_turns_and_pairs_rounds():
    order = []

    def sleep(name, seconds):
        order.append(name)
        time.sleep(seconds)

    calls = {"slow": lambda: sleep("slow", 0.006), "quick": lambda: sleep("quick", 0.001)}
    timings = harness.measure(calls, CPU, repeats=4, warmup=1)
    turns = ["slow", "quick"] + ["slow", "quick", "quick", "slow"] * 2
    assert order == [name for name in turns for _ in range(2)]  # the first of two is not timed
    assert len(timings["slow"].seconds) == 4
    assert timings["slow"].median >= 0.006
    assert timings["quick"].times_faster_than(timings["slow"]) > 1
    assert timings["slow"].times_faster_than(timings["slow"]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_counts_scratch_but_not_outputs():
    peaks = harness.peak_memory(_calls_with_scratch, 32, device=CPU)
    # Beside the scratch only pages that the interpreter touches for itself.
    assert peaks["scratch"] / MIB == pytest.approx(32, abs=1)
    assert peaks["no scratch"] / MIB == pytest.approx(0, abs=1)


def _calls_with_scratch(mib):
    def scratch():
        memory = torch.ones(mib * MIB, dtype=torch.uint8)
        return memory[: 8 * MIB].clone(), [memory[: 4 * MIB].clone()]

    return {"scratch": scratch, "no scratch": lambda: torch.ones(8 * MIB, dtype=torch.uint8)}


@pytest.mark.parametrize(
    "case",
    [SMALL, Case("line", 2, 2, 2, 2, grid=(1, 48), window=(1, 12), chunk=(1, 8), head_dim=8)],
    ids=lambda case: case.name,
)
def test_peers_agree(case):
    torch.manual_seed(0)
    peers = make_peers(case, CPU, torch.float64)
    assert {"eva", "sdpa", "augmented sdpa", "dense formula", "window only"} == set(peers)
    results = {}
    for name in ("eva", "augmented sdpa", "dense formula"):
        calls = harness.forward_and_backward(peers[name].function, peers[name].leaves)
        torch.manual_seed(1)
        output = peers[name].function()
        cotangent = torch.randn(output.shape, dtype=output.dtype)
        grads = torch.autograd.grad(output, peers[name].leaves, cotangent)
        if name == "eva":
            query, key, value = (x.transpose(1, 2) for x in grads[0].unbind(2))
            grads = (query, key, value, *grads[1:])
        results[name] = (output, *grads)
        assert len(calls()) == 1 + len(peers[name].leaves)
    for name in ("augmented sdpa", "dense formula"):
        # Float64 rounding over a few hundred terms.
        torch.testing.assert_close(results[name], results["eva"], rtol=1e-9, atol=1e-11)


def test_command_prints_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CASES, "small", SMALL)
    monkeypatch.setattr(harness, "roofline", lambda *_: {"matmul_gflops": 100.0, "copy_gbs": 10.0})
    threads = torch.get_num_threads()
    path = tmp_path / "deeper" / "cpu.json"
    try:
        files = ["--json", str(path), "--plot", str(path.with_suffix(".png"))]
        attention.main(["--cases", "small", "--threads", "1", "2", "--repeats", "2", *files])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for word in ("small: B 2, H 2, 6 x 8 tokens", "x sdpa", "GFLOP/s", "augmented sdpa", "2 threads, ms"):
        assert word in printed
    assert path.with_suffix(".png").stat().st_size > 10_000
    content = json.loads(path.read_text())
    assert {"date", "commit", "device", "torch", "eva_attn", "ceilings", "results"} <= set(content)
    assert len(content["ceilings"]) == 2
    results = content["results"]
    assert len(results) == 2 * 2 * 5  # threads, directions, peers
    assert all(r["times_faster_than_softmax"] == 1 for r in results if r["peer"] == "sdpa")
    eva = next(r for r in results if r["peer"] == "eva")
    flops = 4 * cases.eva_flops(SMALL, False)
    assert eva["gflops"] == pytest.approx(flops / eva["milliseconds"] / 1e6)
    assert eva["over_floor"] == pytest.approx(10 / eva["gbs"])


def test_sweep_is_the_same_work_but_for_softmax():
    assert {case.batch * case.tokens for case in SWEEP.values()} == {224 * 224}
    assert {case.landmarks for case in SWEEP.values()} == {49}


def test_train_step_prints_every_attention(capsys, tmp_path):
    path = tmp_path / "step.json"
    sizes = {"batch": 2, "image-size": 14, "patch-size": 2, "width": 16, "depth": 1, "heads": 2, "repeats": 1}
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    train_step.main(["--device=cpu", "--no-compile", *flags, f"--json={path}"])
    printed = capsys.readouterr().out
    milliseconds = json.loads(path.read_text())["milliseconds"]
    for name in ("softmax", "eva", "window", "none"):
        assert name in printed
        assert milliseconds[name] > 0


def test_decode_prints_every_context(capsys, tmp_path):
    path = tmp_path / "decode.json"
    sizes = {"batch": 2, "heads": 2, "head-dim": 8, "window": 8, "chunk": 4, "repeats": 3}
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    decode.main(["--device=cpu", "--contexts", "160", "184", *flags, f"--json={path}"])
    printed = capsys.readouterr().out
    small, large = json.loads(path.read_text())["results"]
    for result in (small, large):
        assert str(result["context"]) in printed
        assert result["eva_attention_us"] > 0
        assert result["softmax_module_us"] > 0
    # Six landmarks more of 2 x 8 numbers, for 2 x 2 heads; of the cache 24 tokens.
    assert large["state_bytes"] - small["state_bytes"] == 6 * 4 * 2 * 8 * 4
    assert large["cache_bytes"] - small["cache_bytes"] == 24 * 4 * 2 * 8 * 4
