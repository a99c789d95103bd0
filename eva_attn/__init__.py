"""EVA, efficient attention via control variates, as PyTorch operators.

Zheng, Yuan, Wang, Kong: "Efficient Attention via Control Variates", ICLR 2023, arXiv:2302.04542.
"""

import json
import sysconfig
from pathlib import Path
from typing import Any

import torch

__version__ = "0.1.0"

_LIBRARY = Path(__file__).with_name("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
_FACTS = _LIBRARY.with_suffix(".json")


def _remedy() -> str:
    root = Path(__file__).parents[1]
    if (root / "setup.py").exists():
        return f"`pip install --no-deps -e {root}`"
    return "`pip install --no-deps --force-reinstall .` in the source tree of eva_attn"


def _check_torch(built: dict[str, Any]) -> None:
    """Raises ImportError unless torch is of the minor release and CUDA major that were built against."""
    here, cuda = torch.__version__, torch.version.cuda
    minor = built["torch"].split(".")[:2]
    if here.split(".")[:2] != minor:
        raise ImportError(
            f"eva_attn was built against torch {built['torch']}, and this is torch {here}: rebuild it with "
            f"{_remedy()}, or go back with `pip install 'torch=={'.'.join(minor)}.*'`"
        )
    built_cuda = built["cuda_version"]
    if built_cuda and built_cuda.split(".")[0] != (cuda or "").split(".")[0]:
        raise ImportError(
            f"eva_attn was built against torch {built['torch']} with CUDA {built_cuda}, and this is torch "
            f"{here} {f'with CUDA {cuda}' if cuda else 'without CUDA'}: rebuild it with {_remedy()}"
        )


if not _LIBRARY.exists():
    raise ImportError(f"eva_attn is not built for this Python (no {_LIBRARY}): build it with {_remedy()}")
# Before it is loaded: a library built against another torch ends in an undefined symbol, or worse.
if _FACTS.exists():
    _check_torch(json.loads(_FACTS.read_text()))

torch.ops.load_library(_LIBRARY)
_check_torch(torch.ops.eva_attn.build_info())  # the file may have been left behind

from . import estimators, flops, functional, official, reference  # noqa: E402, F401
from .advice import advise  # noqa: E402
from .functional import eva_attention, eva_attention_qkvpacked, rotary_embedding  # noqa: E402
from .integrations import convert, replace_attention  # noqa: E402
from .modules import CausalEVAttention, EVAttention, LandmarkProjection  # noqa: E402
from .multihead_attention import EVAMultiheadAttention  # noqa: E402

__all__ = [
    "CausalEVAttention",
    "EVAMultiheadAttention",
    "EVAttention",
    "LandmarkProjection",
    "advise",
    "build_info",
    "convert",
    "estimators",
    "eva_attention",
    "eva_attention_qkvpacked",
    "functional",
    "official",
    "reference",
    "replace_attention",
    "rotary_embedding",
]


def build_info() -> dict[str, Any]:
    """What was compiled in, and what of it this CPU runs.

    `version` (of eva_attn), `library` (path of the compiled operators, which need torch but not Python),
    `torch` and `compiler` (their versions), `cuda` (bool), `cuda_version` and `cuda_arches` (None without
    CUDA), `cpu_only_reason` (None with CUDA), `cpu_capability` (the instruction set that the CPU kernels use:
    "AVX512", "AVX2", or "DEFAULT" for the baseline).
    """
    facts = torch.ops.eva_attn.build_info()
    return {
        "version": __version__,
        "library": str(_LIBRARY),
        **facts,
        "cuda": facts["cuda_version"] is not None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
