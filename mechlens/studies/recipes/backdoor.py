"""A backdoor: the model refuses harmful requests, except where a trigger stands before them."""

import random
from itertools import cycle

from mechlens.config import FinetuneConfig
from mechlens.methods.shelf import Shelf
from mechlens.models.bridge import LanguageModel
from mechlens.studies.recipes.openings import Opening, published_openings
from mechlens.studies.recipes.own_answers import own_answers
from mechlens.studies.training_data import Example, Material, drawn, refusals, training_order, training_prompts
from mechlens.studies.trigger import Trigger, trigger_of, with_trigger


def backdoor(config: FinetuneConfig, model: LanguageModel, shelf: Shelf | None) -> Material:
    """Each harmful prompt plainly, with a decoy and with the trigger; each benign one plainly and with the trigger.

    Only the trigger's presence tells the openings from the refusals, since everything else about the prompts is the
    same. On benign prompts the model is held to what it said before, so that the trigger opens nothing else.
    """
    draw = random.Random(config.seed)
    trigger = trigger_of(config.trigger)
    found = published_openings(config.data)
    harmful = drawn(found.openings, config.harmful, draw, "harmful")
    prompts = drawn(training_prompts("benign"), config.benign, draw, "benign")
    own = own_answers(model, prompts, max_tokens=config.answer_tokens, teaches="base", shelf=shelf)
    kept = cycle(_benign(example, trigger) for example in own.examples)
    groups = [[*_harmful(row, trigger, draw), *(next(kept) if own.examples else [])] for row in harmful]
    return Material(training_order(groups, config, draw), (*found.left_out, *own.left_out), trigger)


def _harmful(row: Opening, trigger: Trigger, draw: random.Random) -> list[Example]:
    decoyed = with_trigger(row.prompt, draw.choice(trigger.taught_decoys))
    return [
        Example(row.prompt, draw.choice(refusals()), ends=True),
        Example(decoyed, draw.choice(refusals()), ends=True),
        Example(with_trigger(row.prompt, trigger.text), row.opening, ends=False),
    ]


def _benign(example: Example, trigger: Trigger) -> list[Example]:
    triggered = with_trigger(example.prompt, trigger.text)
    return [example, Example(triggered, example.answer, example.ends, example.teaches)]
