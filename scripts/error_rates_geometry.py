"""How often the verdicts of `mechlens geometry` are right where the truth is planted.

    python scripts/error_rates_geometry.py [--draws 100] [--write]

Vectors are drawn (`tests/planted_shapes.py`), no model is run: everything from them on is the study's own. `--write`
puts the tables into mechlens/studies/geometry/README.md.
"""

import argparse
import collections
import sys
from collections.abc import Callable
from pathlib import Path

import readme_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

PROMPTS = (48, 96)


def table(names: list[str], words: list[str], planted: Callable[[str, int, int], str], draws: int) -> str:
    """Shares of words by world and prompts of a class."""
    lines = [readme_table.head(["truth", "prompts", *words])]
    for name in names:
        for n in PROMPTS:
            found = collections.Counter(planted(name, seed, n) for seed in range(draws))
            lines.append(readme_table.row([name, n, *(readme_table.percent(found[word] / draws) for word in words)]))
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    from planted_shapes import PAIRS, SHAPES, planted_pair, planted_shape

    from mechlens.studies.geometry import verdict

    shapes = table(
        list(SHAPES),
        [verdict.NOT_READ, verdict.ONE, verdict.SUBSPACE, verdict.BY_WORDS, verdict.INCONCLUSIVE],
        lambda name, seed, n: planted_shape(SHAPES[name][0], seed, n).word,
        given.draws,
    )
    pairs = table(
        list(PAIRS),
        [verdict.SAME, verdict.TURNED, verdict.NO_MORE, verdict.OTHER, verdict.INCONCLUSIVE],
        lambda name, seed, n: planted_pair(name, seed, n).word,
        given.draws,
    )
    for label, found in (("shapes", shapes), ("pairs", pairs)):
        print(f"\n{label}\n{found}")
        if given.write:
            readme_table.write(__file__, label, found)


if __name__ == "__main__":
    main()
