"""The walk through a model that puts EVA in place of softmax attention."""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, cast

from torch import nn

from ..geometry import Pair, Size
from .registry import Converter, Library, NotReplaced, Site, TokenLayout, qualified_name
from .report import Left, Replaced, ReplacementReport, describe, kind_of

_LIBRARIES = ("torch", "torchvision", "timm", "transformers")

OwnConverter: TypeAlias = Callable[[Any, dict[str, Any]], nn.Module]


def replace_attention(
    model: nn.Module,
    *,
    window_size: Size = 7,
    num_landmarks: int = 49,
    chunk_size: Size | None = None,
    overlap: Size = 0,
    chunk_overlap: Size = 0,
    projection: str = "linear-layernorm",
    relative_bias: str | None = None,
    exclude_window_landmarks: bool = False,
    log_count_bias: bool = False,
    grid_size: Pair | None = None,
    num_prefix_tokens: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    converters: Mapping[type[nn.Module], OwnConverter] | None = None,
) -> ReplacementReport:
    """Puts EVA in place of the softmax self-attention of `model`, which keeps its weights.

    Knows the vision transformers of timm, torchvision and transformers, BERT and RoBERTa and Llama-type
    decoders of transformers, and `nn.MultiheadAttention`, also within torch's encoder layers. Parameters stay
    the same objects under the same names, so that checkpoints of the original load, with `strict=False` where
    EVA has parameters of its own. Grids and prefix tokens are found from the model; images of other sizes
    work where the model takes them.

    Args:
        model: changed in place.
        window_size, ..., log_count_bias: see `EVAttention`. Swin transformers keep windows and relative bias
            of their own. Decoders without `chunk_size` get the largest divisor of `window_size` that leaves
            at least `num_landmarks` chunks in the longest sequence that the model is configured for.
        grid_size, num_prefix_tokens: stand in for those found.
        include, exclude: patterns of module names, such as "encoder.layers.*": those that match one of
            `include` (None: all) and none of `exclude` are replaced. Attention to other tokens than its own
            is to be excluded, unless its class says so.
        converters: of attention classes of your own, or in place of what is done with known ones: what makes
            the new module from the old one and the options above, with `grid_size` and `num_prefix_tokens`
            where they were found or given.

    Returns:
        The names of the modules that were replaced, which print as a table with settings, and with what was
        left and why. ValueError where nothing was replaced.
    """
    options: dict[str, Any] = {
        "window_size": window_size,
        "num_landmarks": num_landmarks,
        "chunk_size": chunk_size,
        "overlap": overlap,
        "chunk_overlap": chunk_overlap,
        "projection": projection,
        "relative_bias": relative_bias,
        "exclude_window_landmarks": exclude_window_landmarks,
        "log_count_bias": log_count_bias,
    }
    if grid_size is not None:
        options["grid_size"] = grid_size
    if num_prefix_tokens is not None:
        options["num_prefix_tokens"] = num_prefix_tokens

    libraries = _libraries(model)
    known_converters = {kind: converter for x in libraries for kind, converter in x.CONVERTERS.items()}
    refused = {kind: reason for x in libraries for kind, reason in x.REFUSED.items()}
    for own, converter in (converters or {}).items():
        refused.pop(qualified_name(own), None)
        known_converters[qualified_name(own)] = _without_site(converter)
    layouts = _layouts(model, libraries)
    made: dict[nn.Module, nn.Module | NotReplaced] = {}  # a module can have several names
    replaced: list[Replaced] = []
    left: list[Left] = []
    for name, parent, child_name, module in list(_children(model)):
        kind = qualified_name(type(module))
        if kind not in known_converters and kind not in refused:
            continue
        outcome: nn.Module | NotReplaced
        if not _matches(name, include, default=True) or _matches(name, exclude, default=False):
            outcome = NotReplaced("excluded")
        elif kind in refused:
            outcome = NotReplaced(refused[kind])
        else:
            if module not in made:
                site = Site(model, parent, _around(name, layouts))
                made[module] = _convert(known_converters[kind], module, site, options)
            outcome = made[module]
        if isinstance(outcome, NotReplaced):
            left.append(Left(name, kind_of(module), str(outcome)))
        else:
            setattr(parent, child_name, outcome)
            replaced.append(Replaced(name, kind_of(module), describe(getattr(outcome, "eva", outcome))))
    known = [entry.name for entry in replaced] + [entry.name for entry in left]
    for name, module in model.named_modules():
        if re.search("attention|attn", type(module).__name__, re.IGNORECASE) and not _touches(name, known):
            left.append(Left(name, kind_of(module), "not known here"))
            known.append(name)
    if not replaced:
        lines = "".join(f"\n  {entry.name}: {entry.reason}" for entry in left)
        raise ValueError(
            "model: expected softmax self-attention known here within it, under a name that include = "
            f"{include!r} and exclude = {exclude!r} let through, found none{lines}"
        )
    return ReplacementReport(replaced, left)


def _convert(
    converter: Converter, module: nn.Module, site: Site, options: dict[str, Any]
) -> nn.Module | NotReplaced:
    layout = site.layout
    if layout is not None and layout.off_grid:
        return NotReplaced(layout.off_grid)
    if layout is not None:
        found = {"grid_size": layout.grid_size, "num_prefix_tokens": layout.num_prefix_tokens}
        if "grid_size" in options:  # one that is given holds for every batch
            layout = None
        options = {**found, **options}
    try:
        eva = converter(module, replace(site, layout=layout), dict(options))
    except NotReplaced as reason:
        return reason
    if layout is not None:
        layout.watch()
    return eva.train(module.training)


def _without_site(converter: OwnConverter) -> Converter:
    return lambda module, site, options: converter(module, options)


def _libraries(model: nn.Module) -> list[Library]:
    """The modules of this package for the libraries that `model` is made of."""
    roots = {kind.__module__.partition(".")[0] for x in model.modules() for kind in type(x).__mro__}
    return [
        cast(Library, importlib.import_module(f"{__package__}.{name}"))
        for name in _LIBRARIES
        if name in roots
    ]


def _layouts(model: nn.Module, libraries: list[Library]) -> dict[str, TokenLayout]:
    """By the name of the model whose tokens they are for."""
    makers = {kind: maker for x in libraries for kind, maker in x.LAYOUTS.items()}
    layouts = {}
    for name, module in model.named_modules():
        kind = next((x for x in map(qualified_name, type(module).__mro__) if x in makers), None)
        if kind is not None:
            layouts[name] = makers[kind](module)
    return layouts


def _around(name: str, layouts: dict[str, TokenLayout]) -> TokenLayout | None:
    """The layout of the innermost model that a module is in."""
    around = [x for x in layouts if not x or name.startswith(x + ".")]
    return layouts[max(around, key=len)] if around else None


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Name, parent, name in the parent, and module: also second names, which `named_children` skips."""
    for parent_name, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            if child is not None:
                yield f"{parent_name}.{child_name}".lstrip("."), parent, child_name, child


def _touches(name: str, others: list[str]) -> bool:
    """Whether a module is one of `others`, in one, or holds one."""
    return any(f"{x}.".startswith(f"{name}.") or f"{name}.".startswith(f"{x}.") for x in others)


def _matches(name: str, patterns: str | Sequence[str] | None, *, default: bool) -> bool:
    if patterns is None:
        return default
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in patterns)
