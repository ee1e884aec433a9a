"""What was measured, as tables with intervals over texts: by kind, by head and by level."""

from collections.abc import Mapping

import pandas as pd

from mechlens.methods.sinks.contrast import DomainContrast
from mechlens.methods.sinks.result import HEAD_MEASURES, LEVEL_MEASURES, SinkMap
from mechlens.studies.sinks.config import SinkPlan


def measure_table(maps: Mapping[str, SinkMap], plan: SinkPlan) -> pd.DataFrame:
    """A row a measure and kind of text: the mean over heads, or the largest of all levels."""
    rows = [
        {"measure": measure, "domain": name, **one.whole(measure, plan.seed, plan.resamples).row()}
        for measure in (*HEAD_MEASURES, *LEVEL_MEASURES)
        for name, one in maps.items()
    ]
    return pd.DataFrame(rows)


def head_table(maps: Mapping[str, SinkMap], contrast: DomainContrast, plan: SinkPlan) -> pd.DataFrame:
    """A row a head: MEASURE.KIND with _low, _high and _n (texts), and the contrast between kinds."""
    cells = (~contrast.difference.isnan()).nonzero()
    index = pd.MultiIndex.from_arrays(cells.T.tolist(), names=["layer", "head"])
    parts = [
        _beside(one, measure, f"{measure}.{name}", plan).reindex(index)
        for measure in HEAD_MEASURES
        for name, one in maps.items()
    ]
    layer, head = cells.T
    between = {"difference": contrast.difference[layer, head].tolist(), "p": contrast.p[layer, head].tolist()} | {
        word: [contrast.domains[int(one)] for one in own[layer, head]]
        for word, own in (("dormant_on", contrast.dormant), ("active_on", contrast.active))
    }
    return pd.concat([*parts, pd.DataFrame(between, index=index)], axis=1).reset_index()


def level_table(maps: Mapping[str, SinkMap], plan: SinkPlan) -> pd.DataFrame:
    """A row a kind of text and level: every measure with _low, _high and _n (texts)."""
    tables = [
        pd.concat([_beside(one, measure, measure, plan) for measure in LEVEL_MEASURES], axis=1, join="inner")
        .reset_index()
        .assign(domain=name)
        for name, one in maps.items()
    ]
    joined = pd.concat(tables, ignore_index=True)
    return joined[["domain", *joined.columns.drop("domain")]]


def _beside(one: SinkMap, measure: str, name: str, plan: SinkPlan) -> pd.DataFrame:
    """A measure's table by layer and head, or by level, its columns called NAME, NAME_low, NAME_high and NAME_n."""
    table = one.table(measure, plan.seed, plan.resamples)
    table = table.set_index(["layer", "head"] if measure in HEAD_MEASURES else ["level"])
    return table.rename(columns={"value": name} | {end: f"{name}_{end}" for end in ("low", "high", "n")})
