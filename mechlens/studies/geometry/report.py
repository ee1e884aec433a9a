"""The shape of representations as a record: directions or subspaces, collapse, clusters, dimension, other models."""

import pandas as pd

from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.geometry.study import GeometryResult, GeometryStudy
from mechlens.studies.geometry.verdict import CHANGE_RULE, RULE

QUESTION = "Is harmfulness one direction or a subspace, and do other models hold it in the same way?"
WORDS = {
    "line": "AUROC of one direction", "left": "AUROC without that direction",
    "beyond_words": "the same, minus what the words have left", "in_place": "alike in place (cosine)",
    "shape": "alike in shape (CKA)",
}  # fmt: skip


def record(writer: RunWriter, result: GeometryResult, given: GeometryStudy) -> None:
    """Writes everything that was found into an open run."""
    writer.result(result)
    first, *others = given.subjects
    harm, *rest = [one.headline for one in result.verdicts] + [one.headline for one in result.changed]
    metrics = result.metrics()
    words = {name: f"{WORDS[kind]}: {of}" for name in metrics for kind, _, of in [name.partition(".")]}
    parts = [_subspaces(writer, result), _collapse(writer, result), _clusters(result), _dimension(writer, result)]
    parts += [_others(writer, result), _matching(result)] if others else []
    parts += [_edits(result)] if "edits" in result.tables() else []
    writer.report(Report(
        title=f"Geometry of {first.name}", question=QUESTION, verdict=" ".join(map(str, (harm, *rest))), headline=harm,
        numbers={name: one for name, one in metrics.items() if name.split(".")[0] in ("line", "left", "shape")},
        words=words, sections=tuple(part for part in parts if part is not None), model=first.name,
        how=f"{len(first.batch.prompts)} requests, read once in {1 + len(others)} models. Harmfulness is looked at "
        "where the request ends, refusal, by each model's own answers, where the answer starts.",
    ))  # fmt: skip


def _subspaces(writer: RunWriter, result: GeometryResult) -> Section:
    names, table = [], result.frames["ranks"]
    for concept in table["concept"].unique() if len(table) else ():
        own = table[table["concept"] == concept]
        read = own.rename(columns={"subspace": "auroc", "subspace_low": "low", "subspace_high": "high"})
        wide = pd.concat([
            read[["k", "auroc", "low", "high"]].assign(of="subspace of the concept"),
            own[["k"]].assign(auroc=own["grassmann"], low=own["grassmann_low"], high=own["grassmann_high"],
                              of="a subspace a class"),
            own[["k"]].assign(auroc=own["random_mean"], of="random subspaces, mean"),
        ])  # fmt: skip
        writer.table(f"ranks_{concept}", wide)
        drawn = figures.lines(
            wide, x="k", y="auroc", group="of", low="low", high="high", hline=0.5, limits=(0.0, 1.0),
            title=f"AUROC by number of dimensions: {concept}", xlabel="dimensions", ylabel="AUROC, out of fold",
        )  # fmt: skip
        names.append(writer.figure(f"ranks_{concept}", drawn, table=f"ranks_{concept}",
                                   caption="A linear score reads one direction whatever the number."))  # fmt: skip
    return Section("One direction or a subspace", RULE, tuple(names), table=result.tables().get("concepts"))


def _collapse(writer: RunWriter, result: GeometryResult) -> Section | None:
    table = result.tables().get("collapse")
    if table is None:
        return None
    last = table[table["step"] == table["step"].min()]
    drawn = []
    for labels in last["labels"].unique():
        own = last[last["labels"] == labels]
        figure = figures.lines(
            own, x="level", y="nc1_svd", group="position", title=f"Spread within classes (NC1): {labels}",
            xlabel="level", ylabel="NC1 (svd)",
        )  # fmt: skip
        caption = "Of the first model; 0 where every class is one point."
        drawn.append(writer.figure(f"nc1_{labels}", figure, table="collapse", caption=caption))
    best = table.loc[table.groupby(["model", "labels", "position"])["nc1_svd"].idxmin()]
    columns = ["model", "labels", "position", "level", "classes", "nc1_svd", "nc1_cdnv", "nc2_norm_spread", "nc2_etf",
               "nc2_gnc2_excess", "nc3_distance", "nc4", "rate", "rate_chance", "rate_p"]  # fmt: skip
    return Section(
        "Collapse and coding rate",
        "Neural collapse of the classes at every level; the table has the level at which spread within classes is "
        "least. NC1 in two of its forms, NC2 (lengths alike, error from a simplex, evenly apart), NC3 and NC4 against "
        "a ridge probe, and the coding rate reduction in nats beside permuted labels.",
        tuple(drawn), table=best[columns],
    )  # fmt: skip


def _clusters(result: GeometryResult) -> Section | None:
    table = result.tables().get("clusters")
    if table is None:
        return None
    return Section(
        "Clusters that nobody named",
        "Adjusted Rand index of clusters found without labels (1: the same groups, about 0: chance), by coding rate "
        "and by k-means.",
        table=table,
    )


def _dimension(writer: RunWriter, result: GeometryResult) -> Section | None:
    table = result.tables().get("dimension")
    if table is None:
        return None
    first = table[table["step"] == table["step"].min()]
    drawn = figures.lines(
        first, x="level", y="two_nn", group="position", title="Intrinsic dimension (two nearest neighbours)",
        xlabel="level", ylabel="dimensions",
    )  # fmt: skip
    name = writer.figure("dimension", drawn, table="dimension", caption="Of all requests, first model.")
    return Section(
        "Dimension",
        "How many dimensions the requests' vectors have, by two neighbours, by maximum likelihood and by the "
        "participation ratio of the principal variances. Few prompts can tell few dimensions only.",
        (name,),
    )


def _others(writer: RunWriter, result: GeometryResult) -> Section:
    names, tables = [], result.tables()
    for measure, words in (("in_place", "alike in place (cosine)"), ("shape", "alike in shape (CKA)")):
        if "levels" not in tables or tables["levels"][measure].isna().all():
            continue
        table = tables["levels"].assign(of=tables["levels"]["model"] + ", " + tables["levels"]["position"])
        writer.table(f"levels_{measure}", table)
        drawn = figures.lines(
            table, x="level", y=measure, group="of", title=f"Beside the first model: {words}", xlabel="level",
            ylabel=words,
        )  # fmt: skip
        names.append(writer.figure(f"levels_{measure}", drawn, table=f"levels_{measure}",
                                   caption="Without massive dimensions."))  # fmt: skip
    return Section("The same, rotated, or other", CHANGE_RULE, tuple(names), table=tables.get("similarity"))


def _matching(result: GeometryResult) -> Section:
    return Section(
        "Units matched one to one",
        "Neurons and heads of each model beside those of the first, matched so that the sum of similarities is "
        "largest; chance is the same with prompts permuted. The gap is how much better the most similar unit is than "
        "the partner; the identity rate is the share of units whose partner has their own number.",
        table=result.tables().get("matching"),
    )


def _edits(result: GeometryResult) -> Section:
    tables = result.tables()
    norms = tables["edits"].sort_values("norm", ascending=False, kind="stable")
    sums = f"{len(norms)} matrices changed; their median stable rank is {norms['stable_rank'].median():.1f}"
    return Section(
        "What the last checkpoint changed",
        "Leading components of the matrices that changed most: the share of the change, the |cosine| of what is "
        "written with each concept's direction, and how well what is read tells its classes apart (AUROC of the first "
        f"model's inputs at the last token). {sums}.",
        table=tables.get("components"),
    )
