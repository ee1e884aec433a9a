"""Draws the README's picture from a run of `mechlens separate`: where harmfulness and refusal can be read, by level.

Usage: scripts/picture.py RUN OUT.svg
"""

import sys
from html import escape
from pathlib import Path

import pandas as pd

from mechlens.runs.report.colours import GRID, INK, QUIET, THINGS
from mechlens.runs.run import read_run

WIDTH, HEIGHT = 820, 366
TOP, BOTTOM, PANEL = 58, 276, 340
LOWEST, HIGHEST = 0.4, 1.0
COLOURS = (THINGS["inst"], THINGS["last"])
PANELS = (("harmful", "Is the request harmful?", 60), ("refused", "Will the model refuse it?", 460))


def main(run: Path, out: Path) -> None:
    """Reads the run's tables and writes the picture."""
    curves = pd.read_parquet(run / "tables" / "auroc_by_level.parquet")
    words = pd.read_parquet(run / "tables" / "baselines.parquet")
    words = words[words["baseline"] == "tfidf_auroc"].set_index("contrast")["auroc"]
    last = str(curves["position"].drop_duplicates().iloc[-1])  # positions are in the order of the tokens
    named = {"inst": "last token of the request (inst)", last: f"last token of the template ({last})"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" fill="{INK}" '
        'font-family="Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for contrast, title, left in PANELS:
        cells = curves[curves["contrast"] == contrast]
        parts += _frame(title, left, int(cells["level"].max()), float(words[contrast]))
        for position, colour in zip(named, COLOURS, strict=True):
            parts += _curve(cells[cells["position"] == position].sort_values("level"), left, colour)
    for i, (text, colour) in enumerate(zip(named.values(), COLOURS, strict=True)):
        x = 60 + 400 * i
        parts.append(f'<path d="M{x} 325h24" stroke="{colour}" stroke-width="2.5"/>{_text(x + 30, 329, text)}')
    record = read_run(run)
    model = str(record.resolved["model"])
    n = int(curves.loc[curves["contrast"] == "harmful", "n"].max())
    note = f"{model}; {n} test prompts in matched pairs on the left; bands: 95% bootstrap over families"
    parts.append(_text(60, 352, note, QUIET))
    out.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _frame(title: str, left: int, levels: int, words: float) -> list[str]:
    """Grid, axes and the level that the words alone reach."""
    parts = [f'<g font-weight="600" font-size="15">{_text(left, TOP - 24, title)}</g>']
    for tick in (0.4, 0.6, 0.8, 1.0):
        parts.append(f'<path d="M{left} {_y(tick)}h{PANEL}" stroke="{GRID}"/>')
        parts.append(_text(left - 8, _y(tick) + 4, f"{tick:.1f}", QUIET, "end"))
    for level in range(0, levels + 1, 10 if levels >= 20 else 2):
        parts.append(_text(left + PANEL * level / levels, BOTTOM + 18, str(level), QUIET, "middle"))
    parts.append(_text(left + PANEL / 2, BOTTOM + 34, "residual level (0 = embedding)", QUIET, "middle"))
    parts.append(_text(left, TOP - 8, "AUROC on held-out prompts", QUIET))
    for value, word in ((0.5, "chance"), (words, "words alone (TF-IDF)")):
        parts.append(f'<path d="M{left} {_y(value)}h{PANEL}" stroke="{QUIET}" stroke-dasharray="4 4"/>')
        parts.append(_text(left + PANEL, _y(value) + 14, word, QUIET, "end"))
    return parts


def _curve(cells: pd.DataFrame, left: int, colour: str) -> list[str]:
    """One position's AUROC by level, with its interval."""
    x = left + PANEL * cells["level"] / cells["level"].max()
    there, back = (_points(x, cells[name]) for name in ("high", "low"))
    band = " ".join([*there, *reversed(back)])
    line = " ".join(_points(x, cells["auroc"]))
    return [
        f'<polygon points="{band}" fill="{colour}" fill-opacity="0.15"/>',
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>',
    ]


def _points(x: "pd.Series[float]", values: "pd.Series[float]") -> list[str]:
    return [f"{across:.1f},{_y(value)}" for across, value in zip(x, values, strict=True)]


def _y(value: float) -> float:
    share = (min(max(value, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST)
    return round(BOTTOM - (BOTTOM - TOP) * share, 1)


def _text(x: float, y: float, text: str, colour: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
