"""The chat template: what is written around the user's words, taken from the tokenizer and nowhere else."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from mechlens.errors import UserError, quoted
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.render import (
    SENTINELS,
    Conversation,
    Rendering,
    TemplateFailure,
    names_read,
    portions,
    render,
)
from mechlens.registry import nearest

# The strings that Zhao et al. (2025) fed to their models; they differ from the tokenizers' own templates
# (one newline after Llama-3's header instead of two, no final newline and no system block for Qwen2).
PAPER_TEMPLATES: dict[str, tuple[str, str]] = {
    "llama2": ("[INST]", "[/INST]"),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n",
    ),
    "qwen2": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant"),
    "vicuna": ("USER:", "\nASSISTANT:"),
}

RAW = "none"
"""Name of no template: the text as it is, with the tokens that the tokenizer adds to any text of its own accord."""
Turn = Mapping[str, str]
"""A turn as templates know it, with a role and a content."""

_END_OF_THOUGHT = "</think>"
"""Reasoning templates leave out what an earlier answer was thinking."""


@dataclass(frozen=True)
class Rendered:
    """A formatted prompt and the character range of the user's own words in it."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class ChatTemplate:
    r"""How a request becomes the string that a chat model reads.

    `kind` is "tokenizer" (the tokenizer's own template), "paper:FAMILY" (the published strings) or "none": the text as
    it is, as a base model reads it.

    >>> template = ml.chat_template(ml.load_tokenizer("smollm2"))
    >>> template.render(ml.Prompt("cake", "Bake a cake.")).text.endswith("assistant\n")
    True
    """

    tokenizer: Any
    kind: str = "tokenizer"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the template, such as {"enable_thinking": False}."""
    today: str = field(default_factory=lambda: date.today().isoformat())
    """The day on which a template that prints the date is rendered: some templates do, and no two days are alike."""

    def __post_init__(self) -> None:
        """UserError for an option that the template never reads: it would look as if it had been heeded."""
        known = self.arguments if self.options else None
        unknown = [] if known is None else [name for name in self.options if name not in known]
        if unknown and known is not None:
            near = nearest(unknown[0], known)
            raise UserError(
                f"the chat template never reads the argument {unknown[0]!r}{f' ({near})' if near else ''}; "
                f"it reads {', '.join(known) or 'none'}"
            )

    @property
    def arguments(self) -> tuple[str, ...] | None:
        """Names of the options that the template reads; None for one that can't be rendered."""
        if self.kind != "tokenizer":
            return ()
        known = names_read(self._jinja)
        return None if known is None else tuple(name for name in known if name not in self.tokenizer.special_tokens_map)

    @property
    def source(self) -> Any:
        """The template as the tokenizer keeps it, or the published strings before and after the words."""
        if self.is_raw:
            return "", ""
        return self.tokenizer.chat_template if self.kind == "tokenizer" else PAPER_TEMPLATES[self.kind[6:]]

    @property
    def is_raw(self) -> bool:
        """True where nothing is written around a text."""
        return self.kind == RAW

    @property
    def fingerprint(self) -> str:
        """sha256 over all that decides what is written: the template's source, its options, the tokenizer's special
        tokens and, where the template asks for the date, what it writes around the words on the day `today`."""
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        parts = [self.kind, self.source, dict(self.options), special]
        if self._asks_for_date:
            parts.append(self._frames_on(self.today))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def printed_date(self) -> str | None:
        """`today` if what stands around the words is different on another day, else None."""
        if not self._asks_for_date:
            return None
        # Another year, month, day of the month and day of the week.
        other = (date.fromisoformat(self.today) + timedelta(days=-400)).isoformat()
        return self.today if self._frames_on(self.today) != self._frames_on(other) else None

    @property
    def _asks_for_date(self) -> bool:
        return "strftime_now" in str(self.source)

    def _frames_on(self, today: str) -> list[str]:
        """What the template writes on a day without and with a system prompt, or why it refuses to."""
        user = {"role": "user", "content": SENTINELS[0]}
        written = []
        for turns in ([user], [{"role": "system", "content": SENTINELS[1]}, user]):
            try:
                written += self._written([turns], today)
            except TemplateFailure as failure:
                written.append(str(failure))
        return written

    def render(self, prompt: Prompt) -> Rendered:
        """The formatted prompt; raises UserError where the template can't hold it or rewrites its text."""
        return self.render_all([prompt])[0]

    def render_all(self, prompts: Sequence[Prompt]) -> list[Rendered]:
        """Every formatted prompt; many together are rendered much faster than one by one."""
        return [rendered for some in portions(prompts) for rendered in self._rendered(some)]

    def _rendered(self, prompts: Sequence[Prompt]) -> list[Rendered]:
        for prompt in prompts:
            if not prompt.text.strip():
                raise UserError(f"prompt {prompt.id!r} has no text; give every prompt at least one word")
            if self.is_raw and (prompt.system is not None or prompt.history):
                what = "earlier turns" if prompt.history else "a system prompt"
                raise UserError(
                    f"prompt {prompt.id!r} has {what}, and raw text has no place for that; write everything into its "
                    "text, or use a chat template (template='tokenizer')"
                )
        if self.is_raw:
            return [Rendered(prompt.text, 0, len(prompt.text)) for prompt in prompts]
        asked = [Rendering.of(prompt) for prompt in prompts]
        # Prompts with the same turns before them share everything but the text.
        wanted = dict.fromkeys(conversation for one in asked for conversation in one.conversations)
        texts = dict(zip(wanted, self._texts(list(wanted)), strict=True))
        return [
            _place(one, prompt, [texts[conversation] for conversation in one.conversations])
            for one, prompt in zip(asked, prompts, strict=True)
        ]

    def _texts(self, conversations: Sequence[Conversation]) -> list[str]:
        if self.kind == "tokenizer":
            turns = [[{"role": role, "content": content} for role, content in one] for one in conversations]
            return self._apply(turns, add_generation_prompt=True)
        if any(len(one) > 1 for one in conversations):
            raise UserError("the published templates have no system prompt and no earlier turns; leave both out")
        before, after = self.source
        return [before + one[-1][1] + after for one in conversations]

    def after_answer(self, answer: str) -> str:
        """What the template writes after an assistant's words `answer`; "" where it doesn't write these."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        (text,) = self._apply([turns], add_generation_prompt=False)
        return text.rpartition(answer)[2] if answer in text else ""

    def _apply(self, conversations: Sequence[Sequence[Turn]], *, add_generation_prompt: bool) -> list[str]:
        try:
            return self._written(conversations, self.today, add_generation_prompt=add_generation_prompt)
        except TemplateFailure as failure:
            turns = conversations[failure.conversation]
            roles = ", ".join(turn["role"] for turn in turns)
            if not failure.refused:
                raise UserError(
                    f"the chat template can't be rendered for turns of roles [{roles}]: {failure}; give the tokenizer "
                    "a sound chat template, or the options that this one asks for"
                ) from failure
            # A single turn, or an answer after one, is the least that there is.
            less = add_generation_prompt and len(turns) > 1
            remedy = "leave out the system prompt or the earlier turns" if less else "give the tokenizer another one"
            raise UserError(
                f"the chat template refuses turns of roles [{roles}]: {str(failure).rstrip('.')}; {remedy}"
            ) from failure

    @property
    def _jinja(self) -> str:
        """The tokenizer's own template; UserError where it has none."""
        source = self.tokenizer.chat_template
        if isinstance(source, Mapping):  # several, by name
            source = source.get("default")
        if not source:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template (a base model?); "
                "ask for raw text (--template none, template=None in Python), use a chat model, set "
                "tokenizer.chat_template, or ask for template='paper:FAMILY'"
            )
        return str(source)

    def _written(
        self, conversations: Sequence[Sequence[Turn]], today: str, *, add_generation_prompt: bool = True
    ) -> list[str]:
        """What the tokenizer's own template writes; TemplateFailure where it refuses to."""
        special = {
            name: token if isinstance(token, list) else str(token)
            for name, token in self.tokenizer.special_tokens_map.items()
        }
        fixed = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return render(self._jinja, conversations, {**fixed, **special, **self.options}, today)
        except TypeError as error:
            raise UserError(f"the options of a chat template must be plain data ({error}); correct them") from error


def _place(asked: Rendering, prompt: Prompt, texts: Sequence[str]) -> Rendered:
    """Where the user's words stand in the first of the texts; UserError where they aren't as they were given."""
    text, *framed, probe = texts
    before, after = _frame(framed)
    words = text[len(before) : len(text) - len(after)]
    whole = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
    if not whole or words not in _trimmings(prompt.text):
        raise UserError(
            f"the chat template rewrites the text of prompt {prompt.id!r}, so its tokens can't be named; "
            "shorten or clean the text, or give the model a template that keeps it"
        )
    _require_turns(asked, text, probe, words)
    return Rendered(text, len(before), len(before) + len(words))


def _frame(framed: Sequence[str]) -> tuple[str, str]:
    """What stands before and after the user's words, found from sentinels that were rendered in their place."""
    frames = []
    for sentinel, text in zip(SENTINELS, framed, strict=True):
        if text.count(sentinel) != 1:
            raise UserError(
                f"the chat template writes the last user turn {text.count(sentinel)} times instead of once; "
                "mechlens can't place positions in it"
            )
        frames.append(tuple(text.split(sentinel)))
    if frames[0] != frames[1]:
        raise UserError("the chat template changes with the user's words; mechlens can't place positions")
    before, after = frames[0]
    return before, after


def _require_turns(asked: Rendering, text: str, probe: str, words: str) -> None:
    """UserError unless every earlier turn that says something is written, and the system prompt too.

    What a turn says must stand in the text as often as in the probe with all words back in place of their marks: once
    more than where it is said by the way, such as the "in" of an instruction.
    """
    said = [content.rpartition(_END_OF_THOUGHT)[2].strip() for _, content in asked.earlier]
    whole = probe.replace(SENTINELS[0], words)
    for one, mark in zip(said, asked.marks, strict=True):
        whole = whole.replace(mark, one)
    for (role, content), one, mark in zip(asked.earlier, said, asked.marks, strict=True):
        if not content or (mark in probe and (not one or text.count(one) >= whole.count(one))):
            continue
        if role == "system":
            raise UserError(
                "the chat template drops the system prompt; leave `system` out or put its words into the text"
            )
        raise UserError(f"the chat template drops the earlier turns of role {role}; leave `history` out")


def _trimmings(text: str) -> tuple[str, ...]:
    """The text as templates may write it: as it is, or without white space at its ends."""
    return text, text.strip(), text.rstrip(), text.lstrip()


def chat_template(
    tokenizer: Any,
    template: str | None = "tokenizer",
    *,
    today: str | None = None,
    template_arg: Sequence[str] = (),
    **options: Any,
) -> ChatTemplate:
    r"""The template to use: "tokenizer" (default), "paper" (family found from the tokenizer), "paper:FAMILY", or none.

    None or "none" is raw text.

    `today` (such as "2024-07-26") is the day that a template which prints the date prints; None is this day.
    The template's own arguments are keywords here (`enable_thinking=False`), or in `template_arg` as on the command
    line ("enable_thinking=false"). Raises UserError for one that the template never reads.

    >>> template = ml.chat_template(ml.load_tokenizer("smollm2"))
    >>> template.render(ml.Prompt("cake", "Bake a cake.")).text.endswith("assistant\n")
    True
    """
    day = date.today().isoformat() if today is None else _day(today)
    options |= template_arguments(template_arg)
    if template in ("tokenizer", RAW, None):
        return ChatTemplate(tokenizer, template or RAW, options, day)
    published = {f"paper:{name}" for name in PAPER_TEMPLATES}
    kind = f"paper:{_paper_family(tokenizer)}" if template == "paper" else template
    if kind not in published:
        known = ", ".join(sorted(published))
        raise UserError(f"there is no template {quoted(template)}; choose tokenizer, paper, none or one of {known}")
    return ChatTemplate(tokenizer, kind, options, day)


TemplateChoice = ChatTemplate | str | None
"""A template, or the name of one as `chat_template` knows it; None is raw text."""


def template_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Arguments written as NAME=VALUE; a value is JSON where it parses as such, else text. UserError for a slip."""
    found: dict[str, Any] = {}
    for one in given:
        name, sign, value = one.partition("=")
        if not sign or not name or name in found:
            how = f"gives {name!r} twice" if name in found else "isn't of the form NAME=VALUE"
            raise UserError(f"the template argument {one!r} {how}; write it once, such as enable_thinking=false")
        if value in ("True", "False", "None"):  # as text, False would count as true
            spelt = {"True": "true", "False": "false", "None": "null"}[value]
            raise UserError(f"the template argument {one!r} is in Python's spelling; write {name}={spelt}")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _day(given: str) -> str:
    try:
        return date.fromisoformat(given).isoformat()
    except ValueError as error:
        raise UserError(f"there is no day {given!r}; write it as year-month-day, such as 2024-07-26") from error


def _paper_family(tokenizer: Any) -> str:
    vocabulary = tokenizer.get_vocab()
    if "<|start_header_id|>" in vocabulary:
        return "llama3"
    if "<|im_start|>" in vocabulary:
        return "qwen2"
    if "[INST]" in str(tokenizer.chat_template):
        return "llama2"
    raise UserError(
        "the published strings exist for Llama-2, Llama-3, Qwen2 and Vicuna, and this tokenizer looks like none; "
        f"name one: {', '.join(f'paper:{name}' for name in PAPER_TEMPLATES)}"
    )
