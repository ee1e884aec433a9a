"""How often the verdict of `mechlens steer train` is right where the truth is planted.

    python scripts/error_rates_controllers.py [--draws 200] [--write]

Refusals are drawn (`tests/planted_steering.py`), no model is run: everything from them on is the study's own. `--write`
puts the tables into mechlens/studies/controllers/README.md.
"""

import argparse
import collections
import sys
from pathlib import Path

import readme_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

PROMPTS = (20, 40, 80)


def verdicts(draws: int) -> dict[str, str]:
    """Shares of words by world and test prompts of a class, of both questions."""
    from planted_steering import LAYERS, WORLDS, planted

    from mechlens.studies.controllers.verdict import (
        DO_NOT,
        HELPS,
        INCONCLUSIVE,
        MATTER,
        NEITHER,
        NO_BETTER,
        OVER_CONSTANT,
        WORSE,
    )

    words, some = (HELPS, OVER_CONSTANT, NO_BETTER, WORSE, NEITHER, INCONCLUSIVE), next(iter(LAYERS.values()))
    lines = [readme_table.head(["truth", "prompts of a class", *words])]
    for name, world in WORLDS.items():
        for n in PROMPTS:
            found = collections.Counter(planted(world, some, seed, n).word for seed in range(draws))
            lines.append(readme_table.row([name, n, *(readme_table.percent(found[word] / draws) for word in words)]))
    layers, other = (MATTER, DO_NOT, ""), next(iter(WORLDS.values()))
    told = [readme_table.head(["truth", "prompts of a class", MATTER, DO_NOT, "open"])]
    for name, weights in LAYERS.items():
        for n in PROMPTS:
            found = collections.Counter(planted(other, weights, seed, n).layers for seed in range(draws))
            told.append(readme_table.row([name, n, *(readme_table.percent(found[word] / draws) for word in layers)]))
    return {"verdicts": "\n".join(lines), "layers": "\n".join(told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/controllers/README.md"
    readme_table.show(__file__, verdicts(given.draws), readme if given.write else None)


if __name__ == "__main__":
    main()
