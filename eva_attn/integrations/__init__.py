"""EVA in models that were written with softmax attention: a module for each library, imported when needed."""

from .replace import ReplacementReport, replace_attention

__all__ = ["ReplacementReport", "replace_attention"]
