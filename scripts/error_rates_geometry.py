"""How often the verdicts of `mechlens geometry` are right where the truth is planted.

    python scripts/error_rates_geometry.py [--draws 100] [--only "weak shapes" ...] [--write]

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

PROMPTS, FEW = (48, 96), (16, 24, 48, 96)
"""Of each class, in clear worlds and in those near what can be told."""


def table(
    names: list[str], words: list[str], planted: Callable[[str, int, int], str], draws: int, prompts: tuple[int, ...]
) -> str:
    """Shares of words by world and prompts of a class."""
    lines = [readme_table.head(["truth", "prompts", *words])]
    for name in names:
        for n in prompts:
            found = collections.Counter(planted(name, seed, n) for seed in range(draws))
            lines.append(readme_table.row([name, n, *(readme_table.percent(found[word] / draws) for word in words)]))
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", nargs="*", help="labels of the tables that are made; all without it")
    given = parser.parse_args()
    from planted_shapes import PAIRS, SHAPES, WEAK_PAIRS, WEAK_SHAPES, planted_pair, planted_shape

    from mechlens.studies.geometry import verdict

    worlds = {**SHAPES, **WEAK_SHAPES}
    of_shapes = [verdict.NOT_READ, verdict.ONE, verdict.SUBSPACE, verdict.BY_WORDS, verdict.INCONCLUSIVE]
    of_pairs = [verdict.SAME, verdict.TURNED, verdict.NO_MORE, verdict.OTHER, verdict.INCONCLUSIVE]

    def shape(name: str, seed: int, n: int) -> str:
        return planted_shape(worlds[name][0], seed, n).word

    def pair(name: str, seed: int, n: int) -> str:
        return planted_pair(name, seed, n).word

    for label, names, words, planted, prompts in (
        ("weak shapes", WEAK_SHAPES, of_shapes, shape, FEW), ("weak pairs", WEAK_PAIRS, of_pairs, pair, FEW),
        ("shapes", SHAPES, of_shapes, shape, PROMPTS), ("pairs", PAIRS, of_pairs, pair, PROMPTS),
    ):  # fmt: skip
        if given.only and label not in given.only:
            continue
        found = table(list(names), words, planted, given.draws, prompts)
        print(f"\n{label}\n{found}")
        if given.write:
            readme_table.write(__file__, label, found)


if __name__ == "__main__":
    main()
