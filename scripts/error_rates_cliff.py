"""How often the verdict of `mechlens cliff` is right where the truth is planted, and how often a trace's p errs.

    python scripts/error_rates_cliff.py [--draws 200] [--write]

Drops are drawn (`tests/planted_cliffs.py`), no model is run: everything from them on is the study's own. `--write`
puts the tables into mechlens/studies/cliff/README.md.
"""

import argparse
import collections
import sys
from pathlib import Path

import readme_table
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

TRACES = (10, 20, 40)
LIKENESS = (0.0, 0.5, 0.8, 0.95)
LENGTHS = (12, 20, 40, 200)
FALL, LAST = 4.0, 4
"""In standard deviations, and over how many tokens at the end."""


def verdicts(draws: int) -> str:
    """Shares of words by world and test traces of a class."""
    from planted_cliffs import WORLDS, planted

    from mechlens.studies.cliff.verdict import FALLS, INCONCLUSIVE, NONE, TEMPLATE

    words = (FALLS, TEMPLATE, NONE, INCONCLUSIVE)
    lines = [readme_table.head(["truth", "traces", *words])]
    for name, (world, _) in WORLDS.items():
        for n in TRACES:
            found = collections.Counter(planted(world, seed, n).word for seed in range(draws))
            lines.append(readme_table.row([name, n, *(readme_table.percent(found[word] / draws) for word in words)]))
    return "\n".join(lines)


def cuts(draws: int) -> str:
    """Shares of series with a p of .05 or less, by how alike neighbours are and by length, of noise and of a fall."""
    from mechlens.methods.statistics.change_point import chance_among_neighbours

    lines = [readme_table.head(["truth", "likeness of neighbours", *(f"{n} tokens" for n in LENGTHS)])]
    for fall in (0.0, FALL):
        for likeness in LIKENESS:
            shares = []
            for length in LENGTHS:
                noise = torch.randn(length, draws, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
                for i in range(1, length):
                    noise[i] = likeness * noise[i - 1] + (1 - likeness**2) ** 0.5 * noise[i]
                noise[-LAST:] -= fall
                found = [chance_among_neighbours(row.tolist(), series=99, seed=k) for k, row in enumerate(noise.T)]
                shares.append(readme_table.percent(sum(p <= 0.05 for p in found) / draws))
            truth = f"the last {LAST} fall by {fall:g} standard deviations" if fall else "noise"
            lines.append(readme_table.row([truth, likeness, *shares]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    for name, table in (("verdicts", verdicts(given.draws)), ("cuts", cuts(given.draws))):
        print(table)
        if given.write:
            readme_table.write(__file__, name, table)


if __name__ == "__main__":
    main()
