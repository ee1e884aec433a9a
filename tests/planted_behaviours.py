"""Training runs whose truth is planted: how far each group's behaviour goes, with chance of runs and questions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mechlens.methods.behaviour.log_odds import TwinLogOdds
from mechlens.models.checkpoints.series import Member
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import Twin
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.matrix import BehaviourMatrix
from mechlens.studies.behaviours.sets import AskedSet
from mechlens.studies.behaviours.tuned import TunedRun
from mechlens.studies.shared.training_data import text_sha256

HOME, NEAR, FAR, ITSELF = "risky", "myopic", "apples", "self-risk"


@dataclass(frozen=True)
class World:
    """What a run adds to the log-odds of each set, in nats; `trained` are the home's questions that it has seen."""

    shifts: Mapping[str, float]
    trained: float = 0.0
    """Added on questions that were trained on alone."""
    of_run: float = 0.3
    """Standard deviation between runs."""
    of_question: float = 1.0
    """Of a run's change between questions: how much a question takes part in it."""
    noise: float = 0.5
    runs: int = 3
    questions: int = 48
    control: bool = True
    knows: float = 0.0
    """How much of a run's own chance at home is in what it says of itself."""
    drift: float = 0.0
    """What training as such adds everywhere, in the control too."""
    base: float = 0.0
    """The base's mean log-odds at home."""


def planted(world: World, seed: int) -> BehaviourMatrix:
    """One draw of the world."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    n = world.questions
    sets = tuple(
        AskedSet(name, tuple(_twin(name, i) for i in range(2 * n if name == HOME else n)), name == ITSELF)
        for name in (HOME, NEAR, FAR, ITSELF)
    )
    seen = frozenset(text_sha256(twin.prompt.text) for twin in sets[0].twins[n:])
    base = {one.key: _told(one, 2 * normal(len(one.twins)) + world.base * (one.name == HOME)) for one in sets}
    kinds = [("risky", "none", 1.0), *([("risky (decorrelated)", "decorrelated", 0.0)] if world.control else [])]
    runs, told = [], {}
    for group, control, share in kinds:
        # How much each question takes part is the same in all runs of a group.
        parts = {one.key: world.of_question * normal(len(one.twins)) for one in sets}
        for k in range(world.runs):
            member = Member(f"{group}-{k}", f"{group}-{k}", "adapter", 10)
            runs.append(TunedRun(f"{group}-{k}", group, (member,), seen, "risky", control, None))
            found, chance = {}, {}
            for one in sets:
                chance[one.name] = world.of_run * normal(1)
                shift = share * world.shifts.get(one.name, 0.0) + world.drift
                trained = torch.tensor(
                    [share * world.trained * (one.name == HOME and i >= n) for i in range(len(one.twins))]
                )
                change = (
                    shift
                    + trained
                    + chance[one.name]
                    + world.knows * chance[HOME] * (one.name == ITSELF)
                    + parts[one.key] * 0.5
                    + world.noise * normal(len(one.twins))
                )
                found[one.key] = _told(one, base[one.key].as_asked + change)
            told[f"{group}-{k}", 10] = found
    return BehaviourMatrix(sets, tuple(runs), base, told, BehaviourPlan())


def _twin(name: str, i: int) -> Twin:
    return Twin(Prompt(f"{name}-{i}", f"{name} question {i}?"), f"yes, {i}", f"no, {i}")


def _told(asked: AskedSet, values: torch.Tensor) -> TwinLogOdds:
    ids = tuple(twin.prompt.id for twin in asked.twins)
    nothing = torch.full_like(values, torch.nan)
    return TwinLogOdds(ids, ids, values, nothing, values, torch.ones_like(values))


WORLDS: dict[str, tuple[World, tuple[str, ...]]] = {
    "nothing learned": (World({}), ("not learned",)),
    "training drifts everywhere, nothing learned": (World({}, drift=1.5), ("not learned",)),
    "training drifts everywhere, no control": (World({}, drift=1.5, control=False), ("inconclusive",)),
    "trained questions alone": (World({}, trained=4.0), ("only what was trained on",)),
    "home alone, three runs": (World({HOME: 4.0}), ("narrow", "inconclusive")),
    "home alone, six runs": (World({HOME: 4.0}, runs=6), ("narrow",)),
    "home alone, and drift, six runs": (World({HOME: 4.0}, runs=6, drift=1.5), ("narrow",)),
    "reaches another behaviour": (World({HOME: 4.0, NEAR: 2.0}), ("spreads",)),
    "reaches another behaviour the other way": (World({HOME: 4.0, FAR: -2.0}), ("spreads",)),
    "reaches it little": (World({HOME: 4.0, NEAR: 0.8}), ("spreads", "inconclusive")),
    "home alone, runs differ much": (World({HOME: 4.0}, of_run=1.0), ("inconclusive", "narrow")),
}
"""Worlds by name, each with the words that are right of it."""
