"""What an installation says of itself, and what it says to a torch that it was not built against."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eva_attn

PACKAGE = Path(eva_attn.__file__).parent
LIBRARY = Path(eva_attn.build_info()["library"])
FACTS = LIBRARY.with_suffix(".json")


def import_a_copy(folder: Path, *, library: bytes | None = None, **changed: Any) -> str:
    """What importing the package says where its build facts, or its library, are others."""
    copy = folder / "eva_attn"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    if library is not None:
        copy.joinpath(LIBRARY.name).write_bytes(library)
        copy.joinpath(FACTS.name).write_text(json.dumps(json.loads(FACTS.read_text()) | changed))
    done = subprocess.run(
        [sys.executable, "-c", "import eva_attn"],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        text=True,
        capture_output=True,
    )
    return done.stderr


def test_build_info() -> None:
    info = eva_attn.build_info()
    assert info["version"] == eva_attn.__version__
    assert info["torch"] == torch.__version__
    assert info["compiler"]
    assert info["cuda"] is (info["cuda_version"] is not None) is (info["cpu_only_reason"] is None)
    assert bool(info["cuda_arches"]) is info["cuda"]
    assert info["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"torch": "2.3.1+cu118"}, ["2.3.1+cu118", torch.__version__, "pip install"]),
        ({"torch": "3.0.0"}, ["3.0.0", torch.__version__, "pip install 'torch==3.0.*'"]),
        ({"cuda_version": "11.8"}, ["CUDA 11.8", torch.__version__, "pip install"]),
    ],
)
def test_another_torch_is_refused_before_the_library_is_loaded(
    tmp_path: Path, changed: dict, says: list[str]
) -> None:
    # Loading such a library would say `file too short`.
    stderr = import_a_copy(tmp_path, library=b"", **changed)
    assert "ImportError: eva_attn was built" in stderr
    assert all(part in stderr for part in says)


def test_a_package_without_its_library_says_how_to_build_it(tmp_path: Path) -> None:
    stderr = import_a_copy(tmp_path)
    assert "ImportError: eva_attn is not built for this Python" in stderr
    assert "pip install" in stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' torch does not use OpenMP")
def test_kernels_run_on_threads() -> None:
    """Compiled without OpenMP, torch's `parallel_for` is a plain loop."""
    library = LIBRARY.read_bytes()
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library
