"""How often the verdict of `mechlens sinks` is right where the truth is planted.

    python scripts/error_rates_sinks.py [--draws 200] [--write]

Sink masses and rises of the loss are drawn (`tests/planted_sink_domains.py`), no model is run: everything from them on
is the study's own. `--write` puts the table into mechlens/studies/sinks/README.md.
"""

import argparse
import collections
import sys
from pathlib import Path

import readme_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

TEXTS = (10, 16, 32)


def verdicts(draws: int) -> str:
    """Shares of words by world and texts of a kind."""
    from planted_sink_domains import WORLDS, planted

    from mechlens.studies.sinks.verdict import ALIKE, IDLE, INCONCLUSIVE, NONE, SWITCH

    words = (NONE, ALIKE, IDLE, SWITCH, INCONCLUSIVE)
    lines = [readme_table.head(["truth", "texts", *words])]
    for name, (world, _) in WORLDS.items():
        for n in TEXTS:
            found = collections.Counter(planted(world, seed, n).word for seed in range(draws))
            lines.append(readme_table.row([name, n, *(readme_table.percent(found[word] / draws) for word in words)]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    table = verdicts(given.draws)
    print(table)
    if given.write:
        readme_table.write(__file__, "verdicts", table)


if __name__ == "__main__":
    main()
