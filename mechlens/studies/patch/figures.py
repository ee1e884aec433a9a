"""The figures of a patching run: grids with their controls beside them, and lines by role."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechlens.methods.patching.plan import MODES
from mechlens.methods.patching.result import PatchResult
from mechlens.runs.report import figures
from mechlens.runs.report.figure_parts import QUIET
from mechlens.runs.writer import RunWriter
from mechlens.studies.patch.study import RefusalPath

SIGNIFICANT = 0.05
GAP = 0.04
"""Between panels, as a share of the figure's width."""
SAYS = {
    "denoising": "one clean vector in the corrupt run: is it enough?",
    "noising": "one corrupt vector in the clean run: is it needed?",
}
STARS = "* p < 0.05, corrected over the whole grid. Point at a cell for its interval (95%, bootstrap over families)."


def draw(writer: RunWriter, result: RefusalPath, seed: int) -> dict[str, tuple[str, ...]]:
    """Draws every figure; their names by section of the report."""
    named: dict[str, list[str]] = {"where": [], "heads": []}
    for mode in MODES:
        title = f"{mode.capitalize()}: {SAYS[mode]}"
        grids = [_cells(result.sweeps[name], seed) for name in (mode, f"{mode}.random")]
        figure = _panels(title, grids, ("result", "control: random vectors"), "token", "token (of the first pair)")
        writer.figure(f"grid_{mode}", figure, table=f"patching_{mode}", caption=STARS)
        named["where"].append(f"grid_{mode}")
    for mode in MODES:
        figure = _role_lines(result.by_role(seed), mode)
        caption = "Over all pairs and the positions of a role; dotted: random vectors of the same length."
        writer.figure(f"by_role_{mode}", figure, table="recovery_by_role", caption=caption)
        named["where"].append(f"by_role_{mode}")
    names = [f"{way}{null}" for way in MODES for null in ("", ".random")]
    grids = [_cells(result.sweeps[f"heads.{name}"], seed) for name in names]
    titles = [name.replace(".random", ", control") for name in names]
    figure = _panels("Heads at the last token", grids, titles, "head", "head", reach=None)
    writer.figure("heads", figure, table="patching_heads.denoising", caption=STARS)
    named["heads"].append("heads")
    return {section: tuple(names) for section, names in named.items()}


def _cells(sweep: PatchResult, seed: int) -> pd.DataFrame:
    """One row per site, with the labels of its axes; tokens repeat, so their positions stand before them."""
    table = sweep.table(seed=seed)
    shown = [f"{position} {token!r}" for position, token in zip(table["position"], table["token"], strict=True)]
    return table.assign(token=shown)


def _panels(
    title: str,
    grids: Sequence[pd.DataFrame],
    names: Sequence[str],
    x: str,
    xlabel: str,
    *,
    reach: float | None = 1.0,
) -> go.Figure:
    """Heatmaps of recovery side by side in one colour scale, significant cells starred, intervals on hovering."""
    reach = reach or max(float(grid["recovery"].abs().max()) for grid in grids) or 1.0
    drawn = [
        figures.heatmap(
            grid, x=x, y="layer", value="recovery", center=0.0, limits=(-reach, reach), label="recovery",
            title=title, xlabel=xlabel, ylabel="layer",
        )
        for grid in grids
    ]  # fmt: skip
    figure, width = drawn[0], (1 + GAP) / len(grids) - GAP
    for k, (grid, panel, name) in enumerate(zip(grids, drawn, names, strict=True)):
        low = k * (width + GAP)
        trace, number = panel.data[0], "" if k == 0 else str(k + 1)
        trace.update(xaxis=f"x{number}", yaxis=f"y{number}", showscale=k == len(grids) - 1, **_marked(grid, x, trace))
        axis = {**panel.layout.xaxis.to_plotly_json(), "domain": [low, low + width], "anchor": f"y{number}"}
        levels = {**panel.layout.yaxis.to_plotly_json(), "anchor": f"x{number}", "showticklabels": k == 0}
        figure.layout[f"xaxis{number}"] = {**axis, "tickfont": {"size": 10}, "tickangle": -90 if x == "token" else 0}
        figure.layout[f"yaxis{number}"] = levels if k == 0 else {**levels, "title": None, "matches": "y"}
        if k:
            figure.add_trace(trace)
        figure.add_annotation(
            text=name, x=low, xref="paper", xanchor="left", y=1, yref="paper", yanchor="bottom", showarrow=False,
            font={"size": 12, "color": QUIET},
        )  # fmt: skip
    figure.update_layout(height=620 if x == "token" else 520, margin={"t": 84})
    return figure


def _marked(grid: pd.DataFrame, x: str, trace: go.Heatmap) -> dict[str, object]:
    """Stars and what hovering shows, in the order of the trace's rows and columns."""
    columns, rows = grid[x].unique(), grid["layer"].unique()
    ordered = grid.set_index(["layer", x]).reindex(pd.MultiIndex.from_product([rows, columns]))
    shape = (len(rows), len(columns))
    stars = np.where(ordered["p_corrected"] < SIGNIFICANT, "*", "").reshape(shape)
    said = ordered[["low", "high", "p_corrected"]].to_numpy().reshape(*shape, 3)
    return {
        "text": stars.tolist(),
        "texttemplate": "%{text}",
        "textfont": {"size": 10},
        "customdata": said.tolist(),
        "hovertemplate": (
            f"{x} %{{x}}<br>layer %{{y}}<br><b>%{{z:.3f}}</b> [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]"
            "<br>corrected p %{customdata[2]:.3f}<extra></extra>"
        ),
    }


def _role_lines(table: pd.DataFrame, mode: str) -> go.Figure:
    """One line a role with its interval, and the control as a dotted line of the same colour."""
    title = f"{mode.capitalize()}, by position role"
    shown, control = (table[table["sweep"] == name] for name in (mode, f"{mode}.random"))
    figure = figures.lines(
        shown, x="layer", y="recovery", group="role", low="low", high="high", hline=0.0,
        title=title, xlabel="layer", ylabel="recovery",
    )  # fmt: skip
    dotted = figures.lines(
        control, x="layer", y="recovery", group="role", title=title, xlabel="layer", ylabel="recovery"
    )
    for trace in dotted.data:
        trace.update(name=f"{trace.name}, control", showlegend=False, line={"dash": "dot", "width": 1.5})
        figure.add_trace(trace)
    return figure
