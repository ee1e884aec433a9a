"""Reasoning traces: what is thought before an answer and said in it, and which part of a trace each token is of."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.collect import refuse_too_long, template_of
from mechlens.methods.activations.spans import thought_in
from mechlens.methods.behaviour.thought import CLOSE, OPEN, closes_thought, opens_thought, written_thought
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import TemplateChoice

PROMPT, TEMPLATE, THINKING, ANSWER = "prompt", "template", "thinking", "answer"
"""The user's words, all that template and marks write around words, the thought, and what is said after it."""


@dataclass(frozen=True)
class Trace:
    """A prompt with what was thought and then said; the marks of the thought are no part of either.

    >>> ml.Trace(ml.Prompt("1", "How do I bake a cake?"), "A cake. Easy.", "Mix and bake.").answer
    'Mix and bake.'
    """

    prompt: Prompt
    thinking: str
    answer: str


def trace_batch(model: LanguageModel, traces: Sequence[Trace], *, template: TemplateChoice = "tokenizer") -> TokenBatch:
    """The traces as the model would have written them: prompts, and as their answers thought, marks and answer.

    A template that opens the thought itself has it opened once. UserError for one that writes an empty thought, after
    which no model thinks.

    >>> model = ml.load("smollm2")
    >>> batch = ml.trace_batch(model, [ml.Trace(ml.Prompt("1", "Bake a cake."), "Easy.", "Mix and bake.")])
    >>> model.tokenizer.decode(batch.row(0)).endswith("<think>\\nEasy.\\n</think>\\n\\nMix and bake.")
    True
    """
    if not traces:
        raise UserError("there are no traces; give at least one")
    marked = next((one for one in traces for mark in (OPEN, CLOSE) if mark in one.thinking + one.answer), None)
    if marked is not None:
        raise UserError(f"trace {marked.prompt.id!r} has marks of a thought in its texts; leave {OPEN} and {CLOSE} out")
    chosen = template_of(model, template)
    batch, tokenizer = tokenize([one.prompt for one in traces], chosen), chosen.tokenizer
    if any(closes_thought(batch, tokenizer)):
        raise UserError(
            f"this chat template writes an empty thought ({OPEN} to {CLOSE}) before every answer, so a model never "
            "thinks after it; switch that off, such as with --template-arg enable_thinking=true"
        )
    rows = []
    for one, opened in zip(traces, opens_thought(batch, tokenizer), strict=True):
        pieces = written_thought(one.thinking, one.answer, opened=opened)
        rows.append([token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]])
    batch = batch.with_answers(rows)
    refuse_too_long(model, batch)
    return batch


@dataclass(frozen=True)
class TraceParts:
    """Which part of its trace every token is of.

    >>> model = ml.load("smollm2")
    >>> batch = ml.trace_batch(model, [ml.Trace(ml.Prompt("1", "Bake a cake."), "Easy.", "Mix and bake.")])
    >>> found = ml.trace_parts(batch, model.tokenizer)
    >>> list(dict.fromkeys(found.parts[0]))
    ['template', 'prompt', 'thinking', 'answer']
    >>> found.parts[0][found.ends[0] + 1]
    'answer'
    """

    parts: tuple[tuple[str, ...], ...] = field(repr=False)
    """By prompt and token: prompt, template, thinking or answer."""
    ends: Int[Tensor, " prompt"] = field(repr=False)
    """Each prompt's last token before the answer's first; -1 where the thought never ends."""


def trace_parts(batch: TokenBatch, tokenizer: Any) -> TraceParts:
    """The parts of prompts with their answers, written by the model or by `trace_batch`.

    >>> model = ml.load("smollm2")
    >>> batch = ml.trace_batch(model, [ml.Trace(ml.Prompt("1", "Bake a cake."), "Easy.", "Mix and bake.")])
    >>> found = ml.trace_parts(batch, model.tokenizer)
    >>> list(dict.fromkeys(found.parts[0]))
    ['template', 'prompt', 'thinking', 'answer']
    >>> found.parts[0][found.ends[0] + 1]
    'answer'
    """
    if batch.answer is None:
        raise UserError("these prompts have no answers, so there is no trace; read them with trace_batch")
    parts, ends = [], []
    for i, opened in enumerate(opens_thought(batch, tokenizer)):
        own, end = _parts_of(batch, i, tokenizer, opened=opened)
        parts.append(own)
        ends.append(end)
    return TraceParts(tuple(parts), torch.tensor(ends))


def up_to_answers(batch: TokenBatch, tokenizer: Any) -> TokenBatch:
    """The traces without what is said after the thought; `answer[-1]` is then the last token before it.

    UserError for a trace without a thought, or with one that never ends.
    """
    ends = trace_parts(batch, tokenizer).ends
    assert batch.answer is not None
    # Of a trace the offset is 0: `with_answers` pads on the right.
    without = (ends < batch.answer[:, 0]).nonzero().flatten().tolist()
    if without:
        raise UserError(f"{batch.prompts[without[0]].id!r} has no thought that ends ({len(without)}); leave such out")
    kept = batch.mask & (torch.arange(batch.tokens.shape[1]) <= ends[:, None])
    return replace(batch, mask=kept, answer=torch.stack([batch.answer[:, 0], ends + 1], dim=1))


def _parts_of(batch: TokenBatch, i: int, tokenizer: Any, *, opened: bool) -> tuple[tuple[str, ...], int]:
    assert batch.answer is not None
    row, begin = batch.row(i), int(batch.answer[i, 0]) - batch.offset(i)
    words = [role.startswith("inst") for role in batch.roles(i)[:begin]]
    said = row[begin:]
    first, last, close = thought_in(said, tokenizer, opened=opened)
    thought = any(mark in tokenizer.decode(said) for mark in (OPEN, CLOSE)) or opened
    start = close + 1 if thought else 0
    while start < len(said) and not tokenizer.decode([said[start]]).strip():
        start += 1  # the blank lines between a thought and its answer are the template's
    unfinished = thought and close < 0
    after = [TEMPLATE] * first + [THINKING] * (last - first)
    after += [TEMPLATE] * (start - last) + [ANSWER] * (len(said) - start) if not unfinished else []
    before = [PROMPT if own else TEMPLATE for own in words]
    return (*before, *after), -1 if unfinished else begin + start - 1
