"""Puts the plots of `benchmarks/results`, which lie outside this folder, into the site."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def on_files(files: Files, config: Any) -> None:
    for plot in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("../benchmarks/results/", "results/")
