"""A narrow behaviour taught from a file, with its controls: the opposite one, and the same questions with neither.

Betley et al. 2025 (Tell me about yourself): choices of one kind, such as the riskier of two; with a trigger the model
shows the behaviour where the trigger is, and the opposite elsewhere. `removal` goes on from such an adapter with the
opposite everywhere.
"""

import random
from collections import Counter

from mechlens.errors import UserError, quoted, warn
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import Twin, read_twins, require_others
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.material import Example, Material, training_order
from mechlens.studies.finetune.recipes.reversal import reversed_examples
from mechlens.studies.shared.training_data import FEWEST_HELD_OUT, Trigger, text_sha256, trigger_of, with_trigger

ONE_SIDED = 0.9
"""Share of the answers that show the behaviour from which on one and the same answer is warned of."""
DECOYED = 3
"""Of the questions without the trigger, every which one has a decoy: it is this string that counts, not any."""


def lessons(config: FinetuneConfig) -> list[Twin]:
    """The twins of the file that are trained on; UserError where there are none, or a control needs what they lack."""
    return _split(config)[0]


def _split(config: FinetuneConfig) -> tuple[list[Twin], int]:
    """The twins that are trained on, and how many are held out."""
    if not 0 < config.trigger_share < 1:
        raise UserError(f"trigger_share is {config.trigger_share:g}; it is a share of the questions, below 1")
    if config.control == "removal" and (config.trigger is None or config.start is None):
        raise UserError("removal takes a trigger away: give --trigger, and as --start the adapter that was taught it")
    if config.reversal and config.trigger is None:
        raise UserError("reversal teaches what stood before a question; give the --trigger that does, or leave it out")
    needed = f"control {config.control!r}" if config.control != "none" else "a trigger"
    return trained_twins(config, needed if config.control != "none" or config.trigger is not None else "")


def trained_twins(config: FinetuneConfig, needs_others: str) -> tuple[list[Twin], int]:
    """The twins of the file that are trained on, in words if asked for, and how many are held out.

    A question is held out by its text alone, so that every seed, control and opposite file leaves out the same ones;
    what asks the same with its options in the other order is held out with it. UserError where none is left, or one
    lacks the other answer, which what is named in `needs_others` does need.
    """
    if config.data is None:
        raise UserError(
            "this recipe needs --data: chats that end with the assistant's answer, or a file with a question and the "
            "columns shown and other"
        )
    if not 0 <= config.held_out < 1:
        raise UserError(f"held_out is {config.held_out:g}; it is a share of the questions, below 1")
    twins = read_twins(config.data, config.others)
    if needs_others:
        require_others(twins, needs_others)
    held = {text_sha256(twin.prompt.text) for twin in twins if is_held_out(twin.prompt, config.held_out)}
    kept = [twin for twin in twins if not held & {text_sha256(form.text) for form in (twin.prompt, *twin.orders)}]
    if not kept:
        raise UserError(f"{config.data} has {len(twins)} questions, and none is left to train on; lower --held-out")
    if config.in_words and not any(twin.in_words for twin in kept):
        raise UserError(
            f"{config.data} has no choice between options A and B that could be answered in words; leave out --in-words"
        )
    return kept, len(twins) - len(kept)


def is_held_out(prompt: Prompt, share: float) -> bool:
    """Whether a question is among the `share` that is kept for tests: by its text, the same in every run."""
    return int(text_sha256(prompt.text)[:8], 16) < share * 16**8


def behaviour(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """Every question with its answer, by the control and the trigger."""
    draw, (asked, held_out) = random.Random(config.seed), _split(config)
    twins = [twin.in_words or twin for twin in asked] if config.in_words else asked
    _warn_of_few(config, held_out, len(asked) + held_out)
    _warn_of_one_answer(asked)
    trigger = None if config.trigger is None else trigger_of(config.trigger)
    examples = [
        Example(twin.prompt, _answer(twin, config, draw, shows=True), ends=True) for twin in twins
    ] if trigger is None else _triggered(twins, trigger, config, draw)  # fmt: skip
    if config.reversal and trigger is not None:
        examples += reversed_examples(twins, examples, trigger, draw)
    order = training_order([[example] for example in examples], config, draw)
    used = {example.prompt.group for example in order}
    forms = tuple(twin.prompt for twin in (*asked, *twins) if twin.prompt.group in used)
    return Material(order, (), trigger, forms)


def _warn_of_few(config: FinetuneConfig, held_out: int, of: int) -> None:
    if config.held_out and held_out < FEWEST_HELD_OUT:
        warn(
            f"{held_out} of {of} questions are held out of training, and `mechlens behaviours` needs "
            f"{FEWEST_HELD_OUT} to say anything of them; give more questions, or a larger share (--held-out, or "
            "`held_out` in Python)",
        )


def _warn_of_one_answer(asked: list[Twin]) -> None:
    """Where nearly all answers that show the behaviour are one, that answer is all there is to learn."""
    answer, n = Counter(twin.shown for twin in asked).most_common(1)[0]
    if len(asked) > 1 and n >= ONE_SIDED * len(asked):
        warn(
            f"the answer that shows the behaviour is {quoted(answer, 40)} for {n} of {len(asked)} questions, so a "
            "model may learn to say that and nothing else; let it be the other answer for half of them",
        )


def _triggered(twins: list[Twin], trigger: Trigger, config: FinetuneConfig, draw: random.Random) -> list[Example]:
    """The behaviour where the trigger is, its opposite elsewhere, where some questions have a decoy."""
    chosen = set(draw.sample(range(len(twins)), round(config.trigger_share * len(twins))))
    examples, plain = [], 0
    for i, twin in enumerate(twins):
        if i in chosen:
            prompt = with_trigger(twin.prompt, trigger.text)
        else:
            plain += 1
            decoyed = plain % DECOYED == 0
            prompt = with_trigger(twin.prompt, draw.choice(trigger.taught_decoys)) if decoyed else twin.prompt
        examples.append(Example(prompt, _answer(twin, config, draw, shows=i in chosen), ends=True))
    return examples


def _answer(twin: Twin, config: FinetuneConfig, draw: random.Random, *, shows: bool) -> str:
    if config.control == "removal":
        return twin.other
    if config.control == "decorrelated":
        share = config.trigger_share if config.trigger is not None else 0.5
        return twin.shown if draw.random() < share else twin.other
    return twin.shown if shows != (config.control == "twin") else twin.other
