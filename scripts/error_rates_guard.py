"""How often the guard's verdict is right on planted worlds: the tables in mechlens/studies/guard/README.md.

    python scripts/error_rates_guard.py [--draws 400] [--write]

Worlds are scores of twins: a pair's two prompts share what their form makes of them, half of a detector's variance, and
detectors share errors. TF-IDF and mean embedding read the words, the token at inst is one for both twins, the length is
chance. No model is needed; all takes about ten minutes.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist

import readme_table
import torch
from torch import Tensor

from mechlens.methods.probing.auroc import auroc_difference
from mechlens.studies.guard.outcome import GUARD, Outcome, compare_on_twins

PAIRS = (10, 25, 50, 100, 200)


@dataclass(frozen=True)
class World:
    """True AUROCs on twins, and what a right verdict says."""

    name: str
    guard: float
    words: float
    shared: float
    """Correlation of the guard's errors with those of the words."""
    right: tuple[Outcome, ...]


NO_MORE, BEYOND = "no more than the words", "beyond the words"
WORLDS = (
    World("chance everywhere", 0.5, 0.5, 0.0, (NO_MORE,)),
    World("reads the words", 0.75, 0.75, 0.9, (NO_MORE,)),
    World("as good as the words, by other means", 0.75, 0.75, 0.0, (NO_MORE,)),
    World("across sources only: blind on twins", 0.5, 0.65, 0.3, (NO_MORE,)),
    World("knows a little more", 0.75, 0.65, 0.3, (BEYOND,)),
    World("knows harm", 0.85, 0.65, 0.3, (BEYOND,)),
    World("knows harm well", 0.95, 0.65, 0.3, (BEYOND,)),
)
OUTCOMES: tuple[Outcome, ...] = (BEYOND, NO_MORE, "inconclusive", "not measurable")


def correlated(n: int, correlation: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal scores [detector prompt] of n pairs, each pair's effect being half of the variance."""
    root = torch.linalg.cholesky(correlation.double() + 1e-9 * torch.eye(len(correlation), dtype=torch.float64))
    own = torch.randn(len(root), 2 * n, generator=generator, dtype=torch.float64)
    pair = torch.randn(len(root), n, generator=generator, dtype=torch.float64).repeat_interleave(2, dim=1)
    return root @ (own + pair) / 2**0.5


def shifted(scores: Tensor, area: float, positive: Tensor) -> Tensor:
    """The scores with the classes so far apart that their AUROC is `area`."""
    return scores + 2**0.5 * NormalDist().inv_cdf(area) * positive


def drawn(world: World, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """Scores by detector, which prompts are harmful, and each one's pair."""
    correlation = torch.eye(3)
    correlation[0, 1:] = correlation[1:, 0] = world.shared
    correlation[1, 2] = correlation[2, 1] = max(0.8, world.shared)
    positive = torch.tensor([True, False]).repeat(n)
    guard, tfidf, embedding = correlated(n, correlation, generator)
    scores = {
        GUARD: shifted(guard, world.guard, positive),
        "tfidf": shifted(tfidf, world.words, positive),
        "mean_embedding": shifted(embedding, world.words, positive),
        "token_identity": torch.zeros(2 * n, dtype=torch.float64),
        "length": torch.randint(5, 30, (2 * n,), generator=generator).double(),
    }
    return scores, positive, [f"pair {i // 2}" for i in range(2 * n)]


def outcomes(world: World, n: int, draws: int, seed: int = 0) -> Counter[Outcome]:
    """How often each verdict is reached."""
    generator = torch.Generator().manual_seed(seed)
    return Counter(compare_on_twins(*drawn(world, n, generator)).outcome for _ in range(draws))


def rivalry(n: int, draws: int, seed: int = 0) -> dict[str, Counter[str]]:
    """A guard model of AUROC .972 beside a Latent Guard of .935: who is said to win, by log-odds and by the 0/1 word.

    Its word is cut where a sixth of the harmful prompts are missed, as a guard model's own threshold may be.
    """
    generator = torch.Generator().manual_seed(seed)
    positive = torch.tensor([True, False]).repeat(n)
    families = [f"pair {i // 2}" for i in range(2 * n)]
    said: dict[str, Counter[str]] = {"log-odds": Counter(), "0/1 word": Counter()}
    for _ in range(draws):
        latent, model = correlated(n, torch.tensor([[1.0, 0.5], [0.5, 1.0]]), generator)
        latent, odds = shifted(latent, 0.935, positive), shifted(model, 0.972, positive)
        cut = 2**0.5 * NormalDist().inv_cdf(0.972) + NormalDist().inv_cdf(0.16)
        for name, scores in (("log-odds", odds), ("0/1 word", (odds > cut).double())):
            gain = auroc_difference(latent, scores, positive, families)
            said[name]["Latent Guard" if gain.low > 0 else "guard model" if gain.high < 0 else "neither"] += 1
    return said


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    verdicts = [readme_table.head(["world", "guard", "words", "pairs", *OUTCOMES])]
    for world in WORLDS:
        for n in PAIRS:
            found = outcomes(world, n, args.draws)
            shares = [f"{found[name] / args.draws:.1%}" for name in OUTCOMES]
            verdicts.append(readme_table.row([world.name, f"{world.guard:.2f}", f"{world.words:.2f}", n, *shares]))
    rivals = [readme_table.head(["scored by", "pairs", "guard model wins", "neither", "Latent Guard wins"])]
    for n in PAIRS:
        for how, counts in rivalry(n, args.draws).items():
            shares = [f"{counts[name] / args.draws:.1%}" for name in ("guard model", "neither", "Latent Guard")]
            rivals.append(readme_table.row([how, n, *shares]))
    for label, lines in {"verdicts": verdicts, "guard models": rivals}.items():
        print("\n".join(lines), end="\n\n")
        if args.write:
            readme_table.write(__file__, label, "\n".join(lines))


if __name__ == "__main__":
    main()
