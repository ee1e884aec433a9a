"""What the sweeps say, in two sentences with numbers."""

from dataclasses import dataclass

import pandas as pd

from mechlens.methods.patching.plan import MODES
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import Headline
from mechlens.studies.patch.study import RefusalPath

HALF = 0.5


@dataclass(frozen=True)
class PathVerdict:
    """Where the difference enters, travels and ends up; which heads move it."""

    headline: Headline
    sentences: tuple[str, str]
    numbers: dict[str, Estimate]
    heads: pd.DataFrame
    """The heads with the largest effect at the last token, both directions, with corrected p."""
    path: RefusalPath
    seed: int

    def metrics(self) -> dict[str, Estimate]:
        """Every headline number by its name in run.json."""
        return self.numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        rows = [{"clean": p.clean.text, "corrupt": p.corrupt.text, "id": p.clean.id} for p in self.path.chosen.pairs]
        sweeps = {f"patching_{name}": sweep.table(seed=self.seed) for name, sweep in self.path.sweeps.items()}
        by_role = self.path.by_role(self.seed)
        return {"pairs": pd.DataFrame(rows), **sweeps, "recovery_by_role": by_role, "heads": self.heads}

    def artifacts(self) -> dict[str, object]:
        """Every sweep."""
        return {f"patching_{name}": sweep for name, sweep in self.path.sweeps.items()}


@dataclass(frozen=True)
class _Way:
    """One mode: the best place before the last token, the layers that hold half, the best head, the controls."""

    source: "pd.Series[float]"
    leaves: int | None
    """Last layer at which the best place holds at least half."""
    arrives: int | None
    """First layer at which the last token holds at least half."""
    control: "pd.Series[float]"
    heads: pd.DataFrame
    head_control: "pd.Series[float]"


def path_verdict(result: RefusalPath, seed: int, n_heads: int = 5) -> PathVerdict:
    """Layers by the rule "recovery at least one half"; heads by their recovery at the last token."""
    ways = {mode: _way(result, mode, seed, n_heads) for mode in MODES}
    n = len(result.chosen.pairs)
    numbers: dict[str, Estimate] = {}
    for mode, way in ways.items():
        numbers |= {
            f"{mode}.recovery.best_before_last": Estimate.of_row(way.source, "recovery"),
            f"{mode}.recovery.random_maximum": Estimate.of_row(way.control, "recovery"),
            f"{mode}.layer.leaves_source": _layer(way.leaves, n),
            f"{mode}.layer.arrives_last": _layer(way.arrives, n),
            f"{mode}.recovery.top_head": Estimate.of_row(_largest(way.heads), "recovery"),
            f"{mode}.recovery.top_head_random": Estimate.of_row(way.head_control, "recovery"),
        }
    numbers["attribution_correlation"] = Estimate.exact(result.correlation(), n)
    heads = pd.concat([way.heads.assign(mode=name) for name, way in ways.items()], ignore_index=True)
    heads = heads.drop(columns=["position", "token"])
    sentences = _where(ways), _which_heads(ways)
    return PathVerdict(_headline(ways["denoising"]), sentences, numbers, heads, result, seed)


def _way(result: RefusalPath, mode: str, seed: int, n_heads: int) -> _Way:
    table, control, heads, head_control = (
        result.sweeps[name].table(seed=seed)
        for name in (mode, f"{mode}.random", f"heads.{mode}", f"heads.{mode}.random")
    )
    last = result.sweeps[mode].positions[-1]
    before = table[table["position"] != last]
    source = _largest(before if len(before) else table)
    half = table[table["recovery"] >= HALF]
    leaves = half[half["position"] == source["position"]]["layer"]
    arrives = half[half["position"] == last]["layer"]
    return _Way(
        source=source,
        leaves=int(leaves.max()) if len(leaves) else None,
        arrives=int(arrives.min()) if len(arrives) else None,
        control=_largest(control),
        heads=heads.sort_values("recovery", ascending=False).head(n_heads),
        head_control=_largest(head_control),
    )


def _headline(way: _Way) -> Headline:
    """The one sentence: whether one place before the last token is enough, beside what any push there recovers."""
    place = f"{way.source['position']}, layer {way.source['layer']},"
    enough = way.source["recovery"] >= HALF
    word = "one place before the last token is enough" if enough else "no one place before the last token is enough"
    arrives = "never" if way.arrives is None else f"from layer {way.arrives}"
    against = (
        f"where the best random vector recovers {way.control['recovery']:.2f}; the last token holds half {arrives}"
    )
    return Headline(word, f"{place} recovers {_value(way.source)} of the refusal", against)


def _where(ways: dict[str, _Way]) -> str:
    parts = []
    for mode, way in ways.items():
        held = f"at least half for the last time at layer {way.leaves}" if way.leaves is not None else "nowhere half"
        ends = (
            f"at least half for the first time at layer {way.arrives}"
            if way.arrives is not None
            else "at no layer half"
        )
        parts.append(
            f"when {mode}, the best place before the last token is {way.source['position']} (recovery "
            f"{_value(way.source)} at layer {way.source['layer']}, {held}; the best random vector anywhere "
            f"{way.control['recovery']:.2f}), and the last token alone holds {ends}"
        )
    return f"W{'; '.join(parts)[1:]}."


def _which_heads(ways: dict[str, _Way]) -> str:
    parts = []
    for mode, way in ways.items():
        top = _largest(way.heads)
        parts.append(
            f"when {mode} {top['layer']}.{top['head']} ({_value(top)}, corrected p {top['p_corrected']:.3f}; "
            f"the best random vector at a head {way.head_control['recovery']:.2f})"
        )
    return f"The head (layer.head) that moves most of it to the last token is, {', and, '.join(parts)}."


def _largest(table: pd.DataFrame) -> "pd.Series[float]":
    return table.sort_values("recovery", ascending=False).iloc[0]


def _value(row: "pd.Series[float]") -> str:
    return f"{row['recovery']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _layer(value: int | None, n: int) -> Estimate:
    return Estimate.missing(n) if value is None else Estimate.exact(value, n)
