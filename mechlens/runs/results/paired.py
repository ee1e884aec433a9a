"""Differences of two runs on the same prompts, pair by pair, where both kept what a number was made of."""

from typing import TYPE_CHECKING

from mechlens.errors import UserError
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.results.result import RunResult

if TYPE_CHECKING:
    import pandas
    import torch

BY_PROMPT = "by_prompt"
"""Table of what each number was made of, prompt by prompt."""
SAME = 1e-6
"""By how much a number made again of its rows may differ from the one on record."""


def rows_by_number(run: RunResult) -> "dict[str, pandas.DataFrame]":
    """What a run's numbers were made of: by number a row a prompt, with its words; only numbers that come out again."""
    try:
        table, prompts = run.tables[BY_PROMPT], run.tables["prompts"].drop_duplicates("id").set_index("id")
    except UserError:
        return {}  # runs of earlier versions, and of studies that don't keep it, have none
    words = prompts["text"] + "\0" + prompts["system"].fillna("").astype(str) + "\0" + prompts["history"]
    found = {}
    for number, rows in table.groupby("number", sort=False):
        own = rows.set_index("id").sort_index()
        own = own.assign(words=words.reindex(own.index))
        kept = run.record.metrics.get(str(number))
        if own.index.is_unique and kept is not None and abs(_number(own) - kept.value) <= SAME:
            found[str(number)] = own
    return found


def paired_difference(first: "pandas.DataFrame | None", other: "pandas.DataFrame | None") -> Estimate | None:
    """The other's number minus the first's with a paired interval; None unless both are of the same prompts."""
    if first is None or other is None or not first.index.equals(other.index):
        return None
    if first["words"].isna().any() or not first[["words", "positive"]].equals(other[["words", "positive"]]):
        return None
    from mechlens.methods.probing.auroc import auroc_difference
    from mechlens.methods.statistics.by_prompt import mean_difference

    families, positive = first["family"].tolist(), _positive(first)
    found = (
        mean_difference(_values(other), _values(first), families) if positive is None
        else auroc_difference(_values(other), _values(first), positive, families)
    )  # fmt: skip
    return found if found.measurable else None


def _number(rows: "pandas.DataFrame") -> float:
    from mechlens.methods.probing.auroc import auroc

    positive = _positive(rows)
    return float(_values(rows).mean() if positive is None else auroc(_values(rows), positive))


def _values(rows: "pandas.DataFrame") -> "torch.Tensor":
    import torch

    return torch.tensor(rows["value"].to_numpy(), dtype=torch.float64)


def _positive(rows: "pandas.DataFrame") -> "torch.Tensor | None":
    import torch

    return None if rows["positive"].isna().all() else torch.tensor(rows["positive"].to_numpy() == 1)
