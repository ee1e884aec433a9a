"""How often the verdict of `mechlens track` is right on series whose truth is planted.

    python scripts/error_rates_track.py [--draws 100] [--jobs 2] [--write]

Prompts, activations and answers are drawn (`tests/planted_series.py`), no model is run: everything from the activations
on is the study's own. `--write` puts the table into mechlens/studies/track/README.md.
"""

import argparse
import collections
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import readme_table

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
if TYPE_CHECKING:
    from planted_series import Later, World

COLUMNS = {
    "kept": ("kept",),
    "drift, decoupled": ("read-out drift", "threshold drift", "behaviour decoupled"),
    "weakened": ("representation weakened",),
    "lost, not above the words": ("representation lost", "not above the words"),
    "inconclusive": ("inconclusive",),
    "not measurable": ("not measurable",),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint of a world, and the words that are right of it."""

    name: str
    later: "Later"
    right: tuple[str, ...]


GONE = COLUMNS["lost, not above the words"]


def cases(beyond: bool) -> tuple[Case, ...]:
    """What became of a concept that the base represents beyond the words, or of one that only the words carry."""
    from planted_series import Later

    if not beyond:
        right = (*GONE, "not measurable")
        return (
            Case("only the words, as in the base", Later(), right),
            Case("only the words, and random blocks", Later(kind="random blocks"), right),
            Case("only the words, and it refuses no more", Later(refuses=frozenset()), right),
        )
    return (
        Case("kept", Later(), ("kept",)),
        Case("random blocks", Later(kind="random blocks"), GONE),
        Case("destroyed, the words still read", Later(concept=0.0), GONE),
        Case("half as far apart", Later(concept=1.5), ("representation weakened",)),
        Case("direction turned by 80 degrees", Later(angle=1.4), ("read-out drift",)),
        Case("all prompts shifted", Later(shift=4.0), ("threshold drift",)),
        Case("refuses no more", Later(refuses=frozenset()), ("behaviour decoupled",)),
    )


def worlds() -> list[tuple[str, "World", bool]]:
    """How well the words tell the classes, and how many pairs; then worlds of words alone and of nothing."""
    from planted_series import World

    strengths = {".50": 0.0, ".67": 0.5, ".83": 1.0}
    sizes = [(n, carried) for n in (48, 96) for carried in strengths] + [(192, ".83")]
    found = [(carried, World(n=n, words=strengths[carried]), True) for n, carried in sizes]
    found += [(".93", World(n=n, words=1.6, concept=0.0, reads_words=4.0), False) for n in (48, 96, 192)]
    return [*found, (".50", World(concept=0.0), False)]


def words_of(world: "World", beyond: bool, seed: int) -> list[str]:
    """The verdict on each case in one draw."""
    from dataclasses import replace

    import torch
    from planted_series import PlantedSeries

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = PlantedSeries(replace(world, seed=seed)).verdicts(*(case.later for case in cases(beyond)))
    return [verdict.word for verdict in found]


def table(draws: int, jobs: int) -> str:
    """In Markdown; the right words' share in bold."""
    lines = [readme_table.head(["the checkpoint", "AUROC of the words", "pairs", *COLUMNS])]
    with ProcessPoolExecutor(jobs) as pool:
        for carried, world, beyond in worlds():
            drawn = list(pool.map(words_of, [world] * draws, [beyond] * draws, range(draws)))
            for case, found in zip(cases(beyond), zip(*drawn, strict=True), strict=True):
                tally = collections.Counter(found)
                shares = []
                for words in COLUMNS.values():
                    said = f"{sum(tally[word] for word in words) / draws:.0%}"
                    shares.append(f"**{said}**" if set(words) & set(case.right) else said)
                lines.append(readme_table.row([case.name, carried, world.n, *shares]))
                print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = table(args.draws, args.jobs)
    if args.write:
        readme_table.write(__file__, "verdicts", found)


if __name__ == "__main__":
    main()
