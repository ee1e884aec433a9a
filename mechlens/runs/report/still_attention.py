"""Attention as a still picture: a small map a head, the sinks' columns marked."""

import html
from collections.abc import Collection, Sequence

from mechlens.runs.report.colours import INK, PAPER, QUIET

CELL, GAP, TOP = 7, 24, 34
MARK = "#d9822b"
LEAST = 0.02
"""A smaller share of the attention would not be seen."""


def still_attention(
    patterns: Sequence[Sequence[Sequence[float]]], names: Sequence[str], sinks: Collection[int], title: str
) -> str:
    """An SVG of the maps side by side: a row a query, a column a key, dark where a head attends."""
    n = len(patterns[0])
    side = n * CELL
    width, height = len(patterns) * (side + GAP) + GAP, TOP + side + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        _text(GAP, 14, title, INK),
    ]
    for k, (pattern, name) in enumerate(zip(patterns, names, strict=True)):
        left = GAP + k * (side + GAP)
        parts.append(_text(left, TOP - 6, name, QUIET))
        parts.append(f'<rect x="{left}" y="{TOP}" width="{side}" height="{side}" fill="none" stroke="#ccc"/>')
        parts += [
            f'<rect x="{left + key * CELL}" y="{TOP + query * CELL}" width="{CELL}" height="{CELL}" fill="#1f5fa8" '
            f'fill-opacity="{value:.2f}"/>'
            for query, row in enumerate(pattern)
            for key, value in enumerate(row)
            if value >= LEAST
        ]
        parts += [
            f'<rect x="{left + key * CELL}" y="{TOP + side + 2}" width="{CELL}" height="5" fill="{MARK}"/>'
            for key in sinks
        ]
        parts.append(_text(left, TOP + side + 20, "orange: sinks", QUIET))
    return "".join([*parts, "</svg>"])


def _text(x: int, y: int, words: str, colour: str) -> str:
    return f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="12" fill="{colour}">{html.escape(words)}</text>'
