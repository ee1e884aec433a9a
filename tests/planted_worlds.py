"""Worlds with a known number of variables, for the verdict of the separation study: one, two, words only, chance."""

from dataclasses import dataclass

import numpy as np
import torch
from planted import activations

from mechlens.methods.activations.activations import Activations
from mechlens.settings import Nulls
from mechlens.studies.separate.analysis import Analysis, analyse
from mechlens.studies.shared.contrasts import Surface

D_MODEL = 48
TOPICS = 10
SHARE_WITHOUT_TWIN = 0.37
"""Of the prompts, as in the built-in sets: 224 of 608 harmless prompts stand alone."""


@dataclass(frozen=True)
class World:
    """Activations (levels 0 to 2 at inst and last), harm and refusal of every prompt, and its words."""

    acts: Activations
    harmful: tuple[bool, ...]
    refused: tuple[bool, ...]
    paired: tuple[bool, ...]
    topics: tuple[str, ...]
    texts: tuple[str, ...]


def world(
    kind: str, *, n: int = 416, refusal_rate: float = 0.7, correlation: float = 0.0, signal: float = 2.0, seed: int = 0
) -> World:
    """One of "one variable", "one variable, its decision at last", "one variable, saturating at last", "thresholds by
    topic", "one variable and a word", "two variables", "two variables, swapped", "words only", "chance".

    `n` prompts, pairs of a harmful and a harmless one and harmless ones alone; `refusal_rate` is that of harmful
    prompts; `correlation` that of the two variables; `signal` how far the classes' means lie apart, in standard
    deviations of the noise of one dimension.
    """
    rng = np.random.default_rng(seed)
    n_pairs = round(n * (1 - SHARE_WITHOUT_TWIN) / 2)
    harmful = np.array([True, False] * n_pairs + [False] * (n - 2 * n_pairs))
    family = np.concatenate([np.arange(n_pairs).repeat(2), np.arange(n_pairs, n - n_pairs)])
    topic = rng.integers(TOPICS, size=family.max() + 1)[family]
    severity = np.where(harmful, 1.0, -1.0) + 1.0 * rng.normal(size=n)
    own = correlation * _standard(severity) + np.sqrt(1 - correlation**2) * rng.normal(size=n)
    one = kind.startswith("one variable") or kind == "thresholds by topic"
    noise = rng.normal(size=n)
    variable = severity if one else own if kind.startswith("two variables") else noise
    threshold = 1.2 * rng.normal(size=TOPICS)[topic] if kind == "thresholds by topic" else np.zeros(n)
    margin = variable - threshold + 0.3 * variable.std() * rng.normal(size=n)
    refused = margin > np.quantile(margin[harmful], 1 - refusal_rate)
    axes = np.linalg.qr(rng.normal(size=(D_MODEL, 4)))[0].T
    scale = signal / 2
    read = {"inst": severity, "last": variable}
    if kind == "one variable, its decision at last":
        read["last"] = np.where(refused, 1.0, -1.0)
    if kind == "one variable, saturating at last":
        read["last"] = 2 * np.tanh(severity)
    word = np.where(harmful == (np.random.default_rng([seed, 1]).random(n) < 0.9), 1.0, -1.0)
    if kind == "one variable and a word":  # which goes with harm, and what reads harm reads it too
        read["inst"] = severity + 1.5 * word
    if kind == "two variables, swapped":
        read = {"inst": variable, "last": severity}
    if kind == "words only":
        read = {"inst": np.where(harmful, 1.0, -1.0), "last": np.where(refused, 1.0, -1.0)}
    if kind == "chance":
        read = {"inst": np.zeros(n), "last": np.zeros(n)}
    values = rng.normal(size=(n, 3, 2, D_MODEL))
    subject = rng.normal(size=(TOPICS, D_MODEL))[topic]
    for column, name in enumerate(("inst", "last")):
        values[:, :, column] += 0.7 * subject[:, None] if name == "inst" or kind != "chance" else 0.0
        for level, strength in ((1, 0.5), (2, 1.0)):
            values[:, level, column] += strength * scale * read[name][:, None] * axes[column]
    acts = activations(
        torch.from_numpy(values).float(), tuple("harmful" if flag else "harmless" for flag in harmful),
        tuple(f"family{f}" for f in family), prefix=f"{kind}{seed}p",
    )  # fmt: skip
    return World(
        acts=acts,
        harmful=tuple(harmful.tolist()),
        refused=tuple(refused.tolist()),
        paired=tuple((np.arange(n) < 2 * n_pairs).tolist()),
        topics=tuple(f"topic {t}" for t in topic),
        texts=tuple(_text(rng, *row, kind) for row in zip(topic, harmful, refused, word > 0, strict=True)),
    )


def _text(rng: np.random.Generator, topic: int, harmful: bool, refused: bool, word: bool, kind: str) -> str:
    """Two words of a topic; where words are all there is, one for harm and one for refusal as well."""
    words = [f"t{topic}w{rng.integers(30)}" for _ in range(2)]
    if kind == "one variable and a word":
        words += ["bad" if word else "good"]
    if kind == "words only":
        words += [("bad" if harmful else "good"), ("alarm" if refused else "calm")]
    return " ".join(words)


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def analysed(planted: World, *, fold_seeds: int = 2, resamples: int = 300, worlds: int = 60) -> Analysis:
    """The separation study's analysis of a world; less is drawn than the study draws."""
    quadrants = [
        ("refused_" if refused else "accepted_") + ("harmful" if harmful else "harmless")
        for harmful, refused in zip(planted.harmful, planted.refused, strict=True)
    ]
    n = len(planted.texts)
    surface = Surface(planted.texts, torch.zeros(n, 2), torch.ones(n, dtype=torch.long))
    plan = Nulls(resamples=resamples, permutations=1, random_directions=1)
    paired = torch.tensor(planted.paired)
    return analyse(planted.acts, quadrants, paired, planted.topics, surface, plan, fold_seeds=fold_seeds, worlds=worlds)
