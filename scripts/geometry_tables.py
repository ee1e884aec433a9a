"""Geometry of packaged models in tables.

    python scripts/geometry_tables.py --out runs/geometry [--n 48] [--only ablated] [--write]

Runs `mechlens geometry` on smollm2-refuser beside smollm2; on smollm2 with the refuser's adapter as a checkpoint, which
says what the adapter changed in each matrix; and on smollm2-refuser alone, without its subspaces. Runs that are
finished are not made again. `--write` puts the tables into mechlens/studies/geometry/README.md; the verdict, collapse
and clusters are only printed.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import readme_table

PLAN: dict[str, Any] = {
    "levels": (0, 6, 12, 15, 18, 21, 24, 30), "ranks": (1, 2, 4, 8, 16), "random_subspaces": 5, "shuffles": 9,
    "max_new_tokens": 16,
}  # fmt: skip
"""Below the study's defaults, so that a model takes minutes of one core; levels 0 to 30 are those of smollm2."""
ABLATED: dict[str, Any] = {"levels": (12, 18, 24), "ranks": (1, 2, 4, 8), "random_subspaces": 2}
"""Each subspace is a pass of every prompt, and so is each random one of either kind."""


def concepts(run: Any) -> str:
    """What one direction reads and what is left without it, in both models."""
    columns = ["model", "concept", "at", "one direction", "left without", "random", "the words", "beyond the words"]
    lines = [readme_table.head(columns)]
    for _, row in run.tables["concepts"].iterrows():
        cells = [_brief(row, name) for name in ("line", "left")] + [f"up to {row['random_max']:.2f}"]
        cells += [_brief(row, name) for name in ("words", "beyond_words")]
        place = f"level {row['level']}, {row['position']}"
        lines.append(readme_table.row([f"`{row['model']}`", row["concept"], place, *cells]))
    return "\n".join(lines)


def changes(run: Any) -> str:
    """How the other model lies to the first."""
    lines = [readme_table.head(["concept's home", "in place", "CKA", "CKA with the words"])]
    for _, row in run.tables["changes"].iterrows():
        place = f"{row['concept']}: level {row['level']}, {row['position']}"
        lines.append(readme_table.row([place, *(_brief(row, name) for name in ("in_place", "shape", "words"))]))
    return "\n".join(lines)


def collapse(run: Any) -> str:
    """Collapse and coding rate of the first model at the level where classes are tightest."""
    table = run.tables["collapse"]
    own = table[table["step"] == 0]
    best = own.loc[own.groupby(["labels", "position"])["nc1_svd"].idxmin()]
    names = ["labels", "position", "level", "classes", "nc1_svd", "nc1_cdnv", "nc2_etf", "nc2_gnc2_excess", "nc4",
             "rate", "rate_chance"]  # fmt: skip
    return readme_table.of_frame(best[names])


def clusters(run: Any) -> str:
    """Adjusted Rand indices of both models."""
    return readme_table.of_frame(run.tables["clusters"].drop(columns=["step", "n"]))


def matching(run: Any) -> str:
    """Neurons and heads of the other model beside those of the first."""
    return readme_table.of_frame(named(run.tables["matching"], _MATCHED))


def sparse(run: Any) -> str:
    """Its neurons predicted from those of the first."""
    return readme_table.of_frame(named(run.tables["sparse"], _PREDICTED))


def groups(run: Any) -> str:
    """Units of both in groups."""
    return readme_table.of_frame(named(run.tables["groups"], _GROUPED))


def ablated(run: Any) -> str:
    """What the first model does without each concept's subspace."""
    columns = ["concept", "dimensions", "change of refusal", "more than one does", "where others vary: mean, lowest",
               "random: mean, lowest", "KL", "where others vary", "random"]  # fmt: skip
    lines = [readme_table.head(columns)]
    for _, row in run.tables["ablated"].iterrows():
        drawn = [f"{row[f'{name}_mean']:z.2f}, {row[f'{name}_lowest']:z.2f}" for name in ("within", "random")]
        kl = [_brief(row, "kl"), *(f"{row[name]:.2f}" for name in ("within_kl", "random_kl"))]
        lines.append(
            readme_table.row([row["concept"], row["k"], _brief(row, "shift"), _brief(row, "gain"), *drawn, *kl])
        )
    return "\n".join(lines)


def named(table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Some of its columns under the words for them."""
    return table[list(columns)].rename(columns=columns)


_PLACE = {"units": "units", "layer": "layer", "n_units": "how many"}
_CHANCE = {"chance": "by chance", "p": "p"}
_MATCHED = {**_PLACE, "matched": "similarity of partners", **_CHANCE, "gap": "gap to the most similar",
            "identity_rate": "kept their number"}  # fmt: skip
_PREDICTED = {**_PLACE, "r2": "R²", **_CHANCE, "needed": "neurons needed", "by_one": "share that one says"}
_GROUPED = {**_PLACE, "groups": "groups", "shared": "shared", **_CHANCE, "one_to_one": "groups of one and one",
            "largest": "units in the largest"}  # fmt: skip


def edits(run: Any) -> str:
    """The adapter's largest changes."""
    table, norms = run.tables["components"], run.tables["edits"].set_index("matrix")
    first = table[table["component"] == 0].head(8)
    names = [one for one in first.columns if one.startswith(("cos_", "auroc_")) and not one.endswith(("_low", "_high"))]
    shown = pd.concat([first[["matrix", "share", *names]].reset_index(drop=True),
                       norms.loc[first["matrix"], ["stable_rank", "effective_rank"]].reset_index(drop=True)],
                      axis=1)  # fmt: skip
    return readme_table.of_frame(shown)


def _brief(row: "pd.Series[Any]", name: str) -> str:
    ends = row[f"{name}_low"], row[f"{name}_high"]
    return "" if pd.isna(row[name]) else f"{row[name]:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=48)
    parser.add_argument("--only", choices=["two", "tuned", "ablated"], nargs="*", help="the runs that are made")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml
    from mechlens.models.packaged import adapter_folder

    wanted = given.only or ["two", "tuned", "ablated"]
    tables: dict[str, str] = {}
    printed: dict[str, str] = {}
    if "two" in wanted:
        two = ml.run(ml.MeasureGeometry(
            model="smollm2-refuser", other="smollm2", n=given.n, out=given.out / "two", **PLAN
        ))  # fmt: skip
        printed = {"verdict": two.verdict, "collapse": collapse(two), "clusters": clusters(two)}
        tables = {"concepts": concepts(two), "changes": changes(two), "matching": matching(two), "sparse": sparse(two),
                  "groups": groups(two)}  # fmt: skip
    if "tuned" in wanted:
        tuned = ml.run(ml.MeasureGeometry(
            model="smollm2", checkpoints=(str(adapter_folder("smollm2-refuser")),), n=given.n,
            out=given.out / "tuned", **PLAN,
        ))  # fmt: skip
        tables["edits"] = edits(tuned)
    if "ablated" in wanted:
        without = ml.run(ml.MeasureGeometry(
            model="smollm2-refuser", n=given.n, ablated=10, out=given.out / "ablated", **PLAN | ABLATED
        ))  # fmt: skip
        tables["ablated"] = ablated(without)
    readme_table.show(__file__, printed, None)
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/geometry/README.md"
    readme_table.show(__file__, tables, readme if given.write else None)


if __name__ == "__main__":
    main()
