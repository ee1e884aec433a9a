"""Markdown tables, and their places in a README: what error_rates_NAME.py made, in mechlens/studies/NAME."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd


def row(cells: Sequence[object]) -> str:
    """A line of a table; what is a bar inside a cell stays one there."""
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def head(columns: Sequence[str]) -> str:
    """Its first two lines, for words in the first column and numbers in the others."""
    return f"{row(columns)}\n|---|{'--:|' * (len(columns) - 1)}"


def of_frame(frame: pd.DataFrame) -> str:
    """A whole table, numbers with two places."""
    cells = ([f"{one:z.2f}" if isinstance(one, float) else str(one) for one in own] for own in frame.to_numpy())
    return "\n".join([head([str(name) for name in frame.columns]), *map(row, cells)])


def percent(share: float) -> str:
    """A share in percent, without a zero behind the point."""
    return f"{share:.1%}".replace(".0%", "%")


def show(script: str, tables: Mapping[str, str], readme: Path | None) -> None:
    """Prints tables by their labels, and puts them into a README where one is given."""
    for label, table in tables.items():
        print(f"\n{label}\n{table}")
        if readme is not None:
            write(script, label, table, readme)


def write(script: str, label: str, table: str, readme: Path | None = None) -> None:
    """Puts the table between the README's marks `<!-- made by scripts/NAME.py: LABEL -->` and `<!-- end -->`."""
    path = Path(script).resolve()
    if readme is None:
        readme = path.parents[1] / "mechlens/studies" / path.stem.removeprefix("error_rates_") / "README.md"
    start, end = f"<!-- made by scripts/{path.name}: {label} -->\n", "<!-- end -->"
    text = readme.read_text(encoding="utf-8")
    text, found = re.subn(rf"{start}((?!<!--).)*{end}", lambda _: f"{start}{table}\n{end}", text, flags=re.DOTALL)
    if found != 1:
        raise SystemExit(f"{readme} needs the line {start.strip()} once and {end} below it, where the table goes")
    readme.write_text(text, encoding="utf-8")
