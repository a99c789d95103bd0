"""Processes over gloo compute what one does: data parallel, sharded, and parallel over heads."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from eva_attn import CausalEVAttention, EVAttention, LandmarkProjection, functional, replace_attention
from eva_attn.distributed import HeadwiseParallel

DIM, HEADS, TOKENS, BATCH = 16, 4, 12, 4

ATTENTION: list[Callable[[], nn.Module]] = [
    partial(EVAttention, DIM, HEADS, window_size=2, chunk_size=2, grid_size=(3, 4), relative_bias="table"),
    partial(
        EVAttention, DIM, HEADS, window_size=4, chunk_size=2, relative_bias="t5", qk_norm=nn.LayerNorm,
        log_count_bias=True,
    ),
    partial(CausalEVAttention, DIM, HEADS, window_size=4, chunk_size=2, qkv_bias=False),
]  # fmt: skip


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attention = attention
        self.mlp = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.attention(self.norm(x)))


def transformer() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(make()) for make in ATTENTION))
    model.append(nn.TransformerEncoderLayer(DIM, HEADS, DIM, batch_first=True, dropout=0.0))
    replace_attention(model, window_size=4, chunk_size=2)
    return model.double().eval()  # in training, noise would differ between shares of the batch


def sharded(model: nn.Module, **options: object) -> nn.Module:
    for block in model:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train(model: nn.Module, x: Tensor) -> None:
    """Two steps on the mean over sequences."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).square().sum() / len(x)).backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of one process, its heads packed."""

    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    for name, x in state.items():
        if ".qkv." in name and x.dim() > 2:
            state[name] = x.transpose(0, 1).flatten(0, 2)
    return state


def check_data_parallel(share: Tensor, expected: dict[str, Tensor]) -> None:
    model = transformer()
    train(DistributedDataParallel(model), share)
    torch.testing.assert_close(model.state_dict(), expected)


def check_sharded(share: Tensor, expected: dict[str, Tensor], folder: str) -> None:
    model = sharded(transformer())
    train(model, share)
    torch.testing.assert_close(whole(model), expected)

    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/sharded")
    resumed = fully_shard(transformer())
    state = get_model_state_dict(resumed)
    dcp.load(state, checkpoint_id=f"{folder}/sharded")
    set_model_state_dict(resumed, state)
    assert torch.equal(resumed(share), model(share))


def check_compiled(share: Tensor, expected: dict[str, Tensor]) -> None:
    """Blocks compiled whole, between the hooks that gather their weights."""
    model = sharded(transformer())
    for block in model:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    train(model, share)
    torch.testing.assert_close(whole(model), expected)


def check_headwise(batch: Tensor, expected: dict[str, Tensor], folder: str) -> None:
    """Heads shared out by two, the batch by the rest; and the checkpoint with heads shared out by all."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "heads"))
    plan = {"[012].attention": HeadwiseParallel()}
    model = sharded(parallelize_module(transformer(), mesh["heads"], plan), mesh=mesh["data"])
    assert model[0].attention.qkv.weight.to_local().numel() == 3 * DIM * DIM // world
    train(model, batch.chunk(world // 2)[mesh.get_local_rank("data")])
    torch.testing.assert_close(whole(model), expected)

    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/headwise")
    resumed = parallelize_module(transformer(), init_device_mesh("cpu", (world,)), plan)
    state = get_model_state_dict(resumed)
    dcp.load(state, checkpoint_id=f"{folder}/headwise")
    set_model_state_dict(resumed, state)
    torch.testing.assert_close(resumed(batch), model(batch))


def check_noise_and_dropout(batch: Tensor) -> None:
    """The same in all processes, for the same seed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = []
    for parallel in (False, True):
        torch.manual_seed(0)
        attention = EVAttention(DIM, HEADS, window_size=4, chunk_size=2, attn_drop=0.2).double()
        if parallel:
            parallelize_module(attention, mesh, HeadwiseParallel())
        x = batch.clone().requires_grad_()
        torch.manual_seed(1)
        out = attention(x, key_padding_mask=torch.arange(TOKENS) >= torch.arange(BATCH)[:, None] + 8)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*results)


@torch.no_grad()
def check_functions() -> None:
    """On DTensors shared out by batch, by heads, or not at all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    query, key, value = torch.randn(3, BATCH, HEADS, TOKENS, 4, dtype=torch.float64).unbind()
    bias, landmark_bias = torch.randn(1, 7, dtype=torch.float64), torch.randn(BATCH, 6, dtype=torch.float64)
    windows = {"window_size": 4, "chunk_size": 2, "relative_bias": bias, "landmark_bias": landmark_bias}
    for projection in (None, LandmarkProjection(4, "tangent")):
        summaries = {"chunk_size": 2, "projection": projection}
        landmarks = functional.chunk_summary(query, key, value, **summaries)
        expected = functional.window_attention(query, key, value, *landmarks, **windows)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            shares = [distribute_tensor(x, mesh, [placement]) for x in (query, key, value)]
            actual = functional.chunk_summary(*shares, **summaries)
            halves = functional.window_attention(*shares, *actual, **windows)
            whole = functional.eva_attention(*shares, **windows, projection=projection)
            for out in (halves, whole):
                assert out.placements == ((Replicate() if placement == Shard(2) else placement),)
                torch.testing.assert_close(out.full_tensor(), expected)
    share = distribute_tensor(query[:, :3], mesh, [Shard(1)])
    with pytest.raises(ValueError, match="heads: expected a multiple of"):
        functional.eva_attention(share, share, share, window_size=4, chunk_size=2)
    grouped = CausalEVAttention(DIM, HEADS, num_kv_heads=2)
    for module, error in (
        (nn.Linear(4, 4), TypeError),
        (EVAttention(12, 3), ValueError),
        (grouped, ValueError),
    ):
        with pytest.raises(error, match="expected"):
            parallelize_module(module, mesh, HeadwiseParallel())


def run_process(rank: int, world: int, folder: str, batch: Tensor, expected: dict[str, Tensor]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    share = batch.chunk(world)[rank]
    check_data_parallel(share, expected)
    check_sharded(share, expected, folder)
    if world == 2:
        check_compiled(share, expected)
    check_headwise(batch, expected, folder)
    check_noise_and_dropout(batch)
    check_functions()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_equal_one(world: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    model = transformer()
    train(model, batch)
    torch.multiprocessing.spawn(run_process, (world, str(tmp_path), batch, model.state_dict()), nprocs=world)
