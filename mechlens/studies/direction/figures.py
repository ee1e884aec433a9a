"""The figures of a concept's direction."""

import pandas as pd

from mechlens.methods.probing.ahead import SURFACE, TOKEN
from mechlens.runs.report import figures
from mechlens.runs.report.figure_parts import left_out
from mechlens.runs.writer import RunWriter
from mechlens.studies.direction.concept import Concept

MOST_CURVES = 5


def draw(writer: RunWriter, result: Concept) -> None:
    """Draws every figure."""
    table = result.table()
    main = _main_positions(table)
    gone = left_out(name for name in table["position"] if name not in set(main["position"]))
    last = table["position"].iloc[-1]
    main = main.assign(position=main["position"].replace({last: f"last, {last}"} if last.startswith("post") else {}))
    curves = figures.lines(
        main, x="level", y="auroc", low="low", high="high", group="position", hline=0.5, hline_label="chance",
        title="Held-out AUROC by level", xlabel="level (0 = embedding)", ylabel="AUROC on test", limits=(0.0, 1.0),
    )  # fmt: skip
    banded = bool(((main["low"] > 0) | (main["high"] < 1)).any())
    caption = (
        "Where a curve rises the model has worked the concept out; one that is high from level 0 on is in the token "
        f"itself. {'Bands: 95% intervals over families.' if banded else 'There are too few prompts for intervals.'}"
    ) + gone
    writer.figure("auroc_by_level", curves, table="auroc_by_level", caption=caption)
    grid = figures.heatmap(
        table, x="position", y="level", value="auroc", center=0.5, limits=(0.0, 1.0), label="AUROC",
        title="AUROC at every position and level", xlabel="position", ylabel="level (0 = embedding)",
    )  # fmt: skip
    seen = "Plain as the page: chance. Full red: certain. Blue: the wrong way round. Look for where a column turns red."
    writer.figure("auroc_grid", grid, table="auroc_by_level", caption=seen)
    _against_baselines(writer, result)
    reliability = figures.lines(
        main, x="level", y="reliability", group="position", limits=(-1.0, 1.0),
        title="Split-half reliability of the direction", xlabel="level (0 = embedding)",
        ylabel="reliability (0 noise, 1 noise-free)",
    )  # fmt: skip
    halves = "Near 0 the direction is noise, near 1 half the prompts give the same one."
    writer.figure("reliability", reliability, table="auroc_by_level", caption=halves + gone)


def _main_positions(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `inst`, of the last position, and of those that are read best; the rest is in the heatmap."""
    found = list(dict.fromkeys(table["position"]))
    best = table.groupby("position")["auroc"].max().sort_values(ascending=False).index
    first = [name for name in ("inst", found[-1]) if name in found]
    kept = list(dict.fromkeys([*first, *best]))[:MOST_CURVES]
    return table[table["position"].isin(kept)]


def _against_baselines(writer: RunWriter, result: Concept) -> None:
    kept = set(_main_positions(result.table())["position"])
    found = [one for one in result.detection.ahead if one.position in kept] or list(result.detection.ahead[:1])
    read = {f"direction at {one.position}": one.auroc for one in found}
    read |= {
        f"the token at {one.position}" if name == TOKEN else SURFACE[name]: auroc
        for one in found
        for name, auroc in one.surface.items()
    }
    both = pd.DataFrame([{"what": what} | auroc.row("auroc") for what, auroc in read.items()])
    writer.table("against_baselines", both)
    bars = figures.bars(
        both, x="what", y="auroc", low="low", high="high", hline=0.5, hline_label="chance", limits=(0.0, 1.0),
        title="The direction against the surface, every prompt out of fold", xlabel="", ylabel="AUROC",
    )  # fmt: skip
    caption = (
        "A direction that is no higher than the words, the token or the length says no more than they do: these are "
        "the numbers that the verdict stands on. Bars: 95% intervals over families."
    )
    writer.figure("against_baselines", bars, table="against_baselines", caption=caption)
