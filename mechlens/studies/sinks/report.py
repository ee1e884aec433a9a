"""Sinks as a record: which tokens, every head on every kind of text, what they are worth, positions, the residuals."""

import pandas as pd

from mechlens.methods.sinks.result import HEAD_MEASURES, LEVEL_MEASURES
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import loaded
from mechlens.runs.report import figures
from mechlens.runs.report.cells import in_brief
from mechlens.runs.report.parts import TokenView, visible
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.shared.sink_positions import CONCEPTS
from mechlens.studies.sinks.published import BESIDE, beside_table
from mechlens.studies.sinks.requests import Requests
from mechlens.studies.sinks.study import SinkResult, SinkStudy
from mechlens.studies.sinks.verdict import RULE

QUESTION = "Which tokens are attention sinks, do heads sleep on one kind of text, and does refusal pass through sinks?"
WORDS = {
    "with_sinks": "texts with a sink, share",
    "difference": "sink mass, difference of the head that differs most",
    "gap": "rise of the loss with such heads off, active minus dormant",
}


def record(writer: RunWriter, result: SinkResult, given: SinkStudy) -> None:
    """Writes everything that was found into an open run."""
    writer.result(result)
    name, requests = loaded(given.model).checkpoint.name, result.requests
    parts = [_sinks(writer, result), _heads(writer, result), _worth(result)]
    parts += [_positions(writer, requests), _effects(requests)] if requests is not None else []
    parts += [_residuals(writer, result), Section("Beside the papers", BESIDE, table=beside_table(result))]
    parts.append(Section("All measures", table=result.measures))
    words = WORDS | {
        f"{measure}.{domain}": f"{told} ({domain})"
        for measure, told in (HEAD_MEASURES | LEVEL_MEASURES).items()
        for domain in result.maps
    }
    metrics = result.metrics()
    words |= {
        one: f"attention of the answer to {one.partition('.')[2]}" for one in metrics if one.startswith("attention.")
    }
    counts = ", ".join(f"{len(one.ids)} texts of {domain}" for domain, one in result.maps.items())
    asked = f"; {len(requests.judged.prompts)} requests" if requests is not None else ""
    writer.report(Report(
        title=f"Attention sinks in {name}", question=QUESTION, verdict=str(result.verdict.headline),
        headline=result.verdict.headline, numbers=_shown(metrics), words=words, sections=tuple(parts),
        how=f"{counts}{asked}. Attention is read by a pass of the plain model, one text at a time.", model=name,
    ))  # fmt: skip


def _shown(metrics: dict[str, Estimate]) -> dict[str, Estimate]:
    """What decided, and the sink mass of each kind of text; the tables have all."""
    return {name: one for name, one in metrics.items() if name in WORDS or name.startswith("mass.")}


def _sinks(writer: RunWriter, result: SinkResult) -> Section:
    names = []
    for one in result.pictures:
        drawn = figures.heatmap(
            one.table().rename(columns={"attention": "value"}), x="key", y="query", value="value", limits=(0.0, 1.0),
            label="attention", title=f"Head {one.head[0]}.{one.head[1]}, first text of {one.domain}",
            xlabel="token attended to", ylabel="token that attends",
        )  # fmt: skip
        drawn.update_yaxes(autorange="reversed")
        caption = ("The head that differs most between kinds of text. Sinks, to which a fifth of all heads attend, are "
                   "marked below; a full column that isn't is this head's alone.")  # fmt: skip
        names.append(writer.figure(f"pattern_{one.domain}", drawn, table="patterns", caption=caption))
    views = tuple(
        TokenView(one.tokens, one.received, f"first text of {one.domain}; {_listed(one.sinks)}")
        for one in result.pictures
    )
    sinks = result.tables().get("sinks")
    return Section(
        "Which tokens are sinks",
        "Share of texts in which a token is one, its first place, the mean attention that it receives, and the share "
        "of heads that send it much. Found in every text by itself, not assumed to be the first token. Below, tokens "
        "by the attention that they receive from all heads: red is much; grey ones are seen by too few to tell.",
        tuple(names),
        table=None if sinks is None else sinks.assign(token=sinks["token"].map(visible)),
        views=views,
    )


def _listed(places: tuple[int, ...]) -> str:
    named = f"sink{'' if len(places) == 1 else 's'} at {' and '.join(map(str, places))}"
    return f"{named}, counted from 0" if places else "no sink"


def _heads(writer: RunWriter, result: SinkResult) -> Section:
    heads = result.heads
    names = []
    caption = "Mean over texts; the table has every measure with its interval, which is each head's alone."
    for domain in result.maps:
        grid = figures.heatmap(
            heads.rename(columns={f"mass.{domain}": "value"}), x="head", y="layer", value="value", label="sink mass",
            limits=(0.0, 1.0), title=f"Attention to sinks: {domain}", xlabel="head", ylabel="layer",
        )  # fmt: skip
        names.append(writer.figure(f"mass_{domain}", grid, table="heads", caption=caption))
    first = heads.sort_values("difference", ascending=False, kind="stable").head(12)
    masses = tuple(f"mass.{domain}" for domain in result.maps)
    ends = [f"{mass}_{end}" for mass in masses for end in ("low", "high")]
    columns = ["layer", "head", *masses, *ends, "difference", "p", "dormant_on", "active_on"]
    return Section(
        "Active and dormant heads",
        RULE,
        tuple(names),
        table=in_brief(first[columns], masses).rename(columns=_sink_mass),
    )


def _sink_mass(column: str) -> str:
    return column.replace("mass.", "sink mass, ")


def _worth(result: SinkResult) -> Section:
    table = in_brief(pd.concat([result.alone.table, result.together.table], ignore_index=True), ("rise",))
    keys = ["which", "what", "heads_or_dimensions"]
    wide = table.drop_duplicates([*keys, "domain"]).pivot(index=keys, columns="domain", values="rise")
    return Section(
        "What heads and dimensions are worth",
        "Rise of the loss (nats a token) with heads off, or with all their attention on the sink, and with the largest "
        "dimensions set to 0 at the sinks of every level; on each kind of text, beside others at random.",
        table=wide.reindex(pd.MultiIndex.from_frame(table[keys].drop_duplicates())).reset_index(),
    )


def _positions(writer: RunWriter, requests: Requests) -> Section:
    table = requests.positions
    drawn = figures.bars(
        table, x="position", y="mass", low="low", high="high", title="Attention of the answer to places of the prompt",
        xlabel="place", ylabel="attention, mean over heads",
    )  # fmt: skip
    caption = "Of a query in the answer. Template before and words are means a token."
    shown = in_brief(
        table.rename(columns={"low": "mass_low", "high": "mass_high"}).drop(columns="n").round({"even": 3}),
        ("mass", "heads", "auroc_harmful", "auroc_refused", "hidden_gap", "hidden_harmful"),
    )
    return Section(
        "Named positions: sinks, and what is read there",
        "How much attention a query of the answer pays to each place (mean over heads), what even attention would be "
        "(without an interval, as the lengths of these prompts and answers decide it), the share of heads that pay "
        "more than 0.3, and how well harm and refusal are read there (AUROC, each prompt out of fold). Hidden: what "
        "becomes of the log-odds of refusing, harmful minus harmless and of harmful requests alone, where no later "
        "token can attend to the place; of the template before and of the words one random token is hidden, which is "
        "what the others stand beside.",
        (writer.figure("positions", drawn, table="positions", caption=caption),),
        table=shown.rename(columns=_COLUMNS),
    )


_COLUMNS = {
    "mass": "attention of the answer", "even": "even attention", "heads": "heads above 0.3",
    "auroc_harmful": "AUROC harmful", "auroc_refused": "AUROC refused", "hidden_gap": "hidden: refusal gap",
    "hidden_harmful": "hidden: refusal log-odds of harmful", "gap": "refusal gap",
    "harmful": "refusal log-odds of harmful",
    "change_gap": "change of the gap", "change_harmful": "change of harmful",
    "cosine_harmful": "cosine of the harm direction", "cosine_refused": "cosine of the refusal direction",
    "reliability_harmful": "reliability of the harm direction",
    "reliability_refused": "reliability of the refusal direction",
}  # fmt: skip


def _effects(requests: Requests) -> Section:
    kinds = [f"{name}_{concept}" for concept in CONCEPTS for name in ("cosine", "auroc")]
    columns = ("gap", "harmful", "change_gap", "change_harmful", *kinds)
    reliabilities = {f"reliability_{concept}": 2 for concept in CONCEPTS}
    return Section(
        "Refusal and directions without them",
        "Refusal log-odds at the first answer token, harmful minus harmless and of harmful requests, under every "
        "experiment; the cosine of each concept's direction with that of the model as it is, at its home (harm at the "
        "request's last token, refusal at the template's), and the reliability of the direction found then (mean "
        "cosine of the directions of two halves of the prompts): where it is near 0 the direction is noise, and its "
        "cosine says nothing; and how well the model's own direction still tells the classes apart (AUROC, out of "
        "fold).",
        table=in_brief(requests.effects.round(reliabilities), columns).rename(columns=_COLUMNS),
    )


def _residuals(writer: RunWriter, result: SinkResult) -> Section:
    drawn = figures.lines(
        result.levels, x="level", y="peak", low="peak_low", high="peak_high", group="domain", hline=1.0,
        title="Norm of the sinks by level", xlabel="level", ylabel="multiple of the largest other norm",
    )  # fmt: skip
    caption = "Above 1: larger than any other token's. Bands: 95% intervals over texts, level by level."
    return Section(
        "The residual stream",
        "The sinks' norm against the largest other norm, by level; below, dimensions among the four largest entries of "
        "a text, at which level and token as a rule, and how often at a sink.",
        (writer.figure("peak", drawn, table="levels", caption=caption),),
        table=result.tables()["massive"],
    )
