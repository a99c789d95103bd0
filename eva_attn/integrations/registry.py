"""What the module of each library offers to `replace_attention`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import nn

from ..geometry import Pair


class NotReplaced(Exception):
    """Why a module keeps the attention that it has."""


class TokenLayout:
    """Where the tokens of a model lie: a prefix, then a grid, whose size can change from batch to batch.

    `off_grid` says why the tokens lie on no grid, if so.
    """

    def __init__(self, grid_size: Pair, num_prefix_tokens: int, off_grid: str | None = None) -> None:
        self.grid_size = grid_size
        self.num_prefix_tokens = num_prefix_tokens
        self.off_grid = off_grid

    def watch(self) -> None:
        """Keeps `grid_size` that of the batch on its way through the model; needless where it is fixed."""


@dataclass(frozen=True)
class Site:
    """Where a module was found: the model as a whole, the module that holds it, the layout of its tokens."""

    model: nn.Module
    parent: Any
    layout: TokenLayout | None


Converter: TypeAlias = Callable[[Any, Site, dict[str, Any]], nn.Module]


class Library(Protocol):
    """A module of this package. Classes go by their qualified names, which need no import."""

    CONVERTERS: Mapping[str, Converter]
    """Of an attention class: (module, site, options of EVA) -> what takes its place. Raises NotReplaced."""

    REFUSED: Mapping[str, str]
    """Why attention of a class is left alone."""

    LAYOUTS: Mapping[str, Callable[[Any], TokenLayout]]
    """Of a model class: where the tokens within it lie."""


def qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def require_layout(site: Site, options: dict[str, Any]) -> None:
    """Raises NotReplaced where nothing says where the tokens of an image lie."""
    if site.layout is None and "grid_size" not in options and "num_prefix_tokens" not in options:
        raise NotReplaced(
            "its grid is unknown outside a model known here: give grid_size and num_prefix_tokens, or "
            "num_prefix_tokens=0 for a sequence"
        )
