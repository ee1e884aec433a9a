"""How often the verdict of `mechlens separate` is right in worlds whose number of variables is known.

    python scripts/error_rates_separate.py [--draws 40] [--jobs 2] [--quick] [--coverage] [--write]

Prints the share of each verdict in each world, or with `--coverage` how many intervals of `auroc_bounds` hold the true
area; `--write` puts either table into mechlens/studies/separate/README.md.
"""

import argparse
import collections
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import readme_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = ("two variables", "one variable suffices", "explained by the words", "inconclusive", "not measurable")
Cell = tuple[str, float, int, float]
"""World, correlation of its variables, prompts, refusal rate of harmful prompts."""


def cells() -> list[Cell]:
    """The default number of prompts at all rates and correlations; other numbers at one rate."""
    found: list[Cell] = [
        (kind, 0.0, 608, rate)
        for kind in ("one variable", "thresholds by topic", "words only", "chance")
        for rate in (0.5, 0.7, 0.9)
    ]
    found += [
        (kind, 0.0, 608, rate)
        for kind in (
            "one variable, its decision at last", "one variable, saturating at last", "one variable and a word",
        )
        for rate in (0.7, 0.9)
    ]  # fmt: skip
    found += [("two variables, swapped", rho, 608, 0.7) for rho in (0.5, 0.8)]
    found += [("two variables", rho, 608, rate) for rho in (0.0, 0.3, 0.5, 0.8) for rate in (0.3, 0.5, 0.7, 0.9)]
    found += [(kind, 0.0, 608, rate) for kind in ("one variable", "two variables") for rate in (0.97, 1.0)]
    found += [("two variables", rho, 1440, 0.9) for rho in (0.0, 0.5)]  # all built-in prompts
    for n in (100, 200, 1000):
        found += [(kind, 0.0, n, 0.7) for kind in ("one variable", "thresholds by topic", "words only")]
        found += [("two variables", rho, n, 0.7) for rho in (0.0, 0.5, 0.8)]
    return found


def verdict_in(cell: Cell, seed: int) -> tuple[str, float]:
    """The verdict in one draw of a world, and D."""
    from planted_worlds import analysed, world

    from mechlens.studies.separate.verdict import separation_verdict

    kind, correlation, n, rate = cell
    metrics = analysed(world(kind, n=n, refusal_rate=rate, correlation=correlation, seed=seed)).metrics()
    return separation_verdict(metrics).word, metrics["dissociation"].value


def row(cell: Cell, draws: int) -> str:
    """A line of the table."""
    found = [verdict_in(cell, seed) for seed in range(draws)]
    tally = collections.Counter(word for word, _ in found)
    known = [d for _, d in found if not math.isnan(d)]
    kind, correlation, n, rate = cell
    named = f"{kind}, correlated {correlation}" if kind.startswith("two variables") else kind
    mean = f"{sum(known) / len(known):.2f}" if known else "-"
    return readme_table.row([named, n, rate, mean, *(f"{tally[w] / draws:.0%}" for w in WORDS)])


def table(chosen: list[Cell], draws: int, jobs: int) -> str:
    """All rows, made by so many processes."""
    lines = [readme_table.head(["world", "prompts", "harmful refused", "mean D", *WORDS])]
    with ProcessPoolExecutor(jobs) as pool:
        for line in pool.map(row, chosen, [draws] * len(chosen)):
            print(line, flush=True)
            lines.append(line)
    return "\n".join(lines)


def coverage(draws: int = 2000) -> str:
    """Share of intervals that hold the true area; prompts alone, in matched pairs, in families of two of one class."""
    import torch
    from scipy.stats import norm

    from mechlens.methods.probing.auroc import auroc_bounds

    columns = ("families", "true AUROC", "prompts of a class", "intervals that hold it", "that lie above it")
    lines = [readme_table.head(columns)]
    generator = torch.Generator().manual_seed(0)
    for design in ("alone", "pairs", "two of a class"):
        for area in (0.5, 0.7, 0.9, 0.97):
            for n in (10, 20, 50):
                n_own = 2 * n if design == "two of a class" else n
                own = torch.randn(draws, 2 * n_own, generator=generator)
                number = torch.arange(2 * n_own)
                code = {"alone": number, "pairs": number % n_own, "two of a class": number // 2}[design]
                shared = torch.randn(draws, int(code.max()) + 1, generator=generator)[:, code]
                positive = number < n_own
                scores = 0.5**0.5 * (own + shared) + math.sqrt(2) * norm.ppf(area) * positive
                bounds = auroc_bounds(scores, positive, tuple(map(str, code.tolist())))
                held = float(((bounds.low <= area) & (area <= bounds.high)).double().mean())
                above = float((bounds.low > area).double().mean())
                lines.append(readme_table.row([design, area, n_own, f"{held:.1%}", f"{above:.1%}"]))
                print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="608 prompts and a refusal rate of 0.7 only")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    wanted = [cell for cell in cells() if not chosen.quick or cell[2:] == (608, 0.7)]
    made = coverage() if chosen.coverage else table(wanted, chosen.draws, chosen.jobs)
    if chosen.write:
        readme_table.write(__file__, "coverage" if chosen.coverage else "verdicts", made)


if __name__ == "__main__":
    main()
