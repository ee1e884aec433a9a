"""A run as one HTML file that opens anywhere, without a network."""

import base64
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from mechlens.files import short_name
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import Headline, after_headline
from mechlens.runs.own_classes import own_classes
from mechlens.runs.report.cells import cells, numeric, rounded
from mechlens.runs.report.colours import ON_DARK
from mechlens.runs.report.parts import TokenView, estimate_text, heading, paragraphs, token_spans
from mechlens.runs.report.signs import sign
from mechlens.runs.run import Run

# Beyond this a table in a page is no longer read; the whole of it is in the run folder.
MAX_ROWS = 400
TITLE_HEIGHT = 30
"""Pixels that a figure keeps for its title."""
PLOTLY = "plotly-cartesian.min.js.gz"
"""The part of plotly.js that draws lines, bars, points and heatmaps (MIT licence); by scripts/plotly_bundle.py."""

STAYS_HERE = {"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False}
"""Without the first two, plotly 7 shows a button that uploads the figure, prompt texts and all."""
_CONTROLS = {
    **STAYS_HERE,
    "responsive": True,
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
    "toImageButtonOptions": {"format": "png", "scale": 3},
}

_TEMPLATES = Path(__file__).parent / "templates"

__all__ = ["FigureEntry", "Report", "Section", "TokenView", "render"]


@dataclass(frozen=True, eq=False)
class Section:
    """One step of the argument: words, the figures that carry it, a table, coloured texts.

    In the words an empty line starts a paragraph and `backticks` are code.
    """

    title: str
    text: str = ""
    figures: tuple[str, ...] = ()
    """Names of figures of the run."""
    table: pd.DataFrame | None = None
    views: tuple[TokenView, ...] = ()


@dataclass(frozen=True, eq=False)
class Report:
    """What a run asked, found, and how anybody can get it again."""

    title: str
    question: str
    verdict: str
    """The explanation, which follows the headline."""
    numbers: Mapping[str, Estimate] = field(default_factory=dict)
    """What decides the verdict, each by the metric's name."""
    words: Mapping[str, str] = field(default_factory=dict)
    """What a metric is called where people read it; others by their names."""
    headline: Headline | None = None
    """The one sentence; None leaves it to the first of the verdict."""
    main: tuple[str, ...] = ()
    """Figures that come first where there is room for one or two, such as a notebook; then in the sections' order."""
    sections: tuple[Section, ...] = ()
    how: str = ""
    """How it was made: data, splits, choices."""
    model: str = ""
    """Name of the model; the config's `model` where it is left empty."""
    rounds: bool = False
    """Whether its numbers are nats, shares and cosines, of which a ten-thousandth is rounding and prints as 0."""


class FigureEntry(NamedTuple):
    """A figure of a run with its words and the table it was drawn from."""

    figure: Any
    caption: str = ""
    table: str | None = None


@dataclass(frozen=True, eq=False)
class _Table:
    columns: list[str]
    """As the table's file calls them; `headings` are the words for them."""
    headings: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    total: int
    file: str = ""


@dataclass(frozen=True, eq=False)
class _Figure:
    title: str
    height: int
    """In pixels."""
    drawing: Markup
    """Data and layout as JSON; empty where there is not one number to draw."""
    caption: str
    table: _Table | None
    """What it was drawn from, where no figure before it shows the same table."""
    data: str
    """The table's name; empty where the run has none."""
    rows: int


def render(report: Report, run: Run, figures: Mapping[str, FigureEntry], tables: Mapping[str, pd.DataFrame]) -> str:
    """The report's HTML: plotly inlined once, every text escaped, nothing fetched."""
    shown = [name for section in report.sections for name in section.figures]
    missing = [name for name in shown if name not in figures]
    if missing:
        raise ValueError(f"the report shows figure {missing[0]!r}; the run has {sorted(figures)}")
    first = {figures[name].table: name for name in reversed(shown)}
    if report.rounds:
        tables = {name: rounded(table) for name, table in tables.items()}
        sections = [one if one.table is None else replace(one, table=rounded(one.table)) for one in report.sections]
        report = replace(report, sections=tuple(sections))
    drawn = {name: _figure(figures[name], tables, with_table=first[figures[name].table] == name) for name in shown}
    return template("report.html.jinja").render(
        report=report,
        run=run,
        model=report.model or short_name(run.model_name),
        classes=own_classes(run.config),
        figures=drawn,
        plotly=_packed_plotly() if any(figure.drawing for figure in drawn.values()) else "",
        css=Markup(resource("report.css")),
        script=Markup(resource("report.js")),
        drawing=_as_json({"config": _CONTROLS, "onDark": ON_DARK}),
        table=_table,
    )


def _figure(entry: FigureEntry, tables: Mapping[str, pd.DataFrame], *, with_table: bool) -> _Figure:
    """The figure without its title, which stands above it as text: plotly breaks no lines on a phone."""
    frame = tables.get(entry.table) if entry.table else None
    table = _table(frame, f"tables/{entry.table}.parquet") if with_table and frame is not None else None
    data, rows = ("", 0) if frame is None else (str(entry.table), len(frame))
    shown = json.loads(entry.figure.to_json())
    layout, common = shown["layout"], shown["layout"].get("template", {}).get("layout", {})
    freed = TITLE_HEIGHT if layout.get("title", {}).get("text") else 0
    height = (layout.get("height") or common.get("height") or 420) - freed
    margin = {**common.get("margin", {}), **layout.get("margin", {})}
    untitled = {**layout, "height": height, "margin": {**margin, "t": margin.get("t", 56) - freed}}
    title = html.unescape(untitled.pop("title", {}).get("text", ""))
    drawn = any(_has_numbers(trace) for trace in entry.figure.data)
    drawing = _as_json({"data": shown["data"], "layout": untitled}) if drawn else Markup()
    return _Figure(title, height, drawing, entry.caption, table, data, rows)


def _has_numbers(trace: Any) -> bool:
    """Whether a trace would leave a mark."""
    values = trace.z if trace.type == "heatmap" else trace.y
    return values is None or bool(pd.DataFrame(values).notna().to_numpy().any())


def _table(frame: pd.DataFrame, file: str = "") -> _Table:
    shown = frame.head(MAX_ROWS)
    return _Table(
        columns=[str(column) for column in shown.columns],
        headings=[heading(str(column)) for column in shown.columns],
        rows=cells(shown),
        numeric=[numeric(shown.iloc[:, i]) for i in range(shown.shape[1])],
        total=len(frame),
        file=file,
    )


def _as_json(value: object) -> Markup:
    """JSON inside a script element, which no text in it can end."""
    return htmlsafe_json_dumps(value, separators=(",", ":"))


def _packed_plotly() -> str:
    return base64.b64encode((_TEMPLATES / PLOTLY).read_bytes()).decode()


def resource(name: str) -> str:
    """A file that goes into pages as it is."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@cache
def template(name: str) -> jinja2.Template:
    """A page to be filled in; every text is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "paragraphs": paragraphs,
        "after_headline": after_headline,
        "token_spans": token_spans,
        "estimate_text": estimate_text,
        "sign": sign,
    }
    return environment.from_string(resource(name))
