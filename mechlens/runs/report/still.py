"""A figure as a small SVG, for places that run no JavaScript: code hosts, mail, a notebook that isn't trusted.

Drawn are the kinds of traces that `mechlens.runs.report.figures` makes: lines, points, areas, bars and heatmaps, with
their intervals, axes, dashed rules and legend. Hovering and notes stay in the figure, and one of another kind is only
named.
"""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import plotly.io

from mechlens.runs.privacy import unpacked
from mechlens.runs.report.colours import EDGE, GRID, INK, PALETTE, QUIET, RULE, SEQUENTIAL
from mechlens.runs.report.figure_parts import FONT
from mechlens.runs.report.still_axis import LETTER, Axis, axis_of

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, BOTTOM = 64.0, 16.0, 48.0
COLOUR_BAR = 70
SAMPLE = 20
"""Pixels of a line in the legend."""
SLANT, ASLANT = 30, 0.5
"""Degrees of names that lie too close to be level, and the sine of it."""
SHADES = 24
"""Of a heatmap: cells of one shade are one path, which keeps the drawing small."""
DRAWN = {"scatter", "bar", "heatmap"}
DASHES = {"dash": "6 4", "dot": "2 3"}


def still(figure: Any) -> str:
    """The figure's SVG; every text in it escaped, nothing fetched."""
    shown = unpacked(json.loads(plotly.io.to_json(figure)))
    traces, layout = shown["data"], shown["layout"]
    title = _title(layout)
    legend, top = _legend(traces, 34.0 if title else 12.0)
    drawn = [text(WIDTH / 2, 20.0, title, size=15, colour=INK, bold=True)] if title else []
    try:
        drawn += [*legend, *_panels(traces, layout, top)]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):  # another package may draw anything
        drawn.append(text(WIDTH / 2, HEIGHT / 2, "a figure of a kind that is only shown by plotly"))
    body = "".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="{html.escape(FONT)}"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{body}</svg>'
    )


def text(
    x: float, y: float, words: str, *, anchor: str = "middle", size: int = 11, colour: str = QUIET, bold: bool = False,
    turned: bool = False,
) -> str:  # fmt: skip
    """A line of text; what plotly writes as HTML becomes plain words again."""
    plain = html.escape(html.unescape(str(words).replace("<br>", " ")))
    weight = ' font-weight="600"' if bold else ""
    turn = f' transform="rotate(-90 {x:.0f} {y:.0f})"' if turned else ""
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{weight}{turn}>'
        f"{plain}</text>"
    )


def _title(layout: Mapping[str, Any]) -> str:
    words = str((layout.get("title") or {}).get("text") or "")
    return words if len(words) < 90 else words[:89] + "…"


def _legend(traces: Sequence[Mapping[str, Any]], top: float) -> tuple[list[str], float]:
    """The names of the groups in rows, and where the panels begin below them."""
    named = [trace for trace in traces if trace.get("name") and trace.get("showlegend") is not False]
    if len(named) < 2:
        return [], top + 6
    drawn, x, y = [], LEFT, top + 8
    for trace in named:
        width = SAMPLE + 14 + LETTER * len(str(trace["name"]))
        if x + width > WIDTH - RIGHT and x > LEFT:
            x, y = LEFT, y + 16
        drawn.append(_sample(trace, x, y))
        drawn.append(text(x + SAMPLE + 4, y + 1, trace["name"], anchor="start", colour=INK))
        x += width
    return drawn, y + 12


def _sample(trace: Mapping[str, Any], x: float, y: float) -> str:
    """A piece of what the legend names: of a line with its dashes, else a square."""
    if trace["type"] != "scatter" or "lines" not in trace.get("mode", "lines"):
        return f'<rect x="{x + SAMPLE - 12:.0f}" y="{y - 8:.0f}" width="10" height="10" fill="{_colour(trace)}"/>'
    return f'<path d="M{x:.0f} {y - 3:.0f}h{SAMPLE}" stroke="{_colour(trace)}" stroke-width="2"{_dash(trace)}/>'


def _dash(trace: Mapping[str, Any]) -> str:
    style = (trace.get("line") or {}).get("dash")
    return f' stroke-dasharray="{DASHES[style]}"' if style in DASHES else ""


def _panels(traces: Sequence[dict[str, Any]], layout: Mapping[str, Any], top: float) -> list[str]:
    """Everything between the axes; ValueError for a kind of trace that isn't drawn here."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for trace in traces:
        if trace["type"] not in DRAWN or trace.get("orientation") == "h":
            raise ValueError(trace["type"])
        panels.setdefault((trace.get("xaxis", "x"), trace.get("yaxis", "y")), []).append(trace)
    return [line for (x, y), own in panels.items() for line in _panel(x, y, own, layout, top)]


def _panel(x: str, y: str, traces: Sequence[dict[str, Any]], layout: Mapping[str, Any], top: float) -> list[str]:
    """One pair of axes and what is drawn between them."""
    mapped = any(trace["type"] == "heatmap" for trace in traces)
    right = WIDTH - RIGHT - (COLOUR_BAR if mapped else 0)
    names = f"xaxis{x[1:]}", f"yaxis{y[1:]}"
    across = axis_of(layout.get(names[0]) or {}, traces, "x", (LEFT, right))
    rules = [shape["y0"] for shape in layout.get("shapes") or () if _lies_flat(shape, y)]
    bottom = HEIGHT - BOTTOM - _hanging(across)
    up = axis_of(layout.get(names[1]) or {}, traces, "y", (bottom, top), rules)
    drawn = [*_frame(across, up), *_rules(layout, across, up, y)]
    bars = [trace for trace in traces if trace["type"] == "bar"]
    for trace in traces:
        if trace["type"] == "heatmap":
            drawn += _heatmap(trace, across, up)
        elif trace["type"] == "bar":
            drawn += _bars(trace, across, up, bars.index(trace), len(bars))
        elif trace["type"] == "scatter":
            drawn += _scatter(trace, across, up)
    return drawn


def _frame(across: Axis, up: Axis) -> Iterator[str]:
    left, right, bottom, top = *across.ends, *up.ends
    yield f'<path d="M{left:.0f} {top:.0f}V{bottom:.0f}H{right:.0f}" fill="none" stroke="{EDGE}"/>'
    for at, label in across.ticks():
        yield _aslant(at, bottom + 12, label) if across.crowded else text(at, bottom + 15, label)
    for at, label in up.ticks():
        yield f'<path d="M{left:.0f} {at:.1f}H{right:.0f}" stroke="{GRID}"/>' if not up.names else ""
        yield text(left - 6, at + 4, label, anchor="end")
    yield text((left + right) / 2, bottom + 36 + _hanging(across), across.title, colour=INK, size=12)
    yield text(left - 48, (bottom + top) / 2, up.title, colour=INK, size=12, turned=True)


def _hanging(across: Axis) -> float:
    """Pixels by which names that are written aslant reach lower than level ones."""
    longest = max((len(label) for _, label in across.ticks()), default=0) if across.crowded else 0
    return ASLANT * LETTER * longest


def _aslant(x: float, y: float, label: str) -> str:
    return f'<g transform="rotate(-{SLANT} {x:.0f} {y:.0f})">{text(x, y, label, anchor="end")}</g>'


def _rules(layout: Mapping[str, Any], across: Axis, up: Axis, y: str) -> Iterator[str]:
    """Dashed lines across the panel, such as chance."""
    for shape in layout.get("shapes") or ():
        if shape.get("type") != "line":
            continue
        if _lies_flat(shape, y):
            line = f"M{across.ends[0]:.0f} {up(shape['y0']):.1f}H{across.ends[1]:.0f}"
        elif shape.get("x0") == shape.get("x1") and str(shape.get("yref", "")).endswith("domain"):
            line = f"M{across(shape['x0']):.1f} {up.ends[0]:.0f}V{up.ends[1]:.0f}"
        elif shape.get("x0") == shape.get("y0") and shape.get("x1") == shape.get("y1"):
            line = _path([(across(shape[f"x{end}"]), up(shape[f"y{end}"])) for end in "01"], stepped=False)
        else:
            continue
        yield f'<path d="{line}" stroke="{RULE}" stroke-dasharray="6 4"/>'


def _lies_flat(shape: Mapping[str, Any], y: str) -> bool:
    """Whether it is a line at one value of this y axis."""
    flat = shape.get("type") == "line" and shape.get("y0") == shape.get("y1")
    return flat and str(shape.get("yref", "y")) == y


def _scatter(trace: Mapping[str, Any], across: Axis, up: Axis) -> Iterator[str]:
    colour, mode = _colour(trace), trace.get("mode", "lines")
    points = [
        None if x is None or y is None else (across(x), up(y))
        for x, y in zip(trace.get("x") or (), trace.get("y") or (), strict=False)
    ]
    there = [point for point in points if point is not None]
    if not there:
        return
    style = trace.get("line") or {}
    stepped = style.get("shape") == "hv"
    if trace.get("fill"):
        edge = there if trace["fill"] == "toself" else [(there[0][0], up(0)), *there, (there[-1][0], up(0))]
        inside = html.escape(str(trace.get("fillcolor", colour)))
        yield f'<path d="{_path(edge, stepped)}Z" fill="{inside}" stroke="none"/>'
    if "lines" in mode and style.get("width") != 0:
        yield f'<path d="{_path(points, stepped)}" fill="none" stroke="{colour}" stroke-width="2"{_dash(trace)}/>'
    yield from _whiskers(trace, list(zip(points, trace["y"], strict=False)), up, colour)
    if "markers" in mode:
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in there)
        yield f'<path d="{dots}" stroke="{colour}" stroke-width="6" stroke-linecap="round" stroke-opacity="0.7"/>'


def _bars(trace: Mapping[str, Any], across: Axis, up: Axis, place: int, of: int) -> Iterator[str]:
    colour, width = _colour(trace), across.step * 0.7 / of
    middles: list[tuple[tuple[float, float] | None, Any]] = []
    for x, y in zip(trace.get("x") or (), trace.get("y") or (), strict=False):
        if y is None:
            middles.append((None, y))
            continue
        left = across(x) + width * (place - of / 2)
        top, bottom = sorted((up(0), up(y)))
        middles.append(((left + width / 2, up(y)), y))
        size = f'width="{width * 0.92:.1f}" height="{bottom - top:.1f}"'
        yield f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{colour}"/>'
    yield from _whiskers(trace, middles, up, INK)


def _whiskers(
    trace: Mapping[str, Any], places: Sequence[tuple[tuple[float, float] | None, Any]], up: Axis, colour: str
) -> Iterator[str]:
    """The intervals as bars through the points."""
    error = trace.get("error_y") or {}
    above = error.get("array") or ()
    below = error.get("arrayminus") or above
    parts = [
        f"M{at[0]:.1f} {up(y - minus):.1f}V{up(y + plus):.1f}"
        for (at, y), plus, minus in zip(places, above, below, strict=False)
        if at is not None and plus is not None and minus is not None
    ]
    if parts:
        yield f'<path d="{"".join(parts)}" stroke="{colour}" stroke-width="1.3"/>'


def _heatmap(trace: Mapping[str, Any], across: Axis, up: Axis) -> Iterator[str]:
    cells = [value for row in trace.get("z") or () for value in row if value is not None]
    if not cells:
        return
    low = min(cells) if trace.get("zmin") is None else float(trace["zmin"])
    high = max(cells) if trace.get("zmax") is None else float(trace["zmax"])
    by_shade: dict[int, list[str]] = {}
    for y, row in zip(trace["y"], trace["z"], strict=False):
        for x, value in zip(trace["x"], row, strict=False):
            if value is not None:
                share = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
                left, top = across(x) - across.step / 2, up(y) - up.step / 2
                cell = f"M{left:.1f} {top:.1f}h{across.step:.1f}v{up.step:.1f}h-{across.step:.1f}z"
                by_shade.setdefault(round(share * SHADES), []).append(cell)
    scale = trace.get("colorscale") or SEQUENTIAL
    for shade, paths in sorted(by_shade.items()):
        yield f'<path d="{"".join(paths)}" fill="{_shade(scale, shade / SHADES)}"/>'
    if trace.get("showscale") is False:
        return
    left, bottom, height = across.ends[1] + 12, up.ends[0], (up.ends[0] - up.ends[1]) / SHADES
    for shade in range(SHADES):
        y = bottom - (shade + 1) * height
        fill = _shade(scale, (shade + 0.5) / SHADES)
        yield f'<rect x="{left:.0f}" y="{y:.1f}" width="10" height="{height + 0.5:.1f}" fill="{fill}"/>'
    for share in (0.0, 0.5, 1.0):
        yield text(left + 14, bottom - share * SHADES * height + 4, f"{low + share * (high - low):.3g}", anchor="start")


def _shade(scale: Sequence[Sequence[Any]], share: float) -> str:
    """The colour of a plotly scale at a share of its length, between the two stops beside it."""
    for (low, first), (high, second) in pairwise(scale):
        if share <= high:
            part = (share - low) / ((high - low) or 1.0)
            ends = [[int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in (str(first), str(second))]
            return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(*ends, strict=True))
    return html.escape(str(scale[-1][1]))


def _path(points: Sequence[tuple[float, float] | None], stepped: bool) -> str:
    """A line through the points, broken where there is none."""
    said, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        x, y = point
        said.append(f"H{x:.1f}V{y:.1f}" if stepped and pen == "L" else f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(said)


def _colour(trace: Mapping[str, Any]) -> str:
    found = (trace.get("marker") or {}).get("color") or (trace.get("line") or {}).get("color") or PALETTE[0]
    return html.escape(found) if isinstance(found, str) else PALETTE[0]
