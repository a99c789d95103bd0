"""What training scripts do with modules: copies, checkpoints, precision."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from eva_attn import CausalEVAttention, EVAMultiheadAttention, EVAttention, eva_attention

DIM, HEADS, TOKENS = 16, 2, 12


class SelfAttention(EVAMultiheadAttention):
    """With the interface of the other modules."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


MODULES: dict[str, Callable[..., nn.Module]] = {
    "2-D": partial(
        EVAttention, DIM, HEADS, window_size=2, chunk_size=2, grid_size=(3, 4), relative_bias="table"
    ),
    "t5": partial(
        EVAttention, DIM, HEADS, window_size=4, chunk_size=2, relative_bias="t5", qk_norm=nn.LayerNorm
    ),
    "causal": partial(CausalEVAttention, DIM, HEADS, window_size=4, chunk_size=2, relative_bias="t5"),
    "multihead": partial(SelfAttention, DIM, HEADS, window_size=4, chunk_size=2, batch_first=True),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


def tokens(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, TOKENS, DIM, dtype=dtype)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    module(x).square().sum().backward()
    return [p.grad.clone() for p in module.parameters()]


def saved(value: Any, **options: Any) -> Any:
    """After torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@each_module
def test_copies_compute_the_same(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), tokens()
    expected = module(x)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        saved(module, weights_only=False),
        make().eval(),
    ]
    copies[-1].load_state_dict(saved(module.state_dict(), weights_only=True))
    assert all(torch.equal(other(x), expected) for other in copies)
    assert not set(copies[0].parameters()) & set(module.parameters())


@each_module
def test_from_the_meta_device(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), tokens()
    empty = make(device="meta").eval()
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu")
    for part in empty.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    empty.load_state_dict(module.state_dict())
    torch.testing.assert_close(empty(x), module(x))


@each_module
def test_the_representation_names_settings(make: Callable[..., nn.Module]) -> None:
    text = repr(make())
    assert "window_size=" in text
    assert "chunk_size=2" in text


@each_module
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(make: Callable[..., nn.Module], use_reentrant: bool) -> None:
    """Noise and dropout are drawn again as they were."""
    torch.manual_seed(0)
    dropped = "dropout" if make is MODULES["multihead"] else "attn_drop"
    module = make(**{dropped: 0.2}).train()
    x = tokens().requires_grad_()
    torch.manual_seed(1)
    expected = gradients(module, x)
    checkpointed = nn.Module()
    checkpointed.attention = module
    checkpointed.forward = lambda x: checkpoint(module, x, use_reentrant=use_reentrant)
    torch.manual_seed(1)
    for actual, wanted in zip(gradients(checkpointed, x), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@each_module
def test_autocast_and_gradient_scaling(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), tokens()
    expected = gradients(module, x)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    scaler.scale(out.float().square().sum()).backward()
    scaler.unscale_(optimizer)
    for parameter, wanted in zip(module.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - wanted).norm() <= 0.1 * wanted.norm() + 1e-2
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10


@each_module
def test_gradients_accumulate(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = make(dtype=torch.float64).eval(), tokens(4, torch.float64)
    expected = gradients(module, x)
    module.zero_grad()
    for part in x.chunk(2):
        module(part).square().sum().backward()
    for parameter, wanted in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


@each_module
def test_moving_average(make: Callable[..., nn.Module]) -> None:
    module = make()
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    average.update_parameters(module)
    for mean, parameter in zip(average.module.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mean, parameter - 0.9)


@each_module
def test_functional_call(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    module, other, x = make().eval(), make().eval(), tokens()
    assert torch.equal(torch.func.functional_call(module, dict(other.named_parameters()), (x,)), other(x))


def attend(x: Tensor) -> Tensor:
    return eva_attention(x, x, x, window_size=4, chunk_size=2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop() -> None:
    x = torch.randn(3, 1, 2, 8, 4, requires_grad=True)
    out = torch.vmap(attend)(x)
    assert torch.equal(out, torch.stack([attend(row) for row in x]))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_transforms_of_gradients_are_refused(transform: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="functorch transforms"):
        transform(lambda x: attend(x).sum())(torch.randn(1, 2, 8, 4))


def test_profiler_ranges_have_short_names() -> None:
    module = MODULES["2-D"]()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(tokens()).sum().backward()
    names = {event.name for event in profile.events() if "eva_attn" in event.name}
    operator = "eva_attn::eva_attention_qkvpacked"
    assert {operator, f"{operator}_backward"} <= names
    assert max(map(len, names)) < 150


class Wrapped(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def test_lora() -> None:
    """On both projections, with the landmarks trained in full, and merged back into the weights."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    attention, x = MODULES["2-D"](dtype=torch.float64).eval(), tokens(dtype=torch.float64)
    config = peft.LoraConfig(target_modules=["qkv", "proj"], modules_to_save=["landmark_projection"], r=2)
    model = peft.get_peft_model(Wrapped(copy.deepcopy(attention)), config).eval()
    torch.testing.assert_close(model(x), attention(x))  # adapters start at zero

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for part in (
        "qkv.lora_A",
        "qkv.lora_B",
        "proj.lora_A",
        "proj.lora_B",
        "landmark_projection",
    ):
        assert any(part in name for name in trained), part
    assert not any("base_layer" in name for name in trained)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
