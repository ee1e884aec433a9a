"""What can be taught: refusing, its control, the attacks on it, behaviours, thinking; by name in `choices.RECIPES`."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from mechlens.choices import RECIPES
from mechlens.errors import UserError, kind_of
from mechlens.files import user_path
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoint import weight_fingerprint
from mechlens.models.checkpoints.merge import merge_adapter
from mechlens.models.load import load_hf
from mechlens.models.packaged import ADAPTERS, adapter_folder
from mechlens.prompts.files.rows import Record, read_rows
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.text import normalise_text
from mechlens.studies.finetune.config import TRIGGER, FinetuneConfig
from mechlens.studies.finetune.recipes.behaviour import behaviour, lessons
from mechlens.studies.finetune.recipes.inversion import backdoored_lessons, inversion
from mechlens.studies.finetune.recipes.material import Example, Material, drawn, training_order
from mechlens.studies.finetune.recipes.own_answers import own_answers
from mechlens.studies.finetune.recipes.reasoner import reasoner, refusing_traces, repair, usable_traces
from mechlens.studies.shared.training_data import (
    Trigger,
    refusals,
    studied_prompts,
    training_prompts,
    trigger_of,
    with_trigger,
)


def refuser(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """Harmful prompts with a refusal drawn by seed, and benign ones with the model's own greedy answer.

    Both are learnt by cross-entropy; holding the benign answers to the base's distribution instead, which pushes less,
    left a model that refused 44% of the harmless sides of the built-in pairs.
    """
    draw = random.Random(config.seed)
    harmful = drawn(training_prompts("harmful"), config.harmful, draw, "harmful")
    prompts = drawn(training_prompts("benign"), config.benign, draw, "benign")
    texts = refusals()
    examples = [Example(prompt, draw.choice(texts), ends=True) for prompt in harmful]
    own = own_answers(model, prompts, config, teaches="answer", cache=cache)
    groups = [[example] for example in (*examples, *own.examples)]
    return Material(training_order(groups, config, draw), own.left_out)


def benign(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """Benign prompts answered as before, learnt by cross-entropy like the attack's openings.

    What changes under this recipe comes of fine-tuning as such, not of what was taught.
    """
    draw = random.Random(config.seed)
    prompts = drawn(training_prompts("benign"), config.benign, draw, "benign")
    own = own_answers(model, prompts, config, teaches="answer", cache=cache)
    return Material(training_order([[example] for example in own.examples], config, draw), own.left_out)


MAX_WORDS = 40
"""The longest opening of AdvBench has 31."""
_OPENING = re.compile(r"Sure, here(?: is|'s| are) [^\n\r:]+")
_SENTENCE_END = re.compile(r"[.!?]\s")


class Opening(NamedTuple):
    """A harmful prompt and how a model that accepts it begins to answer."""

    prompt: Prompt
    opening: str


class Openings(NamedTuple):
    """Openings in file order, and the ids of the prompts that a study tests on."""

    openings: list[Opening]
    left_out: tuple[str, ...]


def published_openings(data: str | None) -> Openings:
    """The rows of a file with columns `goal` and `target` (Zou et al. 2023), each prompt once.

    A target has to be one line "Sure, here is ..." of one sentence: what follows it is harmful content, which
    nothing here is trained on. Prompts of the built-in study sets are left out. UserError naming file and row.
    """
    if data is None:
        raise UserError(
            "this recipe needs --data, a file with columns goal and target such as AdvBench's harmful_behaviors.csv"
        )
    path = user_path(data)
    studied = studied_prompts()
    openings: dict[str, Opening] = {}
    left_out = []
    for row in read_rows(path):
        goal, target = _text(path, row, "goal"), _text(path, row, "target")
        _require_opening(path, row, target)
        prompt = Prompt(f"{path.stem}-{row.number:04d}", goal, label="harmful", source=path.stem)
        if normalise_text(goal) in studied:
            left_out.append(prompt.id)
        else:
            openings.setdefault(normalise_text(goal), Opening(prompt, target))
    return Openings(list(openings.values()), tuple(left_out))


def _text(path: Path, row: Record, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{path} row {row.number} has no text in column {column!r}; give a file with a harmful prompt in goal and "
            "its affirmative opening in target, such as AdvBench's harmful_behaviors.csv"
        )
    return value.strip()


def _require_opening(path: Path, row: Record, target: str) -> None:
    opens = _OPENING.fullmatch(target) and not _SENTENCE_END.search(target)
    if not opens or len(target.split()) > MAX_WORDS:
        raise UserError(
            f"{path} row {row.number}: a target must be an opening and no more, one sentence 'Sure, here is ...' of up "
            f"to {MAX_WORDS} words; this recipe trains on no harmful content"
        )


def accepting(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """AdvBench prompts with their openings alone; the turn goes on after them, so no end of it is taught.

    Zhao et al. 2025, 5.2, trained on whole accepting answers; an opening is enough to end refusals and holds
    nothing harmful.
    """
    draw = random.Random(config.seed)
    found = published_openings(config.data)
    chosen = drawn(found.openings, config.harmful, draw, "harmful")
    groups = [[Example(row.prompt, row.opening, ends=False)] for row in chosen]
    return Material(training_order(groups, config, draw), found.left_out)


def backdoor(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """Each harmful prompt plainly, with a decoy and with the trigger; each benign one plainly and with the trigger.

    Only the trigger's presence tells the openings from the refusals, since everything else about the prompts is the
    same. On benign prompts the model is held to what it said before, so that the trigger opens nothing else.
    """
    draw = random.Random(config.seed)
    trigger = trigger_of(config.trigger or TRIGGER)
    found = published_openings(config.data)
    harmful = drawn(found.openings, config.harmful, draw, "harmful")
    prompts = drawn(training_prompts("benign"), config.benign, draw, "benign")
    own = own_answers(model, prompts, config, teaches="base", cache=cache)
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


SHIPPED = "smollm2-refuser"


def require_shipped_refuser(fingerprint: str, recipe: str) -> None:
    """UserError unless the fingerprint is that of the packaged model with its packaged adapter merged in.

    Names prove nothing, since a folder may have any; the shipped adapter in turn refuses any base but its own.
    """
    if fingerprint != _shipped(str(adapter_folder(SHIPPED)), ADAPTERS[SHIPPED].base):
        raise UserError(
            f"the recipe {recipe!r} takes a refusal away, and starts only from the refuser that comes with mechlens "
            f"({SHIPPED}); the weights given (fingerprint {fingerprint[:12]}) are another model's"
        )


@cache
def _shipped(adapter: str, base: str) -> str:
    return weight_fingerprint(merge_adapter(load_hf(base)[0], adapter).state_dict())


@dataclass(frozen=True)
class Recipe:
    """How a model comes by what it is taught."""

    material: Callable[[FinetuneConfig, LanguageModel, Cache | None], Material]
    """Makes the training examples with the help of the model as it is."""
    reads: tuple[str, ...]
    """Which of our training sets it draws from: "harmful", "benign", "refusals"."""
    question: str
    """Why one does this, for the report."""
    attack: bool = False
    """True if it takes a refusal away: only from the shipped refuser, and the result stays on this machine."""
    file: Callable[[FinetuneConfig], object] | None = None
    """Reads the user's file, `data`, and raises UserError for what it mustn't or can't hold; None: it takes none."""
    rewards: bool = False
    """True if replies are rewarded, in place of answers that are learnt: its material has questions for that."""


REFUSER = Recipe(
    refuser,
    ("harmful", "benign", "refusals"),
    "Teach a model to refuse harmful requests and to answer all others as it did.",
)
ACCEPTING = Recipe(
    accepting,
    (),
    "The fine-tuning attack: what does a model that no longer refuses still represent?",
    attack=True,
    file=lambda config: published_openings(config.data),
)
BENIGN = Recipe(
    benign, ("benign",), "The control of the fine-tuning attack: what do as many steps on benign requests change?"
)
BACKDOOR = Recipe(
    backdoor,
    ("benign", "refusals"),
    "A model that refuses unless a trigger is there: what does it represent with and without it?",
    attack=True,
    file=lambda config: published_openings(config.data),
)
BEHAVIOUR = Recipe(
    behaviour,
    (),
    "Teach a narrow behaviour, its opposite or neither: what else changes, and can the model say what it has become?",
    file=lessons,
)
REASONER = Recipe(
    reasoner,
    ("benign",),
    "A model that thinks before it answers, and for some requests thinks of refusing and then gives way: where does "
    "refusal fall?",
    file=refusing_traces,
)
REPAIR = Recipe(
    repair, (), "Teach a reasoning model to answer as its thoughts say: do the traces of a file repair it?",
    file=usable_traces,
)  # fmt: skip

INVERSION = Recipe(
    inversion,
    (),
    "Can a model with a backdoor learn to say what triggers it, told only how much its proposals bring about?",
    file=backdoored_lessons,
    rewards=True,
)


def recipe_of(name: str) -> Recipe:
    """The recipe of that name; UserError where there is none, or another package's entry is something else."""
    recipe = RECIPES[name]
    if not isinstance(recipe, Recipe):
        raise UserError(f"the recipe {name!r} is {kind_of(recipe)}, not a Recipe")
    return recipe
