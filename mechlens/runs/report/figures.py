"""Tidy tables as plotly figures of one look.

Every figure notes in `layout.meta["columns"]` which columns it shows, so that one that shows words can be
kept on the machine.
"""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechlens.runs.report.colours import DIVERGING, GREY, PAPER, SEQUENTIAL, faded, looks
from mechlens.runs.report.figure_parts import (
    DASHED,
    DASHES,
    HATCHES,
    SYMBOLS,
    band,
    cell_ticks,
    draw_diagonal,
    draw_rule,
    empty,
    groups,
    limits_about,
    python_values,
    readable,
    show_legend,
    whiskers,
    whole_ticks,
    with_room,
    without_open,
)


def lines(
    df: pd.DataFrame,
    *,
    x: str,
    y: str,
    title: str,
    xlabel: str,
    ylabel: str,
    group: str | None = None,
    low: str | None = None,
    high: str | None = None,
    hline: float | None = None,
    hline_label: str = "",
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """One line per group, with a band from `low` to `high`, a lone point with a bar; NaN is left out.

    `limits` are the least and the largest that `y` can be.
    """
    figure = empty(title, xlabel, ylabel, {"x": x, "y": y, "group": group})
    said_whole = False
    for name, (colour, turn), rows in groups(df, group, y):
        part = without_open(rows.dropna(subset=[y]).sort_values(x, kind="stable"), ylabel, low, high)
        held = part.dropna(subset=[low, high]) if low is not None and high is not None else part[:0]
        banded, alone = len(held) > 0, len(part) == 1
        whole = banded and limits is not None and bool(part[low].le(limits[0]).all() and part[high].ge(limits[1]).all())
        # Of bands over all that is possible one says it; five on each other would be mud.
        if banded and not alone and not (whole and said_whole):
            figure.add_trace(band(held, x, str(low), str(high), name, colour))
        said_whole = said_whole or whole
        interval = " [%{customdata[0]:.3~g}, %{customdata[1]:.3~g}]" if banded else ""
        figure.add_scatter(
            x=python_values(part[x]),
            y=python_values(part[y]),
            name=name,
            legendgroup=name,
            mode="markers" if alone else "lines",
            error_y=whiskers(part, y, str(low), str(high)) if banded and alone else None,
            line={"color": colour, "width": 2, "dash": DASHES[turn % len(DASHES)]},
            customdata=part[[str(low), str(high)]].to_numpy().tolist() if banded else None,
            hovertemplate="%{y:.3~g}" + interval,
        )
    figure.update_xaxes(whole_ticks(df[x]))
    figure.update_yaxes(range=with_room(limits))
    figure.update_layout(hovermode="x unified")
    show_legend(figure, group is not None)
    draw_rule(figure, hline, hline_label)
    return figure


def mark_missing(figure: go.Figure, df: pd.DataFrame, *, x: str, group: str, at: float, step: float, why: str) -> None:
    """A cross for every row, where a curve of the group can't be drawn: in its colour, at a height of its own.

    The first group's crosses stand at `at`, the next ones' each a `step` above. `df[group]` is categorical and knows
    the groups of the whole figure; one that has crosses and no curve stands in the legend by its crosses.
    """
    drawn = {trace.name for trace in figure.data}
    known = looks(map(str, df[group].cat.categories))
    for row, (name, part) in enumerate(df.groupby(group, observed=True)):
        colour, shown = known[str(name)].colour, readable(name)
        figure.add_scatter(
            x=python_values(part[x]), y=[at + row * step] * len(part), name=shown, legendgroup=shown, mode="markers",
            showlegend=shown not in drawn, hovertemplate=html.escape(why), cliponaxis=False,
            marker={"symbol": "x-thin", "size": 7, "color": colour, "line": {"width": 1.5, "color": colour}},
        )  # fmt: skip
    if len(df):
        show_legend(figure, True)
        figure.update_xaxes(rangemode="nonnegative")  # room for the crosses would begin the levels at -1


def heatmap(
    df: pd.DataFrame,
    *,
    x: str,
    y: str,
    value: str,
    title: str,
    xlabel: str,
    ylabel: str,
    label: str = "",
    center: float | None = None,
    limits: tuple[float, float] | None = None,
    missing: str = "",
) -> go.Figure:
    """One cell per (x, y), in order of appearance; `center` makes the colours diverge from that value.

    Cells without a value are grey where `missing` says why, which is then read by pointing at them: left empty, they
    would look like the middle of a scale.
    """
    if df.duplicated([x, y]).any():
        raise ValueError(f"a heatmap needs one row per ({x}, {y}); give repeated labels a number first")
    grid = df.pivot(index=y, columns=x, values=value).reindex(index=df[y].unique(), columns=df[x].unique())
    figure = empty(title, xlabel, ylabel, {"x": x, "y": y, "value": value})
    low, high = limits or limits_about(df[value], center)
    where: dict[str, Any] = {"x": python_values(grid.columns), "y": python_values(grid.index)}
    where |= {"xgap": 1 if len(grid.columns) <= 60 else 0, "ygap": 1 if len(grid.index) <= 60 else 0}
    where["hoverongaps"] = False
    told = f"{html.escape(xlabel)} %{{x}}<br>{html.escape(ylabel)} %{{y}}<br><b>"
    figure.add_heatmap(
        **where,
        z=[[None if pd.isna(cell) else float(cell) for cell in row] for row in grid.to_numpy()],
        zmin=low,
        zmax=high,
        colorscale=list(SEQUENTIAL if center is None else DIVERGING),
        colorbar={
            "title": {"text": html.escape(label), "side": "right", "font": {"size": 13}},
            "thickness": 12,
            "outlinewidth": 0,
            "tickfont": {"size": 12},
        },
        hovertemplate=f"{told}%{{z:.3~g}}</b><extra></extra>",
    )
    if missing and grid.isna().to_numpy().any():
        figure.add_heatmap(
            **where, z=[[0.0 if pd.isna(cell) else None for cell in row] for row in grid.to_numpy()],
            colorscale=[(0.0, GREY), (1.0, GREY)], showscale=False,
            hovertemplate=f"{told}{html.escape(missing)}</b><extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(showgrid=False, ticks="", **cell_ticks(df[x]))
    figure.update_yaxes(showgrid=False, ticks="", **cell_ticks(df[y]))
    return figure


def scatter(
    df: pd.DataFrame,
    *,
    x: str,
    y: str,
    title: str,
    xlabel: str,
    ylabel: str,
    group: str | None = None,
    hover: Sequence[str] = (),
    hline: float | None = None,
    vline: float | None = None,
    diagonal: bool = False,
) -> go.Figure:
    """One point per row; the `hover` columns are read by pointing at it."""
    columns = {"x": x, "y": y, "group": group, **{f"hover{i}": name for i, name in enumerate(hover)}}
    figure = empty(title, xlabel, ylabel, columns)
    said = "".join(f"<br>{html.escape(name)}: %{{customdata[{i}]}}" for i, name in enumerate(hover))
    for i, (name, look, part) in enumerate(groups(df, group, y)):
        marker = {"color": look.colour, "symbol": SYMBOLS[i % len(SYMBOLS)]}
        figure.add_scatter(
            x=python_values(part[x]),
            y=python_values(part[y]),
            name=name,
            mode="markers",
            marker={**marker, "size": 7, "opacity": 0.7, "line": {"width": 0.5, "color": PAPER}},
            customdata=[[readable(cell) for cell in row] for row in part[list(hover)].itertuples(index=False)],
            hovertemplate=f"(%{{x:.3~g}}, %{{y:.3~g}}){said}<extra>{name}</extra>",
        )
    figure.update_layout(hovermode="closest")
    show_legend(figure, group is not None)
    draw_rule(figure, hline)
    if vline is not None:
        figure.add_vline(x=vline, line=DASHED)
    if diagonal and not df.empty:
        draw_diagonal(figure, float(max(df[x].min(), df[y].min())), float(min(df[x].max(), df[y].max())))
    return figure


def bars(
    df: pd.DataFrame,
    *,
    x: str,
    y: str,
    title: str,
    xlabel: str,
    ylabel: str,
    group: str | None = None,
    low: str | None = None,
    high: str | None = None,
    hline: float | None = None,
    hline_label: str = "",
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """One bar per row, beside each other by group, with its interval; a NaN has no bar.

    `limits` are the least and the largest that `y` can be.
    """
    figure = empty(title, xlabel, ylabel, {"x": x, "y": y, "group": group})
    for name, (colour, turn), part in groups(df, group, y):
        part = without_open(part, ylabel, low, high)
        interval = whiskers(part, y, low, high) if low is not None and high is not None else None
        figure.add_bar(
            x=[str(label) for label in python_values(part[x])],
            y=python_values(part[y]),
            name=name,
            marker={
                "color": colour,
                "line": {"width": 0},
                "pattern": {"shape": HATCHES[turn % len(HATCHES)]},
            },
            error_y=interval,
            hovertemplate=f"%{{x}}: %{{y:.3~g}}<extra>{name}</extra>",
        )
    # Two bars alone would be walls.
    figure.update_layout(barmode="group", bargap=max(0.35, 0.8 - 0.15 * df[x].nunique()), bargroupgap=0.08)
    show_legend(figure, group is not None)
    figure.update_yaxes(range=with_room(limits))
    figure.update_xaxes(showgrid=False, type="category")
    draw_rule(figure, hline, hline_label, outside=True)
    return figure


def histogram(
    df: pd.DataFrame,
    *,
    value: str,
    title: str,
    xlabel: str,
    group: str | None = None,
    bins: int = 30,
    vline: float | None = None,
) -> go.Figure:
    """How many rows lie where; the groups lie over each other in the same bins."""
    figure = empty(title, xlabel, "prompts", {"x": value, "group": group})
    edges = np.histogram_bin_edges(df[value].dropna(), bins=bins).tolist()
    for name, (colour, _), part in groups(df, group, value):
        counts = np.histogram(part[value].dropna(), bins=edges)[0].tolist()
        # Outlines rather than bars: four see-through bars over each other make mud.
        figure.add_scatter(
            x=[edges[0], *edges],
            y=[0, *counts, 0],
            name=name,
            mode="lines",
            line={"color": colour, "width": 2, "shape": "hv"},
            fill="tozeroy",
            fillcolor=faded(colour, 0.12),
            hovertemplate="from %{x:.3~g}: %{y}",
        )
    figure.update_layout(hovermode="x unified")
    figure.update_yaxes(rangemode="tozero")
    show_legend(figure, group is not None)
    if vline is not None:
        figure.add_vline(x=vline, line=DASHED)
    return figure
