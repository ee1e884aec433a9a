"""The traces of the study: from a file, or as the model itself thinks and answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from mechlens.errors import UserError
from mechlens.methods.activations.trace_tokens import Trace, trace_batch
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.thought import CLOSE, OPEN
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import PARTS, families_of_each
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.shared.trace_files import read_traces

HARMFUL, HARMLESS = "harmful", "harmless"


@dataclass(frozen=True)
class Traces:
    """Traces that have a thought and an answer, and how many hadn't."""

    kept: tuple[Trace, ...]
    """Their prompts are labelled harmful or harmless."""
    endless: int = 0
    """Thoughts that never ended."""
    thoughtless: int = 0
    """Answers without a thought before them."""

    @property
    def note(self) -> str:
        """What was left out, in words; empty where nothing was."""
        parts = []
        if self.endless:
            parts.append(f"{self.endless} thoughts that never ended")
        if self.thoughtless:
            parts.append(f"{self.thoughtless} answers without a thought")
        return f"Left out: {' and '.join(parts)}." if parts else ""


def labelled_traces(path: str) -> Traces:
    """The traces of a file, each labelled; UserError naming the trace that isn't."""
    traces = read_traces(path, label_column="label")
    wrong = next((one.prompt for one in traces if one.prompt.label not in (HARMFUL, HARMLESS)), None)
    if wrong is not None:
        raise UserError(
            f"trace {wrong.id!r} of {path} is labelled {wrong.label!r}; its label must be {HARMFUL} or {HARMLESS}"
        )
    return Traces(tuple(traces))


def shared_out(groups: Sequence[str], families: Sequence[str]) -> list[str]:
    """What a split keeps in every part: each group, or its class where one of its groups is in too few families."""
    held = families_of_each(groups, families)
    rare = {group.partition("_")[2] for group in groups if held[group] < len(PARTS)}
    classes = [group.partition("_")[2] for group in groups]
    return [label if label in rare else group for group, label in zip(groups, classes, strict=True)]


def refuse_empty_thoughts(model: LanguageModel, template: ChatTemplate) -> None:
    """UserError for a chat template that writes an empty thought, after which no model thinks."""
    trace_batch(model, [Trace(Prompt("probe", "Hello."), "a", "b")], template=template)


def written_traces(
    model: LanguageModel, prompts: Sequence[Prompt], template: ChatTemplate, *, new_tokens: int, cache: Cache | None
) -> Traces:
    """What the model thinks and answers, greedily, in up to so many tokens."""
    said = answer(model, prompts, max_new_tokens=new_tokens, template=template, cache=cache)
    kept, endless, thoughtless = [], 0, 0
    for prompt, text in zip(prompts, said.texts, strict=True):
        if OPEN not in text and CLOSE not in text:
            thoughtless += 1
            continue
        before, opened, thought = text.partition(OPEN)
        if opened and before.strip():  # said before it was thought
            thoughtless += 1
            continue
        thinking, closed, rest = (thought if opened else text).partition(CLOSE)
        if not closed or OPEN in thinking + rest or not rest.strip() or CLOSE in rest:
            endless += 1
        elif not thinking.strip():
            thoughtless += 1
        else:
            kept.append(Trace(prompt, thinking.strip(), rest.strip()))
    return Traces(tuple(kept), endless, thoughtless)
