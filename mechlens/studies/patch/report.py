"""A patching run as a record: grids, controls, heads, and two sentences."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechlens.methods.patching.plan import MODES
from mechlens.methods.patching.result import MIN_SHARE, PatchResult
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.runs.report import figures
from mechlens.runs.report.colours import QUIET
from mechlens.runs.report.parts import visible
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.patch.study import Candidates, RefusalPath
from mechlens.studies.patch.verdict import PathVerdict, path_verdict
from mechlens.studies.shared.rounding import logit_rounding

QUESTION = (
    "Two prompts differ in a few words; the model refuses one and accepts the other. Where does the difference enter "
    "the residual stream, at which positions does it travel, where does it end up, and which heads move it?"
)


def record(writer: RunWriter, result: RefusalPath, given: Candidates) -> None:
    """Writes every sweep, its figures and the report into an open run."""
    seed = int(writer.run.seed or 0)
    verdict = path_verdict(result, seed)
    writer.result(verdict)
    writer.report(_report(writer, result, verdict, given.model, draw(writer, result, seed)))


def _rounding(result: RefusalPath, model: LanguageModel) -> str:
    """Of the gap between the two runs, of which every recovery is a share."""
    sweep = result.sweeps["denoising"]
    gaps = (sweep.target - sweep.start).abs()[sweep.has_gap]
    gap = Estimate.exact(float(gaps.double().mean()), len(gaps)) if len(gaps) else Estimate.missing(0)
    return logit_rounding(loaded(model).parity, {"the mean gap between the two prompts of a pair": gap})


def _shown() -> dict[str, str]:
    """The recoveries of both directions, each beside what random vectors do; the layers stand in the sentences."""
    named = {
        "recovery.best_before_last": "best place before the last token",
        "recovery.random_maximum": "best random vector",
        "recovery.top_head": "best head at the last token",
        "recovery.top_head_random": "best random vector at a head",
    }
    return {f"{way}.{key}": f"{way}: {name}" for way in MODES for key, name in named.items()}


def _report(
    writer: RunWriter,
    result: RefusalPath,
    verdict: PathVerdict,
    model: LanguageModel,
    drawn: dict[str, tuple[str, ...]],
) -> Report:
    sweep = result.sweeps["denoising"]
    tokens = result.chosen.first_token.tokens
    return Report(
        title=f"Where refusal travels in {loaded(model).checkpoint.name}",
        question=QUESTION,
        headline=verdict.headline,
        verdict=" ".join(verdict.sentences) + _rounding(result, model),
        numbers={name: verdict.numbers[name] for name in _shown()},
        words=_shown(),
        sections=(
            Section(
                "Where it enters, travels and ends up",
                "Recovery is the mean of patched - start over the mean of target - start in the metric: 0 changes "
                f"nothing, 1 gives the other run's behaviour. It is over the {int(sweep.has_gap.sum())} of "
                f"{len(sweep.pairs)} pairs whose runs differ by at least {MIN_SHARE:g} of what the median pair's do. "
                "Columns are tokens of the first pair; other pairs are aligned by role. The control "
                "adds a random vector as long as the difference of the two runs: what it recovers, any push would.",
                drawn["where"],
            ),
            Section(
                "Which heads move it",
                "The same at the output `z` of every head, at the last token only: what a head wrote to where the "
                "answer is decided. The table has the five largest of each mode.",
                drawn["heads"],
                table=verdict.heads,
            ),
            Section(
                "Attribution patching on the same grid",
                f"The first-order estimate correlates with exact patching at {result.correlation():.3f}. It costs two "
                "forward passes and one backward, and fails where softmaxes saturate.",
            ),
        ),
        how=(
            f"{result.chosen.note}; {len(result.chosen.pairs)} were patched. Metric: {sweep.metric} with first tokens "
            f"{tokens.named} ({tokens.origin}). Site {sweep.site}, engine: {sweep.engine}; heads: "
            f"{result.sweeps['heads.denoising'].engine}. Intervals: bootstrap over families. p: their sign flips, "
            "largest mean effect over the grid (with few pairs it can't fall below 2^(1-n)). The best sites are chosen "
            "and reported on the same pairs: their p is corrected for that, their interval is not."
        ),
        model=loaded(model).checkpoint.name,
    )


SIGNIFICANT = 0.05
GAP = 0.04
"""Between panels, as a share of the figure's width."""
SAYS = {
    "denoising": "one clean vector in the corrupt run: is it enough?",
    "noising": "one corrupt vector in the clean run: is it needed?",
}
SEE = (
    "Red: the patch gives the other run's behaviour. Follow the red cells from the words that differ, upwards to the "
    "last token. "
)
STARS = "* p < 0.05, corrected over the whole grid. Point at a cell for its interval (95%, bootstrap over families)."


def draw(writer: RunWriter, result: RefusalPath, seed: int) -> dict[str, tuple[str, ...]]:
    """Draws every figure; their names by section of the report."""
    named: dict[str, list[str]] = {"where": []}
    for mode in MODES:
        title = f"{mode.capitalize()}: {SAYS[mode]}"
        grids = [_cells(result.sweeps[name], seed) for name in (mode, f"{mode}.random")]
        figure = _panels(title, grids, ("result", "control: random vectors"), "token", "token (of the first pair)")
        named["where"].append(writer.figure(f"grid_{mode}", figure, table=f"patching_{mode}", caption=SEE + STARS))
    for mode in MODES:
        figure = _role_lines(result.by_role(seed), mode)
        caption = (
            "Where one curve falls and another rises the information has moved on. Mean over all pairs and the "
            "positions of a role; dotted: the most that random vectors of the same length do at any of the roles."
        )
        named["where"].append(writer.figure(f"by_role_{mode}", figure, table="recovery_by_role", caption=caption))
    names = [f"{way}{null}" for way in MODES for null in ("", ".random")]
    grids = [_cells(result.sweeps[f"heads.{name}"], seed) for name in names]
    titles = [name.replace(".random", ":<br>control") for name in names]
    figure = _panels("Heads at the last token", grids, titles, "head", "head", reach=None)
    see = "A few strong cells are the heads that write the difference to the last token. " + STARS
    named["heads"] = [writer.figure("heads", figure, table="patching_heads.denoising", caption=see)]
    return {section: tuple(names) for section, names in named.items()}


def _cells(sweep: PatchResult, seed: int) -> pd.DataFrame:
    """One row per site, with the labels of its axes; tokens repeat, so their positions stand before them."""
    table = sweep.table(seed=seed)
    shown = [
        f"{position} '{visible(token)}'" for position, token in zip(table["position"], table["token"], strict=True)
    ]
    return table.assign(token=shown)


def _panels(
    title: str, grids: Sequence[pd.DataFrame], names: Sequence[str], x: str, xlabel: str, *, reach: float | None = 1.0
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
        axis = {
            **panel.layout.xaxis.to_plotly_json(),
            "domain": [low, low + width],
            "anchor": f"y{number}",
            "dtick": None,
        }
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
    """One line a role with its interval, and a dotted one for the most that the control does at any role."""
    shown, control = (table[table["sweep"] == name] for name in (mode, f"{mode}.random"))
    largest = control.loc[control.groupby("layer")["recovery"].idxmax().dropna()]
    largest = largest.assign(role="random vectors, largest", low=largest["recovery"], high=largest["recovery"])
    figure = figures.lines(
        pd.concat([shown, largest], ignore_index=True), x="layer", y="recovery", group="role", low="low", high="high",
        hline=0.0, title=f"{mode.capitalize()}, by position role", xlabel="layer", ylabel="recovery (1 = all of it)",
    )  # fmt: skip
    figure.update_traces(selector={"name": "random vectors, largest"}, line_dash="dot")
    return figure
