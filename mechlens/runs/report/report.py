"""A run as one HTML file that opens anywhere, without a network."""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup

from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import Headline
from mechlens.runs.report.parts import TokenView, cells, estimate_text, heading, paragraphs, token_spans
from mechlens.runs.run import Run

# Beyond this a table in a page is no longer read; the whole of it is in the run folder.
MAX_ROWS = 400
TITLE_HEIGHT = 30
"""Pixels that a figure keeps for its title."""

# Without the first two, plotly 7 shows a button that uploads the figure, prompt texts and all.
_CONTROLS = {
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
    "toImageButtonOptions": {"format": "png", "scale": 3},
}

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
    headline: Headline | None = None
    """The one sentence; None leaves it to the first of the verdict."""
    numbers: Mapping[str, Estimate] = field(default_factory=dict)
    """What decides the verdict, each by the metric's name."""
    words: Mapping[str, str] = field(default_factory=dict)
    """What a metric is called where people read it; others by their names."""
    sections: tuple[Section, ...] = ()
    how: str = ""
    """How it was made: data, splits, choices."""
    model: str = ""
    """Name of the model; the config's `model` where it is left empty."""


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
    html: Markup
    """The plot; empty where there is not one number to draw."""
    caption: str
    table: _Table | None = field(default=None)


def render(report: Report, run: Run, figures: Mapping[str, FigureEntry], tables: Mapping[str, pd.DataFrame]) -> str:
    """The report's HTML: plotly inlined once, every text escaped, nothing fetched."""
    missing = [name for section in report.sections for name in section.figures if name not in figures]
    if missing:
        raise ValueError(f"the report shows figure {missing[0]!r}; the run has {sorted(figures)}")
    drawn = {name: _figure(name, entry, tables) for name, entry in figures.items()}
    return _template().render(
        report=report,
        run=run,
        model=report.model or str(run.config.get("model", "")),
        figures=drawn,
        plotly=_plotly_js() if any(section.figures for section in report.sections) else "",
        css=Markup(_resource("report.css")),
        table=_table,
    )


def _figure(name: str, entry: FigureEntry, tables: Mapping[str, pd.DataFrame]) -> _Figure:
    frame = tables.get(entry.table) if entry.table else None
    table = None if frame is None else _table(frame, f"tables/{entry.table}.parquet")
    title = html.unescape(entry.figure.layout.title.text or "")
    shown = any(_has_numbers(trace) for trace in entry.figure.data)
    return _Figure(title, _plot(name, entry.figure) if shown else Markup(), entry.caption, table)


def _has_numbers(trace: Any) -> bool:
    """Whether a trace would leave a mark."""
    values = trace.z if trace.type == "heatmap" else trace.y
    return values is None or bool(pd.DataFrame(values).notna().to_numpy().any())


def _plot(name: str, figure: Any) -> Markup:
    """The figure as HTML without its title, which stands above it as text: plotly breaks no lines on a phone."""
    import plotly.graph_objects
    import plotly.io

    untitled = plotly.graph_objects.Figure(figure)
    freed = TITLE_HEIGHT if figure.layout.title.text else 0
    height = (figure.layout.height or figure.layout.template.layout.height or 420) - freed
    top = figure.layout.margin.t or figure.layout.template.layout.margin.t or 56
    untitled.update_layout(title={"text": ""}, height=height, margin={"t": top - freed})
    # plotly escapes < and > inside its JSON, so text in a figure cannot end the script.
    drawn = plotly.io.to_html(
        untitled,
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=f"figure-{name}",
        config=_CONTROLS,
        default_height=f"{height}px",
    )
    return Markup(drawn)


def _table(frame: pd.DataFrame, file: str = "") -> _Table:
    shown = frame.head(MAX_ROWS)
    return _Table(
        columns=[str(column) for column in shown.columns],
        headings=[heading(str(column)) for column in shown.columns],
        rows=cells(shown),
        numeric=[pd.api.types.is_numeric_dtype(shown[column]) for column in shown.columns],
        total=len(frame),
        file=file,
    )


def _plotly_js() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def _resource(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "paragraphs": paragraphs,
        "token_spans": token_spans,
        "estimate_text": estimate_text,
    }
    return environment.from_string(_resource("report.html.jinja"))
