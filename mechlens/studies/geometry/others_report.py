"""What other models have in common with the first, as sections of the report: place, shape, units, changed matrices."""

from collections.abc import Mapping, Sequence

import pandas as pd

from mechlens.runs.report import figures
from mechlens.runs.report.cells import in_brief
from mechlens.runs.report.report import Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.geometry.study import GeometryResult
from mechlens.studies.geometry.verdict import CHANGE_RULE

_PLACE = {"model": "model", "step": "step", "layer": "layer", "other_layer": "its layer", "units": "units",
         "n_units": "how many"}  # fmt: skip
_CHANCE = {"chance": "by chance", "p": "p"}
_SIMILAR = {
    "model": "model", "step": "step", "position": "position", "level": "level", "dimensions": "dimensions",
    "measure": "measure", "value": "value", "chance": "by chance", "highest": "highest by chance", "p": "p",
}  # fmt: skip
_MEASURES = {"cka": "unbiased CKA", "pwcca": "projection-weighted CCA", "procrustes": "Procrustes",
             "neighbours": "mutual nearest neighbours"}  # fmt: skip
_MATCHED = {
    **_PLACE, "matched": "similarity of partners", **_CHANCE, "gap": "gap to the most similar",
    "identity_rate": "share that kept their number",
}  # fmt: skip
_PREDICTED = {
    **_PLACE, "r2": "R²", **_CHANCE, "needed": "neurons needed, median", "by_one": "share that one says",
}  # fmt: skip
_GROUPED = {
    **_PLACE, "groups": "groups", "shared": "shared", **_CHANCE, "one_to_one": "groups of one and one",
    "largest": "units in the largest",
}  # fmt: skip


def other_sections(writer: RunWriter, result: GeometryResult) -> Sequence[Section]:
    """The sections, in their order."""
    parts = [_others(writer, result), _matching(result), _predicted(result), _groups(result)]
    return parts + ([_edits(result)] if "edits" in result.tables() else [])


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
    similar = tables.get("similarity")
    told = None if similar is None else similar.assign(measure=similar["measure"].map(_MEASURES))
    return Section("The same, rotated, or other", CHANGE_RULE, tuple(names), table=named(told, _SIMILAR))


def named(table: pd.DataFrame | None, columns: Mapping[str, str]) -> pd.DataFrame | None:
    """Those of the columns that the table has, under the words for them."""
    return None if table is None else table[[name for name in columns if name in table]].rename(columns=dict(columns))


def _matching(result: GeometryResult) -> Section:
    return Section(
        "Units matched one to one",
        "Neurons and heads of each model beside those of the first, matched so that the sum of similarities is "
        "largest; chance is the same with prompts permuted. The gap is how much better the most similar unit is than "
        "the partner.",
        table=named(result.tables().get("matching"), _MATCHED),
    )


def _predicted(result: GeometryResult) -> Section:
    return Section(
        "Units predicted from several",
        "The neurons of each model that vary most, predicted from all neurons of the first by L1 regularisation on "
        "half of the families: the best R² on the other half, beside the same with prompts permuted; how many neurons "
        "it takes for nine tenths of that, and how often one will do.",
        table=named(result.tables().get("sparse"), _PREDICTED),
    )


def _groups(result: GeometryResult) -> Section:
    return Section(
        "Groups of units, many to many",
        "Units of both models that vary most, in groups by spectral clustering of their squared similarities within "
        "and between the models. Shared is the share of units that have their like in the other model (1: every group "
        "is half and half; 0: none has units of both), beside the same with prompts permuted. Where a few units are "
        "rotated among themselves, no unit has its partner and their group is whole.",
        table=named(result.tables().get("groups"), _GROUPED),
    )


def _edits(result: GeometryResult) -> Section:
    tables = result.tables()
    norms = tables["edits"].sort_values("norm", ascending=False, kind="stable")
    sums = f"{len(norms)} matrices changed; their median stable rank is {norms['stable_rank'].median():.1f}"
    return Section(
        "What the last checkpoint changed",
        "The leading component of the matrices that changed most: its share of the change, the |cosine| of what is "
        "written with each concept's direction, and how well what is read tells its classes apart (AUROC of the first "
        f"model's inputs at the last token). {sums}. Further components are in the table `components`.",
        table=_leading(tables["components"], norms) if "components" in tables else None,
    )


def _leading(components: pd.DataFrame, norms: pd.DataFrame) -> pd.DataFrame | None:
    first = components[components["component"] == 0].merge(norms, on="matrix")
    concepts = [str(name).removeprefix("cos_") for name in first if str(name).startswith("cos_")]
    read = {f"auroc_{name}": f"reads {name} (AUROC)" for name in concepts}
    # Where none of these matrices writes to the residual stream there is no cosine.
    written = {f"cos_{name}": f"writes {name} (|cosine|)" for name in concepts if first[f"cos_{name}"].notna().any()}
    return named(in_brief(first, tuple(read), aurocs=tuple(read)), {
        "matrix": "matrix", "share": "share of its change", "stable_rank": "stable rank",
        "effective_rank": "effective rank", **written, **read,
    })  # fmt: skip
