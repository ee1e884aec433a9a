"""What a recipe trains on: examples, drawn and put in order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

from mechlens.errors import UserError
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import Twin
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.shared.training_data import Trigger

Row = TypeVar("Row")


@dataclass(frozen=True)
class Example:
    """One request and the answer that the model is trained to give."""

    prompt: Prompt
    answer: str
    ends: bool
    """True if the answer is whole, so that the end of the turn is learnt too; False where it was cut off."""
    teaches: Literal["answer", "base"] = "answer"
    """Whether the answer is to be learnt, or is where the model should go on saying what its base says."""
    thinking: str = ""
    """What is thought before the answer, and learnt with it; empty where nothing is."""


@dataclass(frozen=True)
class Material:
    """Everything that one recipe trains on, in training order."""

    examples: tuple[Example, ...]
    left_out: tuple[str, ...]
    """Ids of prompts that weren't fit to train on, such as benign ones that the model refuses."""
    trigger: Trigger | None = None
    """What the behaviour hangs on, in a model with a backdoor."""
    asked: tuple[Prompt, ...] = ()
    """Prompts that the examples have in another form only, such as with a trigger, so that a study knows them."""
    rewarded: tuple[Twin, ...] = ()
    """Questions on which the model's replies to the examples are rewarded; none where their answers are learnt."""


def drawn(rows: list[Row], wanted: int | None, draw: random.Random, kind: str) -> list[Row]:
    """As many of the rows as are wanted, by chance; all of them, in their order, for None."""
    if wanted is None:
        return rows
    if wanted > len(rows):
        raise UserError(f"{wanted} {kind} training prompts were asked for, and there are {len(rows)}")
    return draw.sample(rows, wanted)


def training_order(
    groups: Sequence[Sequence[Example]], config: FinetuneConfig, draw: random.Random
) -> tuple[Example, ...]:
    """Every group of examples once a pass, each pass in an order of its own, to the number of steps asked for."""
    size = sum(len(group) for group in groups)
    wanted = size * config.epochs if config.steps is None else config.steps * config.batch_size
    passes = -(-wanted // size) if size else 0
    order = (example for _ in range(passes) for group in draw.sample(groups, len(groups)) for example in group)
    return tuple(islice(order, wanted))
