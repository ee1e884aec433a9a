"""Worlds that the verdicts of `mechlens geometry` have to tell apart: one direction or more, turned or other."""

from collections.abc import Callable

import torch
from torch import Tensor

from mechlens.methods.geometry.similarity.in_place import representation_change
from mechlens.methods.geometry.subspaces.beyond_one import beyond_one_direction
from mechlens.studies.geometry.verdict import (
    BY_WORDS,
    NO_MORE,
    NOT_READ,
    ONE,
    OTHER,
    SAME,
    SUBSPACE,
    TURNED,
    ChangeVerdict,
    DimensionVerdict,
    change_verdict,
    dimension_verdict,
)

WIDTH, AXES = 48, 6
TILT = torch.linspace(3.0, 0.3, WIDTH, dtype=torch.float64)
"""Standard deviations of a representation that is far wider in some directions than in others."""

Draw = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Noise of 2n prompts, which of them are positive, a generator -> vectors, and those of the words."""


def _noise(like: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=draw, dtype=like.dtype)


def _shifted(values: Tensor, rows: Tensor, axis: int, by: float) -> Tensor:
    values = values.clone()
    values[rows, axis] += by
    return values


def _kinds(values: Tensor, positive: Tensor, draw: torch.Generator, by: float, first: int = 0) -> Tensor:
    """Every positive prompt is of one of some kinds, each with an axis of its own."""
    values, rows = values.clone(), positive.nonzero()[:, 0]
    values[rows, first + torch.randint(AXES, (len(rows),), generator=draw)] += by
    return values


def nothing(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """No difference."""
    return values, _noise(values, draw)


def one(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A shift along one axis."""
    return _shifted(values, positive, 0, 2.5), _noise(values, draw)


def tilted(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A shift that lies across wide and narrow axes, so that the mean difference isn't the best line."""
    shift = 2.5 * torch.eye(WIDTH, dtype=values.dtype)[[0, 20, 40]].sum(dim=0)
    return values * TILT + positive[:, None] * shift, _noise(values, draw)


def wider(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A shift along one axis, and positive prompts that are more diverse in every direction."""
    return _shifted(values * (1 + 0.6 * positive[:, None]), positive, 0, 3.0), _noise(values, draw)


def topics(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A shift along one axis; topics that both classes share have axes of their own."""
    return _kinds(_shifted(values, positive, 0, 2.5), positive | ~positive, draw, 5.0, 10), _noise(values, draw)


def kinds(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each kind of the concept has its own axis."""
    return _kinds(values, positive, draw, 6.0), _noise(values, draw)


def kinds_tilted(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same among axes that are far wider than others."""
    return _kinds(values * TILT, positive, draw, 12.0), _noise(values, draw)


def kinds_of_words(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each kind has its own axis, and the words have it just as well."""
    found = _kinds(values, positive, draw, 6.0)
    return found, found + 0.3 * _noise(values, draw)


SHAPES: dict[str, tuple[Draw, str]] = {
    "no difference": (nothing, NOT_READ),
    "one direction": (one, ONE),
    "one, across wide and narrow axes": (tilted, ONE),
    "one, and a wider class": (wider, ONE),
    "one, and topics that both classes have": (topics, ONE),
    "a direction for each of six kinds": (kinds, SUBSPACE),
    "the same among wide and narrow axes": (kinds_tilted, SUBSPACE),
    "the same, and the words have it too": (kinds_of_words, BY_WORDS),
}
"""A world, and the word that is right for it."""


def _of_kinds(by: float) -> Draw:
    """Kinds with an axis each, so many standard deviations away."""

    def made(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return _kinds(values, positive, draw, by), _noise(values, draw)

    return made


def _a_shift(by: float) -> Draw:
    """A shift along one axis, in standard deviations."""

    def made(values: Tensor, positive: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return _shifted(values, positive, 0, by), _noise(values, draw)

    return made


WEAK_SHAPES: dict[str, tuple[Draw, str]] = {
    "one direction, 0.5 deviations": (_a_shift(0.5), ONE),
    "one direction, 1 deviation": (_a_shift(1.0), ONE),
    "six kinds, 2 deviations": (_of_kinds(2.0), SUBSPACE),
    "six kinds, 3 deviations": (_of_kinds(3.0), SUBSPACE),
    "six kinds, 4 deviations": (_of_kinds(4.0), SUBSPACE),
}
"""Near what can be told at all; for the error rates alone."""


def planted_shape(world: Draw, seed: int, n: int, random: int = 3) -> DimensionVerdict:
    """The study's verdict on n prompts of each class."""
    draw = torch.Generator().manual_seed(seed)
    positive = torch.arange(2 * n) < n
    noise = torch.randn(2 * n, WIDTH, generator=draw, dtype=torch.float64)
    values, words = world(noise, positive, draw)
    families = [str(i) for i in range(2 * n)]
    found = beyond_one_direction(values, positive, families, random=random, seed=seed, words=words)
    return dimension_verdict("planted", found)


def _turn(draw: torch.Generator) -> Tensor:
    turn: Tensor = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)).Q
    return turn


PAIRS: dict[str, tuple[Callable[[Tensor, Tensor, torch.Generator], Tensor], str]] = {
    "the same with noise": (lambda values, words, draw: values + 0.5 * _noise(values, draw), SAME),
    "twice as long": (lambda values, words, draw: 2 * values, SAME),
    "turned, with noise": (lambda values, words, draw: (values + 0.5 * _noise(values, draw)) @ _turn(draw), TURNED),
    "units in another order": (lambda values, words, draw: values.roll(7, dims=1), TURNED),
    "unrelated": (lambda values, words, draw: _noise(values, draw) * TILT, OTHER),
    "unrelated but for the words": (lambda values, words, draw: words @ _turn(draw), NO_MORE),
}
"""How a second representation is made of the first and of the words, and the word that is right for it."""


def _noisy(by: float, *, turned: bool) -> Callable[[Tensor, Tensor, torch.Generator], Tensor]:
    def made(values: Tensor, words: Tensor, draw: torch.Generator) -> Tensor:
        noisy = values + by * _noise(values, draw) * TILT
        return noisy @ _turn(draw) if turned else noisy

    return made


WEAK_PAIRS: dict[str, tuple[Callable[[Tensor, Tensor, torch.Generator], Tensor], str]] = {
    "the same, a third of it noise": (_noisy(0.5, turned=False), SAME),
    "the same, two thirds of it noise": (_noisy(1.0, turned=False), SAME),
    "turned, a third of it noise": (_noisy(0.5, turned=True), TURNED),
    "turned, two thirds of it noise": (_noisy(1.0, turned=True), TURNED),
}
"""Noise as wide as what it hides; for the error rates alone."""


def planted_pair(name: str, seed: int, n: int) -> ChangeVerdict:
    """The study's verdict on 2n prompts in two models; the first holds the words and more."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randn(2 * n, WIDTH, generator=draw, dtype=torch.float64) * TILT
    share = 1.0 if name == "unrelated but for the words" else 0.5
    values = share * words + 0.5 * _noise(words, draw) * TILT
    other = {**PAIRS, **WEAK_PAIRS}[name][0](values, words, draw)
    return change_verdict("planted", representation_change(values, other, [str(i) for i in range(2 * n)], words))
