"""What the figures share: an empty figure of our look, groups, bands, rules, values that plotly shows as they are."""

import html
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mechlens.runs.report.colours import EDGE, GRID, INK, PALETTE, PAPER, QUIET, RULE, Look, faded, looks

FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
DASHES = ("solid", "dash", "dot")
HATCHES = ("", "/", "x")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star")
"""How groups of one colour differ."""
MOST_TICKS = 16
DASHED = {"color": RULE, "width": 1, "dash": "dash"}


def template() -> dict[str, Any]:
    """The layout that every figure takes as its own; plotly's global templates stay as they are."""
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": EDGE,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": EDGE,
        "tickfont": {"size": 12, "color": QUIET},
        "title": {"font": {"size": 13, "color": INK}, "standoff": 12},
        "automargin": True,
    }
    return {
        "layout": {
            "font": {"family": FONT, "size": 13, "color": INK},
            "title": {"font": {"size": 16}, "x": 0, "xref": "paper", "xanchor": "left", "y": 0.97, "yanchor": "top"},
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "colorway": list(PALETTE),
            "xaxis": axis,
            "yaxis": axis,
            "height": 420,
            "margin": {"l": 60, "r": 20, "t": 56, "b": 50},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
            "hoverlabel": {"bgcolor": PAPER, "bordercolor": EDGE, "align": "left", "font": {"size": 12, "color": INK}},
        }
    }  # fmt: skip


def empty(title: str, xlabel: str, ylabel: str, columns: dict[str, str | None]) -> go.Figure:
    """A figure with words and no data, which notes the columns that it will show."""
    figure = go.Figure(layout={"template": template()})
    shown = {role: name for role, name in columns.items() if name is not None}
    figure.update_layout(
        title={"text": html.escape(title)},
        xaxis_title=html.escape(xlabel),
        yaxis_title=html.escape(ylabel),
        meta={"columns": shown},
    )
    return figure


def groups(df: pd.DataFrame, group: str | None, shown: str) -> Iterator[tuple[str, Look, pd.DataFrame]]:
    """Each group that has any number in the column `shown`: its name, how it looks and its rows.

    Looks are shared out among all groups of the table, in order of appearance or of its categories: a colour means the
    same in figures of one table, whatever could be measured.
    """
    if group is None:
        yield "", Look(PALETTE[0], 0), df
        return
    ordered = isinstance(df[group].dtype, pd.CategoricalDtype)
    names = df[group].cat.categories if ordered else df[group].dropna().unique()
    look = looks(map(str, names))
    for name, part in df.groupby(group, sort=ordered, observed=True):
        if part[shown].notna().any():
            yield readable(name), look[str(name)], part


def show_legend(figure: go.Figure, shown: bool) -> None:
    """The legend above the data, where it costs height and no width; none where there is one group."""
    names = [trace.name or "" for trace in figure.data if trace.showlegend is not False]
    # A name takes its letters and a sample of its line; a report is about 130 letters wide.
    rows = -(-sum(len(name) + 7 for name in names) // 130)
    figure.update_layout(showlegend=shown, margin={"t": 62 + 22 * max(rows, 1) if shown else 56})


def without_open(part: pd.DataFrame, ylabel: str, low: str | None, high: str | None) -> pd.DataFrame:
    """Rows of AUROCs without the intervals that are all from 0 to 1: of too few prompts, they would fill the plot."""
    if low is None or high is None or "AUROC" not in ylabel:
        return part
    empty_of = part[low].le(0) & part[high].ge(1)
    return part.assign(**{side: part[side].mask(empty_of) for side in (low, high)})


def band(part: pd.DataFrame, x: str, low: str, high: str, name: str, colour: str) -> Any:
    """The area between two columns, in a faint tone of its line."""
    there_and_back = [*python_values(part[x]), *reversed(python_values(part[x]))]
    return go.Scatter(
        x=there_and_back,
        y=[*python_values(part[high]), *reversed(python_values(part[low]))],
        fill="toself",
        fillcolor=faded(colour, 0.16),
        line={"width": 0},
        mode="lines",
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )


def whiskers(part: pd.DataFrame, y: str, low: str, high: str) -> dict[str, Any]:
    """The interval of each point as a bar through it."""
    above, below = part[high] - part[y], part[y] - part[low]
    return {
        "visible": bool(above.notna().any()),  # plotly draws a missing interval as one of no width
        "array": python_values(above),
        "arrayminus": python_values(below),
        "thickness": 1.3,
        "width": 4,
        "color": INK,
    }


def draw_rule(figure: go.Figure, hline: float | None, label: str = "", *, outside: bool = False) -> None:
    """A dashed line across the figure, such as chance; `outside` writes its label beside the figure, clear of bars."""
    if hline is None:
        return
    figure.add_hline(y=hline, line=DASHED)
    if label:
        # Below the rule at the right end, where curves that rise above chance are not.
        figure.add_annotation(
            text=html.escape(label), x=1, xref="paper", xanchor="left" if outside else "right", y=hline,
            yanchor="middle" if outside else "top", showarrow=False, font={"size": 11, "color": QUIET},
        )  # fmt: skip
        if outside:
            figure.update_layout(margin={"r": 20 + 6 * len(label)})


def draw_diagonal(figure: go.Figure, low: float, high: float) -> None:
    """A dashed line where both axes have the same value, such as one variable or chance."""
    if low < high:
        figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=DASHED, layer="below")


def left_out(names: Iterable[str]) -> str:
    """What a caption says of the curves that a figure leaves out; "" for none."""
    gone = ", ".join(dict.fromkeys(names))
    return f" Not drawn, so that the rest can be told apart: {gone}; the table has all." if gone else ""


def limits_about(values: "pd.Series[Any]", center: float | None) -> tuple[float | None, float | None]:
    """Colour limits symmetric about `center`, so that its colour means what it says."""
    if center is None or values.dropna().empty:
        return None, None
    reach = float((values - center).abs().max()) or 1.0
    return center - reach, center + reach


def with_room(limits: tuple[float, float] | None) -> list[float] | None:
    """The range of an axis that shows all that is possible, and a line that runs along its edge."""
    if limits is None:
        return None
    room = 0.02 * (limits[1] - limits[0])
    return [limits[0] - room, limits[1] + room]


def whole_ticks(values: "pd.Series[Any]") -> dict[str, Any]:
    """Ticks at whole numbers, as few as can be read: of layers there are no halves."""
    if not pd.api.types.is_integer_dtype(values) or values.empty:
        return {}
    span = int(values.max() - values.min())
    steps = (step * 10**power for power in range(9) for step in (1, 2, 5))
    return {"dtick": next(step for step in steps if span < MOST_TICKS * step)}


def cell_ticks(values: "pd.Series[Any]") -> dict[str, Any]:
    """Ticks of a heatmap's cells: numbers that leave some out stand side by side, as names do."""
    if not pd.api.types.is_integer_dtype(values):
        return {"type": "category"}
    found = sorted(values.unique().tolist())
    if len(found) == 1 or found != list(range(found[0], found[-1] + 1)):
        return {"type": "category", "categoryorder": "array", "categoryarray": found}
    return whole_ticks(values)


def python_values(values: Any) -> list[Any]:
    """Python values: plotly packs arrays in base64, and text is shown as it is, not as HTML."""
    return [readable(value) if isinstance(value, str) else value for value in values.tolist()]


def readable(value: Any) -> str:
    """Data as text that plotly shows literally, in lines short enough to read."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    text = text if len(text) <= 300 else text[:299] + "…"
    return "<br>".join(html.escape(text[i : i + 80]) for i in range(0, len(text), 80)) or ""
