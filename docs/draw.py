"""Draws the pictures of the documentation, from what `eva_attn.reference` says of windows and chunks.

python docs/draw.py [FOLDER]    (default: the folder of this file)
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from eva_attn import reference

QUERY, KEY, LANDMARK, NOTHING, LINE = "#d1495b", "#7aa6c2", "#edae49", "#f4f4f2", "#30343f"
SIDE = 18  # of a token's square


def rectangle(x: float, y: float, width: float, height: float, fill: str, extra: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" {extra}/>'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{LINE}">{words}</text>'


def picture(width: float, height: float, shapes: Iterable[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            'font-family="sans-serif" font-size="13">',
            rectangle(0, 0, width, height, "white"),
            *shapes,
            "</svg>\n",
        ]
    )


def cells(shown: Tensor, colours: list[str], x: float, y: float) -> list[str]:
    """A square for each entry of `shown` [rows, columns], in the colour that it numbers."""
    return [
        rectangle(x + column * SIDE, y + row * SIDE, SIDE - 1, SIDE - 1, colours[index])
        for row, line in enumerate(shown.tolist())
        for column, index in enumerate(line)
    ]


def window() -> str:
    """A query on a grid, the keys of its window, and the landmarks of all chunks."""
    height, width, size, chunk = 12, 18, 6, 3
    row, column = 7, 8
    visible = reference._windows((height, width), (size, size), (0, 0), torch.device("cpu"))
    shown = visible[row * width + column].reshape(height, width).long()
    shown[row, column] = 2
    shapes = cells(shown, [NOTHING, KEY, QUERY], 10, 10)
    for top in range(0, height, chunk):
        for left in range(0, width, chunk):
            x, y = 10 + (left + chunk / 2) * SIDE, 10 + (top + chunk / 2) * SIDE
            shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="6" fill="{LANDMARK}" stroke="{LINE}"/>')
            corner = (9.5 + left * SIDE, 9.5 + top * SIDE)
            shapes.append(rectangle(*corner, chunk * SIDE, chunk * SIDE, "none", f'stroke="{LINE}"'))
    x = 30 + width * SIDE
    legend = [
        (QUERY, "the query"),
        (KEY, "keys of its window (6 x 6)"),
        (LANDMARK, "landmarks (chunks of 3 x 3)"),
    ]
    for i, (colour, words) in enumerate(legend):
        shapes += [rectangle(x, 20 + 26 * i, 14, 14, colour), text(x + 22, 32 + 26 * i, words)]
    return picture(x + 215, 20 + height * SIDE, shapes)


def columns(is_causal: bool) -> str:
    """Which columns of the joint softmax each query sees: the keys, then the landmarks."""
    tokens, size, chunk = 16, 4, 2
    visible = reference._windows((1, tokens), (1, size), (0, 0), torch.device("cpu"))
    chunks = tokens // chunk
    position = torch.arange(tokens)[:, None]
    landmarks = torch.ones(tokens, chunks, dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
        landmarks = torch.arange(chunks) < position // chunk
    x = 70.0
    shapes = cells(visible.long(), [NOTHING, KEY], x, 30)
    shapes += cells(landmarks.long(), [NOTHING, LANDMARK], x + (tokens + 1) * SIDE, 30)
    shapes += [
        text(x, 20, "keys"),
        text(x + (tokens + 1) * SIDE, 20, "landmarks"),
        text(x - 10, 44, "queries", "end"),
    ]
    return picture(x + (tokens + 1 + chunks) * SIDE + 10, 40 + tokens * SIDE, shapes)


def passes() -> str:
    """What each pass reads and writes."""
    boxes = {
        "chunk summary": (20, 60, "means, projections, weighted sums"),
        "window attention": (390, 60, "one softmax over keys and landmarks"),
        "gradients of landmarks": (390, 190, "and the sums that softmax needs"),
        "through the summaries": (20, 190, "to what each token gets"),
        "gradients of tokens": (760, 190, "window and chunk terms, written once"),
    }
    arrows = [
        ((290, 85), (390, 85), "landmarks"),
        ((525, 110), (525, 190), "output, log-sum-exp"),
        ((390, 215), (290, 215), ""),
        ((155, 240), (895, 240), ""),
        ((660, 215), (760, 215), ""),
    ]
    head = (
        '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker>'
    )
    shapes = [f"<defs>{head}</defs>", text(20, 40, "forward"), text(20, 170, "backward")]
    for name, (x, y, note) in boxes.items():
        shapes += [
            rectangle(x, y, 270, 50, NOTHING, f'stroke="{LINE}" rx="6"'),
            text(x + 135, y + 21, name, "middle"),
            text(x + 135, y + 39, note, "middle"),
        ]
    for (x1, y1), (x2, y2), words in arrows:
        way = f"v24 H{x2} v-24" if y1 == y2 == 240 else f"L{x2},{y2}"
        shapes.append(f'<path d="M{x1},{y1} {way}" fill="none" stroke="{LINE}" marker-end="url(#head)"/>')
        if x1 == x2:
            shapes.append(text(x1 + 8, (y1 + y2) / 2, words))
        elif words:
            shapes.append(text((x1 + x2) / 2, y1 - 6, words, "middle"))
    return picture(1050, 285, shapes)


PICTURES = {
    "window.svg": window,
    "columns.svg": lambda: columns(is_causal=False),
    "columns_causal.svg": lambda: columns(is_causal=True),
    "passes.svg": passes,
}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        folder.joinpath(name).write_text(draw())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
