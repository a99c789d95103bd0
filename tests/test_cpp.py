"""The C++ example: built, and run without Python."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eva_attn
from examples.cpp.export_vit import export

SOURCE = Path(__file__).parents[1] / "examples/cpp"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
@pytest.mark.skipif(sys.platform != "linux", reason="built on Linux alone")
def test_a_package_runs_without_python(tmp_path: Path) -> None:
    def run(*command: object) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("cmake", "-S", SOURCE, "-B", tmp_path, f"-DTORCH={Path(torch.__file__).parent}")
    run("cmake", "--build", tmp_path)
    assert "libpython" not in run("ldd", tmp_path / "run_vit")

    model, images = export(str(tmp_path / "vit.pt2")), torch.randn(3, 1, 28, 28)
    torch.save(images, tmp_path / "images.pt")
    files = [tmp_path / name for name in ("vit.pt2", "images.pt", "logits.pt")]
    said = run(tmp_path / "run_vit", eva_attn.build_info()["library"], *files)
    assert float(said.splitlines()[0].rpartition(" ")[2]) < 1e-12  # float64
    torch.testing.assert_close(torch.load(files[-1]), model(images))
