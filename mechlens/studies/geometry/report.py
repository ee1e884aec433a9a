"""The shape of representations as a record: directions or subspaces, collapse, clusters, dimension, other models."""

import pandas as pd

from mechlens.runs.report import figures
from mechlens.runs.report.cells import in_brief
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.geometry.others_report import named, other_sections
from mechlens.studies.geometry.study import GeometryResult, GeometryStudy
from mechlens.studies.geometry.verdict import RULE

QUESTION = "Is harmfulness one direction or a subspace, and do other models hold it in the same way?"
AUROCS = ("line", "left", "words")
WORDS = {
    "line": "AUROC of one direction", "left": "AUROC without that direction",
    "beyond_words": "the same, minus what the words have left", "in_place": "alike in place (cosine)",
    "shape": "alike in shape (CKA)", "ablated": "change of refusal log-odds without so many dimensions",
}  # fmt: skip


def record(writer: RunWriter, result: GeometryResult, given: GeometryStudy) -> None:
    """Writes everything that was found into an open run."""
    writer.result(result)
    first, *others = given.subjects
    harm, *rest = [one.headline for one in result.verdicts] + [one.headline for one in result.changed]
    metrics = result.metrics()
    words = {name: f"{WORDS[kind]}: {', '.join(of.rsplit('.', 1))}"
             for name in metrics for kind, _, of in [name.partition(".")]}  # fmt: skip
    parts = [
        _subspaces(writer, result),
        _ablated(writer, result),
        _collapse(writer, result),
        _clusters(result),
        _dimension(writer, result),
    ]
    parts += [*other_sections(writer, result)] if others else []
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
    columns = {
        "model": "model", "step": "step", "concept": "concept", "position": "position", "level": "level",
        "line": "one direction", "left": "left without it", "random_max": "largest of random", "words": "of the words",
        "beyond_words": "beyond the words",
    }  # fmt: skip
    concepts = result.tables().get("concepts")
    brief = None if concepts is None else in_brief(concepts, (*AUROCS, "beyond_words"), aurocs=AUROCS)
    return Section("One direction or a subspace", RULE, tuple(names), table=named(brief, columns))


def _ablated(writer: RunWriter, result: GeometryResult) -> Section | None:
    table = result.tables().get("ablated")
    if table is None:
        return None
    names = []
    for concept in table["concept"].unique():
        own = table[table["concept"] == concept]
        shifts = own.rename(columns={"shift": "change", "shift_low": "low", "shift_high": "high"})
        wide = pd.concat([
            shifts[["k", "change", "low", "high"]].assign(of="subspace of the concept"),
            own[["k"]].assign(change=own["within_mean"], of="where others vary, mean"),
            own[["k"]].assign(change=own["random_mean"], of="random subspaces, mean"),
        ])  # fmt: skip
        writer.table(f"ablated_{concept}", wide)
        drawn = figures.lines(
            wide, x="k", y="change", group="of", low="low", high="high", hline=0.0,
            title=f"Refusal without so many dimensions: {concept}", xlabel="dimensions taken out",
            ylabel="change of refusal log-odds (nats)",
        )  # fmt: skip
        names.append(writer.figure(f"ablated_{concept}", drawn, table=f"ablated_{concept}",
                                   caption="Of harmful requests; below 0 the model refuses less."))  # fmt: skip
    return Section(
        "What the model does without it",
        "The first model with k dimensions projected out of the residual stream, at every layer and token: change of "
        "the log-odds that harmful requests are refused, and KL on harmless ones, at the first token of the answer. "
        "The subspaces are those whose AUROC stands above, made of other families and held fixed. Gain is what k do "
        "more than one; beyond is the difference from random mixtures of how prompts without the concept differ, which "
        "lie where activations vary; random ones lie anywhere, where the model may use nothing.",
        tuple(names),
        table=named(in_brief(with_random(table), ("shift", "gain", "beyond", "kl")), _ABLATED),
    )


def with_random(table: pd.DataFrame) -> pd.DataFrame:
    """The mean and the lowest change of refusal over each kind of random subspaces, as text beside the others."""
    found = table.copy()
    for name in ("within", "random"):
        found[name] = [
            f"{mean:z.2f} ({low:z.2f})" if mean == mean else ""
            for mean, low in zip(table[f"{name}_mean"], table[f"{name}_lowest"], strict=True)
        ]
    return found


_ABLATED = {
    "concept": "concept", "position": "position", "level": "level", "k": "dimensions", "shift": "change of refusal",
    "gain": "more than fewest", "beyond": "beyond where others vary", "within": "where others vary (lowest)",
    "random": "random (lowest)", "kl": "KL", "within_kl": "KL where others vary", "random_kl": "KL random",
}  # fmt: skip


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
    columns = {
        "model": "model", "labels": "classes by", "position": "position", "level": "level", "classes": "classes",
        "nc1_svd": "NC1 (svd)", "nc1_cdnv": "NC1 (CDNV)", "nc2_norm_spread": "NC2: spread of lengths",
        "nc2_etf": "NC2: error from a simplex", "nc2_gnc2_excess": "NC2: GNC2 above its least",
        "nc3_distance": "NC3: distance", "nc4": "NC4: share that differs", "rate": "coding rate",
        "rate_chance": "of permuted labels", "rate_p": "p",
    }  # fmt: skip
    return Section(
        "Collapse and coding rate",
        "Neural collapse of the classes at every level; the table has the level at which spread within classes is "
        "least. NC1 in two of its forms, NC2 (lengths alike, error from a simplex, evenly apart), NC3 and NC4 against "
        "a ridge probe, and the coding rate reduction in nats beside permuted labels.",
        tuple(drawn), table=named(best, columns),
    )  # fmt: skip


def _clusters(result: GeometryResult) -> Section | None:
    table = result.tables().get("clusters")
    if table is None:
        return None
    return Section(
        "Clusters that nobody named",
        "Adjusted Rand index of clusters found without labels (1: the same groups, about 0: chance), by coding rate "
        "and by k-means.",
        table=named(table, _CLUSTERED),
    )


_CLUSTERED = {
    "model": "model", "position": "position", "level": "level", "k": "clusters", "labels": "beside classes by",
    "by_rate": "by coding rate", "by_means": "by k-means", "n": "prompts",
}  # fmt: skip


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
