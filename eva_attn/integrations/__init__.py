"""EVA in models that were written with softmax attention: a module for each library, imported when needed."""

from .conversion import ConversionReport, LayerGap, convert
from .replace import ReplacementReport, replace_attention

__all__ = ["ConversionReport", "LayerGap", "ReplacementReport", "convert", "replace_attention"]
