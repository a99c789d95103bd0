"""Compiled from csrc/module.cpp: operators by position, which return their output alone."""

from typing import Any

from torch import Tensor

def eva_attention(*arguments: Any) -> Tensor: ...
def eva_attention_qkvpacked(*arguments: Any) -> Tensor: ...
