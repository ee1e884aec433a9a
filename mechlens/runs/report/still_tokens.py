"""The tokens of a text as a small SVG, for places that run no JavaScript: coloured, and with words below them."""

import html
from collections.abc import Sequence

from mechlens.runs.report.colours import GRID, INK, QUIET
from mechlens.runs.report.figure_parts import FONT

WIDTH, MARGIN = 720, 8.0
PLAIN, WITH_WORDS = 26.0, 44.0
"""Height of a line."""
LETTER, SMALL = 7.9, 6.0
"""Pixels of a letter, about: of a token in a typewriter face, and of the words below it."""
TYPEWRITER = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def still_tokens(tokens: Sequence[str], colours: Sequence[str], below: Sequence[str] = ()) -> str:
    """One box for each token, in lines; a line break in the text begins a new line."""
    words = [*below, *[""] * (len(tokens) - len(below))]
    x, y, step = MARGIN, MARGIN, PLAIN
    boxes, said = [], []
    for token, colour, word in zip(tokens, colours, words, strict=True):
        shown = _visible(token)
        width = max(LETTER * _columns(shown), SMALL * len(word)) + 6
        if x + width > WIDTH - MARGIN and x > MARGIN:
            x, y, step = MARGIN, y + step, PLAIN
        boxes.append(
            f'<rect x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="23" rx="2" fill="{colour}" stroke="{GRID}"/>'
            f'<text x="{x + width / 2:.1f}" y="{y + 16:.0f}" xml:space="preserve">{html.escape(shown)}</text>'
        )
        if word:
            said.append(f'<text x="{x + width / 2:.1f}" y="{y + 36:.0f}">{html.escape(word)}</text>')
        x, step = x + width + 1, max(step, WITH_WORDS if word else PLAIN)
        if "\n" in token:
            x, y, step = MARGIN, y + step, PLAIN
    height = f"{y + (step if x > MARGIN else 0) + MARGIN:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'text-anchor="middle"><rect width="{WIDTH}" height="{height}" fill="white"/>'
        f'<g font-family="{html.escape(TYPEWRITER)}" font-size="13" fill="{INK}">{"".join(boxes)}</g>'
        f'<g font-family="{html.escape(FONT)}" font-size="10" fill="{QUIET}">{"".join(said)}</g></svg>'
    )


def shade(value: float, reach: float, low: tuple[int, int, int], high: tuple[int, int, int]) -> str:
    """White at 0, `high` at `reach`, `low` at -`reach`, as CSS writes colours."""
    share = min(abs(value) / reach, 1.0) if reach else 0.0
    mixed = [round(255 + (part - 255) * share) for part in (high if value > 0 else low)]
    return f"rgb({', '.join(map(str, mixed))})"


def _visible(token: str) -> str:
    """Spaces and line breaks as signs; what XML can't hold as a box."""
    marked = token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·" if not token.strip() else " ")
    return "".join(sign if sign.isprintable() else "□" for sign in marked)


def _columns(shown: str) -> int:
    """Columns of a typewriter: letters of East Asian scripts and pictures take two."""
    return sum(1 if ord(sign) < 0x1100 else 2 for sign in shown)
