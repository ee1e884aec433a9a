"""How results show themselves: a few lines where they are printed, and with a small table in a notebook."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

WIDTH = 120
"""Characters of a fact, or of a table's cell, before it is cut."""
WIDE = 1e4
"""Where a column's numbers differ by more than this, no fixed number of decimals shows them all."""
MOST = 8
"""Lines of one kind, or rows of a table, that are shown."""


def lines(title: str, facts: Mapping[str, object]) -> str:
    """The title, and below it a line for each fact; one that is an empty text is left out."""
    told = [(name, cut(str(value))) for name, value in facts.items()]
    return "\n".join([title, *(f"  {name}: {text}" for name, text in told if text)])


def cut(text: str, width: int = WIDTH) -> str:
    """The text on one line, its end left out where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def few(names: Sequence[object]) -> str:
    """The names, of many the first ones and the last: "0, 1, 2, 3 ... 30 (31)"."""
    if len(names) <= MOST:
        return ", ".join(map(str, names))
    return f"{', '.join(map(str, names[: MOST // 2]))} ... {names[-1]} ({len(names)})"


def first(facts: Mapping[str, object]) -> dict[str, object]:
    """The first facts of many, and how many more there are."""
    more = len(facts) - MOST
    return {**dict(list(facts.items())[:MOST]), **({"and": f"{more} more"} if more > 0 else {})}


def counts(values: Sequence[str]) -> str:
    """How often each value is there: "250 harmful, 250 harmless"."""
    return few([f"{values.count(name)} {name}" for name in dict.fromkeys(values)])


def decimals_of(values: Sequence[float]) -> int | None:
    """Digits behind the point with which the largest number of a column has four or so; None where its numbers differ
    so much that no fixed number of decimals shows them all, and three digits of each must do.
    """
    sizes = [abs(value) for value in values if value]
    if not sizes or max(sizes) / min(sizes) > WIDE or max(sizes) < 1e-4:
        return None
    if all(value.is_integer() for value in values):  # counts and steps, read as floats where some are missing
        return 0
    digits = math.floor(math.log10(max(sizes)))
    return 2 - digits if digits < -1 else max(0, 3 - max(0, digits))


def number_text(value: float, decimals: int | None) -> str:
    """A number of a column: a dash for NaN, a real minus sign."""
    if math.isnan(value):
        return "–"
    text = f"{value:.3g}" if decimals is None else f"{value:z.{decimals}f}"
    return text.replace("-", "−")


def _cells(column: "pandas.Series[Any]") -> "pandas.Series[Any]":
    decimals = decimals_of([value for value in column if isinstance(value, float) and math.isfinite(value)])

    def text(cell: Any) -> Any:
        if isinstance(cell, float):
            return number_text(cell, decimals)
        return cut(cell) if isinstance(cell, str) else cell

    return column.astype(object).map(text)


def html_with(told: str, table: "pandas.DataFrame") -> str:
    """What is printed, and the first rows of a table below it, for a notebook; every text is cut and escaped."""
    rows = table.head(MOST).apply(_cells)
    more = f"<p>{len(rows)} of {len(table)} rows</p>" if len(table) > len(rows) else ""
    shown = rows.to_html(escape=True, index=False, na_rep="–")
    return f"<pre style='white-space: pre-wrap'>{html.escape(told)}</pre>{shown}{more}"
