"""The cells of a report's tables: words for code names, yes and no, and one way of writing numbers in a column."""

import math
import re
from typing import Any

import pandas as pd

from mechlens.methods.shown import decimals_of, number_text
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.privacy import names_text

NAMES = {
    "tfidf": "words (TF-IDF)", "mean_embedding": "mean token embedding", "token_identity": "token at the position",
}  # fmt: skip
"""What names of code are called where taking the underscores out doesn't say it."""
_CODE = re.compile(r"[a-z]+\d*(_[a-z\d]+)+|tfidf")
_BASELINE = re.compile(r"(tfidf|mean_embedding|token_identity|length)_auroc(?:\.(.+))?")
KEPT = frozenset(["id", "file", "path", "folder", "model", "parameter", "matrix", "module", "source"])
"""Columns whose names are looked for as they are."""
DIGITS = 4
"""Of nats, shares and cosines: what is below a ten-thousandth is rounding."""


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of nats, shares or cosines in which rounding is 0, for its cells and figures; a record keeps it whole."""
    found = frame.copy()
    for name in found.select_dtypes("float"):
        found[name] = found[name].round(DIGITS) + 0.0  # no "-0"
    return found


def in_brief(table: pd.DataFrame, columns: tuple[str, ...], *, aurocs: tuple[str, ...] = ()) -> pd.DataFrame:
    """Numbers with their intervals as text; those that can't be measured are empty, as are columns without any.

    Of the columns in `aurocs` an interval of all from 0 to 1 is of too few prompts.
    """
    found = table.copy()
    for column in (one for one in columns if one in table):
        low, high = (f"{column}_{end}" if f"{column}_{end}" in table else end for end in ("low", "high"))
        found[column] = [
            "" if value != value else Estimate(value, below, above, 0, column in aurocs).brief
            for value, below, above in zip(table[column], table[low], table[high], strict=True)
        ]
    ends = [name for column in columns for name in (f"{column}_low", f"{column}_high", "low", "high", "n")]
    found = found.drop(columns=[name for name in dict.fromkeys(ends) if name in found])
    return found.drop(columns=[name for name in columns if name in found and not found[name].astype(bool).any()])


def cells(frame: pd.DataFrame) -> list[list[str]]:
    """The table's cells as text, each column in one format: a dash for what is missing, words for an AUROC of too few
    prompts, whose bounds are 0 and 1.
    """
    names = [str(name) for name in frame.columns]
    columns = [_column(name, frame.iloc[:, i]) for i, name in enumerate(names)]
    if {"low", "high"} <= set(names) and (areas := _aurocs(frame)).any():
        without = (areas & frame["low"].eq(0) & frame["high"].eq(1)).tolist()
        for side in (names.index("low"), names.index("high")):
            columns[side] = ["too few prompts" if no else text for no, text in zip(without, columns[side], strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _aurocs(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows are about an AUROC: all where a column is one, else those whose measure or number is called so."""
    said = pd.Series("auroc" in frame.columns, index=frame.index)
    for name in {"measure", "number"} & set(frame.columns):
        said |= frame[name].astype(str).str.startswith("auroc")
    return said


def numeric(column: "pd.Series[Any]") -> bool:
    """Whether its cells stand to the right, digit below digit; yes and no do not."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def in_words(name: str) -> str:
    """A name that code uses, as people write it; any other text as it is."""
    if found := _BASELINE.fullmatch(name):
        kind, position = found.groups()
        if position:
            return f"token at {position}" if kind == "token_identity" else f"{in_words(kind)}, {position}"
        return in_words(kind)
    return NAMES.get(name, name.replace("_", " ")) if _CODE.fullmatch(name) else name


def _column(name: str, column: "pd.Series[Any]") -> list[str]:
    decimals = decimals_of([value for value in column if isinstance(value, float) and math.isfinite(value)])
    plain = names_text(name) or name.rpartition("_")[2] in KEPT
    return [_cell(value, decimals, plain=plain) for value in column]


def _cell(value: Any, decimals: int | None, *, plain: bool) -> str:
    if value is None or value is pd.NaT or value is pd.NA:
        return "–"
    if isinstance(value, float):
        return number_text(value, decimals)
    if pd.api.types.is_bool(value):
        return "yes" if value else "no"
    text = str(value)
    return text if plain or not isinstance(value, str) else in_words(text)
