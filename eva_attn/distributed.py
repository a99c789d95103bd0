"""EVA on tensors that `torch.distributed.tensor` shares out among processes, by batch and by heads.

The functions of `eva_attn` take DTensors: they import this once they meet one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from .modules import _ProjectedEVA

# The dimensions of batch and heads, for what has them; weights have neither.
_DIMENSIONS: dict[str, tuple[int | None, int | None]] = {
    "noise": (0, 1),
    "relative_bias": (None, 0),
    "landmark_bias": (0, None),
    "landmark_entropy": (0, 1),
    "key_padding_mask": (0, None),
}


def call_on_shards(
    op: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], options: dict[str, Any]
) -> list[DTensor]:
    """`op(*tensors, **options)`, each process for its batch and heads of the first of `tensors`, a DTensor.

    The others follow it. Tensors that are not distributed count as replicated. Results are [B, H, ...].

    ValueError where processes do not divide batch or heads.
    """
    first: Any = tensors[0]
    mesh = first.device_mesh
    dimensions = (0, 1) if first.dim() == 4 else (0, 3)
    # What each dimension of the mesh shares out: 0 batch, 1 heads, None neither.
    shared = [
        dimensions.index(p.dim) if isinstance(p, Shard) and p.dim in dimensions else None
        for p in first.placements
    ]
    if options.get("dropout_p"):
        shared = [None] * mesh.ndim  # which entries are dropped depends on batch and head
    for i, axis in enumerate(shared):
        if axis is not None and first.shape[dimensions[axis]] % mesh.size(i):
            raise ValueError(
                f"{('batch', 'heads')[axis]}: expected a multiple of {mesh.size(i)} processes, "
                f"got {first.shape[dimensions[axis]]}"
            )

    def local(x: Tensor, dimensions: tuple[int | None, int | None]) -> Tensor:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
        placements: list[Placement] = []
        gradients: list[Placement] = []
        for axis in shared:
            dimension = None if axis is None else dimensions[axis]
            placements.append(Replicate() if dimension is None else Shard(dimension))
            gradients.append(Partial() if dimension is None and axis is not None else placements[-1])
        return x.redistribute(placements=placements).to_local(grad_placements=gradients)

    def local_option(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        batch, heads = _DIMENSIONS.get(name, (None, None))
        return local(x, (batch, heads if heads is None or x.shape[heads] > 1 else None))

    results = op(
        *(x if x is None else local(x, dimensions) for x in tensors),
        **{name: local_option(name, x) for name, x in options.items()},
    )
    placements = [Replicate() if axis is None else Shard(axis) for axis in shared]
    return [DTensor.from_local(x, mesh, placements, run_check=False) for x in results]


class HeadwiseParallel(ParallelStyle):
    """Shares the heads of an `EVAttention` or `CausalEVAttention` out, for `parallelize_module`.

    Each process projects to, attends in, and projects back from its own heads; what it adds to the output is
    summed over processes. Landmark projection and relative bias are replicated. Input and output are plain
    tensors, the same in all processes. In training all processes must have the same random seed, as each
    draws the noise of all heads; dropout of attention weights makes each compute all heads.

    The packed weight of `qkv` [3 H D, dim] becomes [H, 3, D, dim], and its bias likewise, as rows in their
    packed order would share out q, k and v instead of heads. So load a checkpoint before; afterwards
    `weight.full_tensor().transpose(0, 1).flatten(0, 2)` is the packed weight.

    ValueError where processes do not divide the heads, and for grouped heads; TypeError for other modules.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, _ProjectedEVA):
            raise TypeError(f"module: expected EVAttention or CausalEVAttention, got {type(module).__name__}")
        if module.num_heads % device_mesh.size():
            raise ValueError(
                f"num_heads: expected a multiple of {device_mesh.size()} processes, got {module.num_heads}"
            )
        if module.num_kv_heads != module.num_heads:
            raise ValueError(
                f"num_kv_heads: expected num_heads = {module.num_heads}, got {module.num_kv_heads}: grouped "
                "heads cannot be shared out"
            )
        module.qkv = _HeadwiseProjection(module.qkv, module.num_heads)  # type: ignore[assignment]
        shards = {module.qkv.weight: 0, module.qkv.bias: 0, module.proj.weight: 1}

        def share_out(_: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for name, x in part.named_parameters(recurse=False):
                placement = Shard(shards[x]) if x in shards else Replicate()
                part.register_parameter(name, nn.Parameter(distribute_tensor(x, mesh, [placement])))

        # Annotated as returning None, input and output functions return what goes on.
        return distribute_module(module, device_mesh, share_out, _replicate_input, _gather_output)  # type: ignore[arg-type]


class _HeadwiseProjection(nn.Module):
    """[B, N, dim] -> [B, N, 3, H, D] by a weight [H, 3, D, dim] and a bias [H, 3, D]."""

    def __init__(self, packed: nn.Linear, num_heads: int) -> None:
        super().__init__()

        def by_head(x: Tensor) -> nn.Parameter:
            x = x.detach().unflatten(0, (3, num_heads, -1)).transpose(0, 1)
            return nn.Parameter(x.contiguous())

        self.weight = by_head(packed.weight)
        self.bias = None if packed.bias is None else by_head(packed.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        out = F.linear(x, self.weight.flatten(0, 2), bias)
        return out.unflatten(2, self.weight.shape[:3]).transpose(2, 3)


def _replicate_input(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    x, *rest = inputs
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return x.redistribute(placements=[Replicate()]), *rest


def _gather_output(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
    return output.redistribute(placements=[Replicate()]).to_local()
