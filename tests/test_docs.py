"""The code in README.md and docs/ runs as it stands, block after block, and the pictures are up to date."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def with_code(language: str) -> pytest.MarkDecorator:
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


@with_code("python")
def test_code_runs(page: Path) -> None:
    pytest.importorskip("torchvision")
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), scope)


@with_code("pycon")
def test_sessions_print_what_they_say(page: Path) -> None:
    session = doctest.DocTestParser().get_doctest(
        "\n".join(blocks(page, "pycon")), {}, page.stem, str(page), 0
    )
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(session)
    assert runner.summarize(verbose=False).failed == 0


def test_pictures_are_up_to_date(tmp_path: Path) -> None:
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "docs/draw.py", tmp_path], cwd=ROOT, check=True, env=path)
    drawn = sorted(tmp_path.iterdir())
    assert drawn
    for picture in drawn:
        assert picture.read_text() == ROOT.joinpath("docs", picture.name).read_text(), picture.name


def test_the_site_builds(tmp_path: Path) -> None:
    """Links, navigation and the reference; warnings are errors."""
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
