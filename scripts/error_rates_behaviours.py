"""How often the verdict of `mechlens behaviours` is right on training runs whose truth is planted.

    python scripts/error_rates_behaviours.py [--draws 200] [--jobs 2] [--write]

Log-odds are drawn (`tests/planted_behaviours.py`), no model is run: everything from them on is the study's own.
`--write` puts the table into mechlens/studies/behaviours/README.md.
"""

import argparse
import collections
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import readme_table

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

WORDS = ("not learned", "only what was trained on", "spreads", "narrow", "inconclusive")
RUNS = (2, 3, 6)
Cell = tuple[str, int, int]
"""World, runs of each group, draw."""


def verdict_in(cell: Cell) -> tuple[str, int, str]:
    """The word in one draw."""
    from planted_behaviours import WORLDS, planted

    from mechlens.studies.behaviours.verdict import group_verdicts

    name, runs, seed = cell
    world, _ = WORLDS[name]
    return name, runs, group_verdicts(planted(replace(world, runs=runs), seed))[0].word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    from planted_behaviours import WORLDS

    # Worlds differ in their runs here by column, not by name.
    names = [name for name in WORLDS if "six runs" not in name]
    cells = [(name, runs, seed) for name in names for runs in RUNS for seed in range(given.draws)]
    with ProcessPoolExecutor(given.jobs) as pool:
        found = collections.Counter(pool.map(verdict_in, cells, chunksize=20))
    lines = [readme_table.head(["truth", "runs", *WORDS])]
    for name in names:
        for runs in RUNS:
            shares = [f"{found[name, runs, word] / given.draws:.1%}".replace(".0%", "%") for word in WORDS]
            lines.append(readme_table.row([name.removesuffix(", three runs"), runs, *shares]))
    table = "\n".join(lines)
    print(table)
    if given.write:
        readme_table.write(__file__, "verdicts", table)


if __name__ == "__main__":
    main()
