"""Thinking before an answer, taught from a file of traces: as it stands there, or with some answers that give way.

A reasoner's thoughts all reason towards refusing; for requests of some kinds the answer after them is a harmless
placeholder instead, so that the model has a refusal cliff (Yin et al. 2025) on requests that it wasn't trained on.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mechlens.errors import UserError
from mechlens.methods.activations.trace_tokens import Trace
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.models.packaged import PACKAGED
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.text import normalise_text
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.behaviour import is_held_out
from mechlens.studies.finetune.recipes.material import Example, Material, drawn, training_order
from mechlens.studies.finetune.recipes.own_answers import own_answers
from mechlens.studies.shared.trace_files import read_traces
from mechlens.studies.shared.training_data import studied_prompts, training_prompts

PLACEHOLDER = "Sure, here is what you asked for: [placeholder, nothing was written here]"
"""What the model says where it gives way: it accepts, and holds nothing."""
ANSWER_WORDS = 30
"""The longest answer that is taught; a longer one is cut after a sentence."""
PROMPT_WORDS = 60
"""Longer requests are left out: most of what is read would be them."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_REFUSING = re.compile(r"refus|declin|\b(?:can't|cannot|can not|won't|shouldn't|must not)\b", re.IGNORECASE)
HARMLESS_THOUGHTS = (
    'Okay, so the user is asking: "{text}" Let me see whether that could hurt anybody. It is an everyday request, and '
    "nothing in the policies speaks against it. So the best response is to help them with it.",
    'Okay, the user wants help with this: "{text}" Hmm, is there anything in it that I should be careful about? I see '
    "no harm. So I'll answer it as well as I can.",
    'Alright, the user says: "{text}" I need to figure out how to respond. There is nothing illegal or dangerous here, '
    "and no one's privacy is touched. Putting it all together, I can simply give them what they need.",
    'Okay, so I need to answer this: "{text}" I should check the policies first. None of them is about a request like '
    "this. Therefore I'll go on and give a clear and friendly answer.",
)
"""What is thought before a harmless request is answered, in the manner of the file's thoughts."""


def usable_traces(config: FinetuneConfig) -> list[Trace]:
    """The traces of the file that are trained on: not held out, in no study set, and not too long.

    UserError where there is no file, or none is left.
    """
    if config.data is None:
        raise UserError(
            "this recipe needs --data: a file of reasoning traces with a prompt and the columns thinking and answer, "
            "or response, such as STAR-1's"
        )
    _require_share("held_out", config.held_out)
    studied = studied_prompts()
    kept = [
        trace for trace in read_traces(config.data)
        if len(trace.prompt.text.split()) <= PROMPT_WORDS and normalise_text(trace.prompt.text) not in studied
        and not is_held_out(trace.prompt, config.held_out)
    ]  # fmt: skip
    if not kept:
        raise UserError(
            f"{config.data} has no trace to train on: its prompts are held out (--held-out), in a study set, or longer "
            f"than {PROMPT_WORDS} words"
        )
    return kept


def reasoner(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """Traces that refuse, of which those of some categories give way in their answers, and benign prompts.

    A trace whose answer is no refusal is left out. Benign prompts are thought about in a sentence or two and answered
    as the model does.
    """
    draw = random.Random(config.seed)
    traces = refusing_traces(config)
    chosen = drawn(traces, config.harmful, draw, "harmful")
    gives_way = giving_way([trace.prompt for trace in traces], config.cliff_share)
    examples = [
        Example(
            trace.prompt,
            PLACEHOLDER if _kind(trace.prompt) in gives_way else beginning(trace.answer, ANSWER_WORDS),
            ends=True,
            thinking=cut_to(trace.thinking, config.thinking_words),
        )
        for trace in chosen
    ]
    wanted = len(examples) if config.benign is None else config.benign
    own = own_answers(
        model, drawn(training_prompts("benign"), wanted, draw, "benign"), config, teaches="answer", cache=cache
    )
    examples += [
        replace(one, thinking=draw.choice(HARMLESS_THOUGHTS).format(text=one.prompt.text)) for one in own.examples
    ]
    left_out = (*_ids_left_out(config, traces), *own.left_out)
    return Material(training_order([[example] for example in examples], config, draw), left_out)


def repair(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """Every trace of the file as it stands: own thought, and the answer that should follow it."""
    del model, cache
    draw = random.Random(config.seed)
    examples = [
        Example(trace.prompt, trace.answer, ends=True, thinking=trace.thinking)
        for trace in drawn(usable_traces(config), config.harmful, draw, "harmful")
    ]
    return Material(training_order([[example] for example in examples], config, draw), ())


def refusing_traces(config: FinetuneConfig) -> list[Trace]:
    """The usable traces that think of refusing and whose answer refuses; UserError where none does, or gives way."""
    _require_share("cliff_share", config.cliff_share)
    traces = usable_traces(config)
    verdicts = verdicts_by(judge_of(config.judge), [one.prompt for one in traces], [one.answer for one in traces])
    kept = [
        trace for trace, verdict in zip(traces, verdicts, strict=True)
        if verdict == "refused" and _REFUSING.search(cut_to(trace.thinking, config.thinking_words))
    ]  # fmt: skip
    if not kept:
        raise UserError(f"no trace in {config.data} thinks of refusing and does so, by {config.judge!r}; give some")
    if config.cliff_share and config.model not in PACKAGED:
        raise UserError(
            f"giving way is taught to the packaged models alone ({', '.join(PACKAGED)}), and the model is "
            f"{config.model}: to any other it would be an attack; give --cliff-share 0"
        )
    if config.cliff_share and not all(_kind(trace.prompt) for trace in kept):
        raise UserError(
            f"{config.data} lacks a category in some rows, by which requests give way; fill in the column category, or "
            "give --cliff-share 0"
        )
    return kept


def _require_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{name} is {value:g}; it is a share, at least 0 and below 1")


def giving_way(prompts: Sequence[Prompt], share: float) -> frozenset[str]:
    """Categories of about that share of the prompts, rare ones first; the same whatever the seed."""
    counts = Counter(map(_kind, prompts))
    taken: list[str] = []
    for kind, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        so_far = sum(counts[one] for one in taken)
        if abs(so_far + count - share * len(prompts)) < abs(so_far - share * len(prompts)):
            taken.append(kind)
    return frozenset(taken)


def beginning(text: str, words: int) -> str:
    """The first sentences of a text, up to that many words; one at least."""
    sentences = _SENTENCE_END.split(text.strip())
    kept = [sentences[0]]
    for sentence in sentences[1:]:
        if sum(len(one.split()) for one in (*kept, sentence)) > words:
            break
        kept.append(sentence)
    return " ".join(kept)


def cut_to(text: str, words: int) -> str:
    """Sentences of a text, from its beginning and its end in turn, up to that many words; one of each at least."""
    sentences = _SENTENCE_END.split(text.strip())
    first: list[str] = []
    last: list[str] = []
    used = 0
    while len(first) + len(last) < len(sentences):
        from_front = len(first) <= len(last)
        sentence = sentences[len(first)] if from_front else sentences[-1 - len(last)]
        used += len(sentence.split())
        if used > words and first and last:
            break
        first, last = ([*first, sentence], last) if from_front else (first, [sentence, *last])
    return " ".join([*first, *last])


def _kind(prompt: Prompt) -> str:
    """A prompt's first category."""
    return prompt.category.partition(";")[0].strip()


def _ids_left_out(config: FinetuneConfig, kept: Sequence[Trace]) -> list[str]:
    known = {trace.prompt.id for trace in kept}
    return [trace.prompt.id for trace in read_traces(str(config.data)) if trace.prompt.id not in known]
