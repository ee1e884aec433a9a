"""How often `mechlens behaviours` is right on training runs whose truth is planted.

    python scripts/error_rates_behaviours.py [--tables verdicts when] [--draws 200] [--jobs 2] [--write]

Log-odds, curves and paths are drawn (`tests/planted_behaviours.py`, `tests/planted_when.py`), no model is run:
everything from them on is the study's own. `--write` puts the tables into mechlens/studies/behaviours/README.md.
"""

import argparse
import collections
import os
import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import readme_table

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

WORDS = ("not learned", "only what was trained on", "spreads", "narrow", "inconclusive")
RUNS = (2, 3, 6)
POINTS = (9, 13, 20)
PERMUTATIONS = 199
ASKED = {
    "jump": "a jump of a curve", "turn": "a turn of a path", "local cosine": "a jump of a path's local cosine",
}  # fmt: skip
Cell = tuple[str, int, int]
"""World, runs of each group, draw."""
Curve = tuple[str, str, int, int]
"""What is asked about, world, checkpoints, draw."""


def verdict_in(cell: Cell) -> tuple[str, int, str]:
    """The word in one draw."""
    from planted_behaviours import WORLDS, planted

    from mechlens.studies.behaviours.verdict import group_verdicts

    name, runs, seed = cell
    world, _ = WORLDS[name]
    return name, runs, group_verdicts(planted(replace(world, runs=runs), seed))[0].word


def said_in(cell: Curve) -> tuple[str, str, int, bool]:
    """Whether it is said in one draw."""
    import torch
    from planted_when import BENDS, CURVES, D_MODEL

    from mechlens.methods.directions.path import local_cosines, turning_point
    from mechlens.methods.statistics.change_point import LEVEL, change_point

    kind, name, n, seed = cell
    draw = torch.Generator().manual_seed(seed)
    if kind == "jump":
        at, noise = torch.linspace(0, 1, n, dtype=torch.float64), torch.randn(n, generator=draw, dtype=torch.float64)
        steps = [2**k for k in range(n)] if "1, 2, 4" in name else list(range(n))
        found = change_point(steps, CURVES[name](at, noise).tolist(), permutations=PERMUTATIONS, seed=seed)
        return kind, name, n, found.said
    noise = torch.randn(n, D_MODEL, generator=draw, dtype=torch.float64) / D_MODEL**0.5
    path = BENDS[name](n, noise)
    products = path @ path.T
    if kind == "turn":
        turn = turning_point(list(range(n)), products, permutations=PERMUTATIONS, seed=seed)
        assert turn is not None
        return kind, name, n, turn.p <= LEVEL
    cosines = local_cosines(products, 1)
    kept = [t for t in range(n) if bool(cosines[t].isfinite())]
    found = change_point(kept, cosines[kept].tolist(), permutations=PERMUTATIONS, seed=seed)
    return kind, name, n, found.said


def verdict_table(draws: int, pool: Executor) -> str:
    """Shares of each word, by world and runs."""
    from planted_behaviours import WORLDS

    # Worlds differ in their runs here by column, not by name.
    names = [name for name in WORLDS if "six runs" not in name]
    cells = [(name, runs, seed) for name in names for runs in RUNS for seed in range(draws)]
    found = collections.Counter(pool.map(verdict_in, cells, chunksize=20))
    lines = [readme_table.head(["truth", "runs", *WORDS])]
    for name in names:
        for runs in RUNS:
            shares = [readme_table.percent(found[name, runs, word] / draws) for word in WORDS]
            lines.append(readme_table.row([name.removesuffix(", three runs"), runs, *shares]))
    return "\n".join(lines)


def when_table(draws: int, pool: Executor) -> str:
    """How often a jump or a turn is said, by what is asked about, world and checkpoints."""
    from planted_when import BENDS, CURVES

    asked = [("jump", name) for name in CURVES] + [(kind, name) for kind in ("turn", "local cosine") for name in BENDS]
    cells = [(kind, name, n, seed) for kind, name in asked for n in POINTS for seed in range(draws)]
    found = collections.Counter(pool.map(said_in, cells, chunksize=20))
    lines = [readme_table.head(["asked about", "truth", *(f"{n} checkpoints" for n in POINTS)])]
    for kind, name in asked:
        shares = [readme_table.percent(found[kind, name, n, True] / draws) for n in POINTS]
        lines.append(readme_table.row([ASKED[kind], name, *shares]))
    return "\n".join(lines)


MAKERS = {"verdicts": verdict_table, "when": when_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    with ProcessPoolExecutor(given.jobs) as pool:
        for label in given.tables:
            table = MAKERS[label](given.draws, pool)
            print(table, end="\n\n")
            if given.write:
                readme_table.write(__file__, label, table)


if __name__ == "__main__":
    main()
