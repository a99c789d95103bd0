"""The folders of csrc know what they are named for: includes point inward, and the kernels know no torch."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"})
KERNELS = [path for path in SOURCES if path.is_relative_to(CSRC / "kernels")]


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', path.read_text(), re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(CSRC))


def test_there_are_kernels() -> None:
    assert KERNELS


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_include_no_torch(path: Path) -> None:
    assert not [
        header for header in included(path) if re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", header)
    ]


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_include_nothing_further_out(path: Path) -> None:
    assert not [header for header in included(path) if re.match(r"ops/|cpu/|cuda/|\.\./", header)]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_the_module_knows_python(path: Path) -> None:
    knows = [
        header
        for header in included(path)
        if re.match(r"pybind11/|Python\.h|torch/(extension|python)\.h", header)
    ]
    assert not knows or name(path) == "module.cpp"
