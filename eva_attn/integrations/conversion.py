"""EVA in a model that was trained with softmax, fitted to give what its attention gave."""

import copy
import inspect
import math
import sys
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..modules import LandmarkProjection
from .replace import replace_attention
from .report import ReplacementReport

Forward: TypeAlias = Callable[[nn.Module, Any], object]
# Takes a layer's name, its output and the original's [..., C], and which tokens [...] count (None: all).
Visit: TypeAlias = Callable[[str, Tensor, Tensor, Tensor | None], None]

_MEASURED_BATCHES = 4


@dataclass(frozen=True)
class LayerGap:
    """How far a layer's output is from that of softmax, on the same inputs.

    `before` and `after` fitting: root mean square of the difference over that of softmax's output.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; prints as a table of each layer's gap.

    Args:
        replacement: what `replace_attention` reported.
        options: what to give `replace_attention` before the converted model's state dict is loaded.
        layers: the gaps.
        curve: of each step, the relative error on its batch, root mean square over the layers.
    """

    replacement: ReplacementReport
    options: dict[str, Any]
    layers: list[LayerGap]
    curve: list[float]

    def __str__(self) -> str:
        before, after = ([getattr(gap, name) for gap in self.layers] for name in ("before", "after"))
        mean = LayerGap("mean", sum(before) / len(before), sum(after) / len(after))
        rows = [("gap to softmax", "swapped", "fitted")]
        rows += [(gap.name, f"{gap.before:.4f}", f"{gap.after:.4f}") for gap in (*self.layers, mean)]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:<{width}}  {before:>8}  {after:>8}" for name, before, after in rows)

    def plot(self, path: str | Path) -> None:
        """Draws the gap of each layer, before and after, and the error while fitting. Needs matplotlib."""
        from matplotlib.figure import Figure  # type: ignore[import-not-found]

        figure = Figure(figsize=(10, 4), layout="constrained")
        by_layer, by_step = figure.subplots(1, 2)
        positions = range(len(self.layers))
        by_layer.bar([x - 0.2 for x in positions], [gap.before for gap in self.layers], 0.4, label="swapped")
        by_layer.bar([x + 0.2 for x in positions], [gap.after for gap in self.layers], 0.4, label="fitted")
        by_layer.set(xlabel="layer", ylabel="gap to softmax", xticks=positions)
        by_layer.legend()
        by_step.plot(self.curve)
        by_step.set(xlabel="step", ylabel="relative error on the step's batch", ylim=(0, None))
        figure.savefig(path, dpi=100)


def convert(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    held_out: Iterable[Any] | None = None,
    steps: int = 200,
    learning_rate: float = 1e-2,
    progress: bool = True,
    projection: str = "linear",
    exclude_window_landmarks: bool = True,
    log_count_bias: bool | None = None,
    **options: Any,
) -> ConversionReport:
    """Puts EVA in place of the softmax attention of a trained `model`, and fits what is new to the old.

    After `replace_attention`, landmark projections start as the identity and relative biases at 0. They are
    then trained to bring the output of each layer, on the inputs that the original has there, to the
    original's. All else keeps its values, and the layers do not depend on each other. A layer that fitting
    does not bring nearer keeps its start. The converted model is a model like any other, to be trained on.

    Fitting draws no random numbers and runs in evaluation mode: the same batches give the same model.

    Args:
        model: changed in place. Weights in float32 fit best; `forward` may use autocast.
        batches: such as a `DataLoader`; iterated again as long as steps are left. Labels are not used.
        forward: runs a model on a batch, with gradients. None: `model(**batch)` for a mapping,
            `model(batch)` for a tensor, for a list or tuple the same with its first entry, on the model's
            device.
        held_out: batches to measure the gap on (None: the first 4 of `batches`).
        steps: of Adam, a batch each, with `learning_rate` falling to 0 by half a cosine. 0 only measures.
        progress: write a line to stderr after every tenth of the steps.
        projection, exclude_window_landmarks, log_count_bias, **options: see `replace_attention`. These
            defaults are not that function's: they start nearer to softmax. `log_count_bias=None` is True but
            for "tangent", which has no use for it, and, where there is no relative bias, nothing to fit.

    ValueError where there is no attention known to `replace_attention`, where `batches` are too few or do not
    reach it, and for Swin transformers, whose attention to windows is not what EVA is to match.
    """
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")
    forward = forward or partial(_forward, device=next(model.parameters()).device)
    options = {
        **options,
        "projection": projection,
        "exclude_window_landmarks": exclude_window_landmarks,
        "log_count_bias": projection != "tangent" if log_count_bias is None else log_count_bias,
    }
    # Parameters are not copied: what both models have, both share.
    old = {id(x): x for x in (*model.parameters(), *model.buffers())}
    original = copy.deepcopy(model, dict(old))
    replacement = replace_attention(model, **options)
    # One name for each module.
    names = list({model.get_submodule(name): name for name in reversed(replacement)}.values())[::-1]
    new = {name: _new_parameters(model.get_submodule(name), old) for name in names}
    parameters = [x for of_layer in new.values() for x in of_layer]
    steps = steps if parameters else 0

    with _fitting(original, model, parameters):
        run = partial(_side_by_side, original, model, names, forward)
        measured = list(held_out if held_out is not None else islice(batches, _MEASURED_BATCHES))
        if not measured:
            raise ValueError("batches, held_out: expected at least one batch")
        before = _gaps(run, names, measured)
        start = {name: [x.detach().clone() for x in of_layer] for name, of_layer in new.items()}
        curve = _fit(run, parameters, batches, steps, learning_rate, progress) if steps else []
        after = _gaps(run, names, measured) if steps else before
        with torch.no_grad():
            for name in names:
                if not after[name] < before[name]:
                    after[name] = before[name]
                    for parameter, value in zip(new[name], start[name], strict=True):
                        parameter.copy_(value)
    return ConversionReport(replacement, options, [LayerGap(x, before[x], after[x]) for x in names], curve)


def _fit(
    run: Callable[[Any, Visit], None],
    parameters: list[nn.Parameter],
    batches: Iterable[Any],
    steps: int,
    learning_rate: float,
    progress: bool,
) -> list[float]:
    """Trains `parameters`; returns the relative error at each step."""
    curve: list[float] = []
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[Tensor] = []

    def visit(name: str, output: Tensor, target: Tensor, valid: Tensor | None) -> None:
        error, norm = _squares(output, target, valid)
        loss = error / norm
        if loss.requires_grad:  # at once, so that the graph of one layer exists at a time
            loss.backward()
        losses.append(loss.detach())

    for step, batch in enumerate(islice(_endlessly(batches, steps), steps), 1):
        optimizer.zero_grad()
        losses.clear()
        run(batch, visit)
        if all(x.grad is None for x in parameters):
            raise ValueError("forward: expected to run the model with gradients")
        optimizer.step()
        schedule.step()
        curve.append(torch.stack(losses).mean().sqrt().item())
        if progress and step * 10 // steps != (step - 1) * 10 // steps:
            error = f"relative error {curve[-1]:.4f}"
            print(f"fitting: step {step}/{steps}, {error}", file=sys.stderr, flush=True)
    return curve


@torch.no_grad()
def _gaps(run: Callable[[Any, Visit], None], names: list[str], batches: list[Any]) -> dict[str, float]:
    sums = {name: [0.0, 0.0] for name in names}

    def visit(name: str, output: Tensor, target: Tensor, valid: Tensor | None) -> None:
        for i, square in enumerate(_squares(output, target, valid)):
            sums[name][i] += square.item()

    for batch in batches:
        run(batch, visit)
    return {name: math.sqrt(error / norm) for name, (error, norm) in sums.items()}


def _squares(output: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of squares of the error, and of the target, which is not 0."""
    wide = torch.promote_types(output.dtype, torch.float32)
    output, target = output.to(wide), target.to(wide)
    error = output - target
    if valid is not None:
        error, target = (x.masked_fill(~valid[..., None], 0) for x in (error, target))
    return error.square().sum(), target.square().sum().clamp(min=torch.finfo(wide).tiny)


def _side_by_side(
    original: nn.Module, model: nn.Module, names: list[str], forward: Forward, batch: Any, visit: Visit
) -> None:
    """Runs both models on `batch`; what a layer gives in the original goes on in both."""
    targets: dict[str, deque[Tensor]] = {name: deque() for name in names}

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        targets[name].append(_tensor(output))

    def compare(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        target, out = targets[name].popleft(), _tensor(output)
        if out.shape != target.shape:
            raise ValueError(
                f"{name}: expected the original's output {tuple(target.shape)}, got {tuple(out.shape)}: its "
                "attention is not to all tokens, so that EVA has nothing to match: exclude it, or take "
                "replace_attention and train the model"
            )
        with torch.autocast(out.device.type, enabled=False):
            visit(name, out, target, _valid(module, args, kwargs))
        return target if isinstance(output, Tensor) else (target, *output[1:])

    with ExitStack() as hooks:
        for name in names:
            teacher, student = original.get_submodule(name), model.get_submodule(name)
            hooks.enter_context(teacher.register_forward_hook(partial(record, name)))
            hooks.enter_context(student.register_forward_hook(partial(compare, name), with_kwargs=True))
        with torch.no_grad():
            forward(original, batch)
        if missed := [name for name in names if not targets[name]]:
            raise ValueError(f"batches: expected to reach all attention that was replaced, missed {missed}")
        forward(model, batch)


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _valid(module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
    """Which tokens are no padding, laid out as the module's output is; None: all."""
    arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if (padding := arguments.get("key_padding_mask")) is not None:
        valid = padding == 0  # also where it is floating, -inf = padding
    elif (valid := arguments.get("attention_mask")) is None:
        return None
    return valid if getattr(module, "batch_first", True) else valid.t()


def _new_parameters(layer: nn.Module, old: Container[int]) -> list[nn.Parameter]:
    """Those whose ids are not among `old`, set to change softmax's keys the least: identity, no bias."""
    for module in layer.modules():
        if isinstance(module, LandmarkProjection):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.eye_(linear.weight)
                    nn.init.zeros_(linear.bias)
        bias = getattr(module, "relative_bias", None)
        if bias is not None and id(bias) not in old:
            nn.init.zeros_(bias)
    return [x for x in layer.parameters() if id(x) not in old]


@contextmanager
def _fitting(original: nn.Module, model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients for `parameters` alone, and no fast paths around the attention's modules."""
    training = {module: module.training for module in model.modules()}
    requires_grad = {x: x.requires_grad for x in model.parameters()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        original.eval()
        model.eval().requires_grad_(False)
        for x in parameters:
            x.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, was in training.items():
            module.training = was
        for x, was in requires_grad.items():
            x.requires_grad_(was)
        for x in parameters:
            x.grad = None


def _endlessly(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    count = 0
    while True:
        begin = count
        for batch in batches:
            count += 1
            yield batch
        if count == begin:
            raise ValueError(f"batches: expected {steps}, or what can be iterated again, got {count}")


def _forward(model: nn.Module, batch: Any, device: torch.device) -> object:
    if isinstance(batch, (list, tuple)):
        batch = batch[0]
    elif isinstance(batch, Mapping):
        batch = dict(batch)  # also what is like a dict without being one
    batch = tree_map_only(Tensor, lambda x: x.to(device), batch)
    return model(**batch) if isinstance(batch, dict) else model(batch)
