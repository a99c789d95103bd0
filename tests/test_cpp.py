"""The C++ example: built, and run without Python."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import HAS_CUDA

import eva_attn
from examples.cpp.export_vit import export

SOURCE = Path(__file__).parents[1] / "examples/cpp"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
@pytest.mark.skipif(sys.platform != "linux", reason="built on Linux alone")
def test_a_package_runs_without_python(tmp_path: Path) -> None:
    def start(*command: object) -> subprocess.Popen[str]:
        words = [str(part) for part in command]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(process: subprocess.Popen[str]) -> str:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    finish(start("cmake", "-S", SOURCE, "-B", tmp_path, f"-DTORCH={Path(torch.__file__).parent}"))
    build = start("cmake", "--build", tmp_path)
    model = export(str(tmp_path / "vit.pt2"))  # meanwhile
    finish(build)
    assert "libpython" not in finish(start("ldd", tmp_path / "run_vit"))

    images = torch.randn(3, 1, 28, 28)
    torch.save(images, tmp_path / "images.pt")
    files = [tmp_path / name for name in ("vit.pt2", "images.pt", "logits.pt")]
    said = finish(start(tmp_path / "run_vit", eva_attn.build_info()["library"], *files))
    assert float(said.splitlines()[0].rpartition(" ")[2]) < 1e-12  # float64
    torch.testing.assert_close(torch.load(files[-1]), model(images))


@pytest.mark.skipif(not HAS_CUDA, reason="there is no GPU, or no kernel for it")
def test_a_package_for_cuda(tmp_path: Path) -> None:
    model = export(str(tmp_path / "vit.pt2"), "cuda")
    package = torch._inductor.aoti_load_package(str(tmp_path / "vit.pt2"))
    images = torch.randn(3, 1, 28, 28, device="cuda")
    torch.testing.assert_close(package(images), model(images))
