"""Which prompts train, choose and test: parts that no prompt family straddles."""

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mechlens.errors import UserError
from mechlens.settings import FRACTIONS, SEED

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, repr=False)
class Split:
    """Indices of the prompts in each part, ascending, with what made them.

    Directions are fitted on `train`; levels, positions, strengths and thresholds are chosen on
    `validation`; numbers are reported once, on `test`.

    >>> labels, families = ["up", "down"] * 10, [str(i // 2) for i in range(20)]
    >>> split = ml.split_by_family(labels, families, fractions=(0.5, 0.2, 0.3), seed=0)
    >>> len(split.train), len(split.validation), len(split.test)
    (10, 4, 6)
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    fractions: tuple[float, float, float]
    """Share of the families in each part, as asked for."""
    seed: int

    def part(self, name: str) -> tuple[int, ...]:
        """The indices of the part called "train", "validation" or "test"."""
        if name not in PARTS:
            raise UserError(f"there is no part {name!r} in a split; the parts are {list(PARTS)}")
        indices: tuple[int, ...] = getattr(self, name)
        return indices

    def parts(self) -> list[str]:
        """The part of each prompt, by number."""
        part = {i: name for name in PARTS for i in self.part(name)}
        return [part[i] for i in range(len(part))]

    @property
    def sizes(self) -> str:
        """How many prompts are in each part, in words."""
        return f"{len(self.train)} training, {len(self.validation)} validation, {len(self.test)} test"

    def __repr__(self) -> str:
        return f"Split({self.sizes} prompts; seed {self.seed})"


def families_by_classes(labels: Sequence[str], families: Sequence[str]) -> dict[tuple[str, ...], list[str]]:
    """The families that hold the same set of labels, for each such set; both in order of first sight.

    A matched pair holds both labels and a lone prompt one: keeping the number of families in every
    group keeps every class.
    """
    if len(labels) != len(families):
        raise UserError(f"got {len(labels)} labels for {len(families)} families; give one of each a prompt")
    held: dict[str, set[str]] = {}
    for label, family in zip(labels, families, strict=True):
        held.setdefault(family, set()).add(label)
    groups: dict[tuple[str, ...], list[str]] = {}
    for family, classes in held.items():
        groups.setdefault(tuple(sorted(classes)), []).append(family)
    return groups


def families_of_each(labels: Sequence[Hashable], families: Sequence[str]) -> Counter[Hashable]:
    """How many families hold each label; 0 for one that is not there."""
    return Counter(label for label, _ in set(zip(labels, families, strict=True)))


def split_by_family(
    labels: Sequence[str],
    families: Sequence[str],
    *,
    fractions: tuple[float, float, float] = FRACTIONS,
    seed: int = SEED,
) -> Split:
    """A seeded split that keeps families whole and every class in every part.

    `fractions` are shares of the families for train, validation and test; they sum to 1, and a part
    with share 0 stays empty. Families with the same set of labels are shared out together.
    UserError: fractions that are no shares, or a class that is missing from a part.

    >>> labels, families = ["up", "down"] * 10, [str(i // 2) for i in range(20)]
    >>> split = ml.split_by_family(labels, families, fractions=(0.5, 0.2, 0.3), seed=0)
    >>> len(split.train), len(split.validation), len(split.test)
    (10, 4, 6)
    """
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise UserError(f"the split fractions are {fractions}; give three shares from 0 to 1 that sum to 1")
    shuffler = random.Random(seed)
    part_of: dict[str, str] = {}
    for group in families_by_classes(labels, families).values():
        shuffled = shuffler.sample(group, len(group))
        sizes = _sizes(len(group), fractions)
        names = [name for name, size in zip(PARTS, sizes, strict=True) for _ in range(size)]
        part_of.update(zip(shuffled, names, strict=True))
    parts = {name: tuple(i for i, family in enumerate(families) if part_of[family] == name) for name in PARTS}
    _require_classes(parts, labels, fractions)
    return Split(**parts, fractions=fractions, seed=seed)


def _sizes(n_families: int, fractions: tuple[float, float, float]) -> list[int]:
    """Whole numbers of families nearest to the shares (largest remainder), none empty if it can be helped."""
    exact = [share * n_families for share in fractions]
    # The small constant keeps a share such as 0.3 * 10 = 2.9999... from losing a family.
    sizes = [math.floor(x + 1e-9) for x in exact]
    by_remainder = sorted(range(3), key=lambda k: sizes[k] - exact[k])
    for k in by_remainder[: n_families - sum(sizes)]:
        sizes[k] += 1
    for k in range(3):
        richest = max(range(3), key=lambda j: sizes[j])
        if fractions[k] > 0 and sizes[k] == 0 and sizes[richest] > 1:
            sizes[richest] -= 1
            sizes[k] += 1
    return sizes


def _require_classes(
    parts: dict[str, tuple[int, ...]], labels: Sequence[str], fractions: tuple[float, float, float]
) -> None:
    """UserError with all counts unless every class is in every part that was asked for."""
    counts = {name: Counter(labels[i] for i in parts[name]) for name in PARTS}
    for name, share in zip(PARTS, fractions, strict=True):
        for label in sorted(set(labels)):
            if share > 0 and not counts[name][label]:
                found = "; ".join(
                    f"{part}: " + ", ".join(f"{counts[part][c]} {c!r}" for c in sorted(set(labels))) for part in PARTS
                )
                raise UserError(
                    f"the {name} part has no prompt labelled {label!r} ({found}); every part needs every "
                    "class, so add prompt families of that class or change the fractions"
                )
