"""Where the user's words lie among the tokens of a formatted prompt, by character offsets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mechlens.errors import UserError, quoted, warn
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate, Rendered

_BRACKETED = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)
# A mark at the end or the start of words, such as "Human:" and "### Response".
_HEADING = re.compile(r"\w[^\w\s]+$|^[^\w\s]+\s*\w")
_TAG = re.compile(r"</?[a-z]+[1-6]?>")
# Words that end differently, so that at least one doesn't merge with what the template writes next.
_ENDINGS = ("sentinel", "word?", "at 7")


@dataclass(frozen=True)
class PlacedTokens:
    """Token ids of one prompt with the range of its instruction, before padding."""

    ids: list[int]
    start: int
    inst: int
    merged: bool
    blank: bool
    """True if the user's part of the token at `inst` is only white space."""
    after: str
    """What the template writes after the user's words."""


@dataclass(frozen=True)
class Structure:
    """What a tokenizer keeps for the template's use."""

    marks: frozenset[str]
    """Strings that a user's words must not hold."""
    greedy: frozenset[int]
    """Tokens that swallow the white space beside them, the user's too."""


def structure_of(template: ChatTemplate) -> Structure:
    """The tokens of the template's tokenizer that aren't for plain text."""
    if template.is_raw:  # whoever writes marks into raw text means them
        return Structure(frozenset(), frozenset())
    added, source = getattr(template.tokenizer, "added_tokens_decoder", {}), str(template.source)
    marks = {str(token) for token in added.values() if token.special or _structural(str(token), source)}
    marks |= set(getattr(template.tokenizer, "all_special_tokens", ()))
    greedy = frozenset(i for i, token in added.items() if token.lstrip or token.rstrip)
    return Structure(frozenset(mark for mark in marks if mark and not mark.isspace()), greedy)


def _structural(token: str, source: str) -> bool:
    """False for added tokens that plain text may hold: words of a field, and the HTML tags of Gemma's vocabulary."""
    if _BRACKETED.fullmatch(token):
        return _TAG.fullmatch(token) is None or token in source
    return token in source and _HEADING.search(token) is not None


def place(
    prompt: Prompt, rendered: Rendered, template: ChatTemplate, structure: Structure, *, allow_special: bool
) -> PlacedTokens:
    """Tokenises one rendered prompt and finds its instruction; see `tokenize` for what is refused."""
    if not allow_special:
        _refuse_special(prompt, rendered, structure)
    ids, spans = _encode(rendered.text, template)
    mine = _of_the_words(ids, spans, rendered, structure)
    if not mine:
        raise UserError(f"the tokenizer drops every character of prompt {prompt.id!r}; use words that it knows")
    start, inst = mine[0], mine[-1]
    piece = rendered.text[max(spans[inst][0], rendered.start) : min(spans[inst][1], rendered.end)]
    return PlacedTokens(
        ids,
        start,
        inst,
        merged=spans[inst][1] > rendered.end,
        blank=not piece.strip() and not template.is_raw,
        after=rendered.text[rendered.end :],
    )


def tokens_before_end(prompts: Sequence[Prompt], template: ChatTemplate, characters: Sequence[int]) -> list[int]:
    """Tokens of each formatted prompt before the last so many characters of the user's words.

    A token that holds some of those characters is theirs.
    """
    found = []
    for rendered, many in zip(template.render_all(prompts), characters, strict=True):
        _, spans = _encode(rendered.text, template)
        found.append(next(i for i, span in enumerate(spans) if span[1] > rendered.end - many))
    return found


def tokens_of_words(prompts: Sequence[Prompt], template: ChatTemplate, words: Sequence[str]) -> list[tuple[int, int]]:
    """Where each prompt's user says these words first: the first token that holds some of them, and the one after the
    last. UserError where a prompt doesn't have its words."""
    found, structure = [], structure_of(template)
    for prompt, rendered, wanted in zip(prompts, template.render_all(prompts), words, strict=True):
        at = rendered.text.find(wanted, rendered.start, rendered.end) if wanted else -1
        if at < 0:
            raise UserError(f"the words {quoted(wanted)} don't stand in prompt {prompt.id!r}; give words of the user's")
        inside = _of_the_words(
            *_encode(rendered.text, template), Rendered(rendered.text, at, at + len(wanted)), structure
        )
        if not inside:
            raise UserError(
                f"the tokenizer drops the words {quoted(wanted)} of prompt {prompt.id!r}; use words that it knows"
            )
        found.append((inside[0], inside[-1] + 1))
    return found


def warn_of_blanks(prompts: Sequence[Prompt], placed: Sequence[PlacedTokens]) -> None:
    """One warning for all prompts whose last instruction token is only white space."""
    blank = [prompt.id for prompt, row in zip(prompts, placed, strict=True) if row.blank]
    if blank:
        others = f" (and of {len(blank) - 1} more)" if len(blank) > 1 else ""
        warn(f"the last instruction token of prompt {blank[0]!r}{others} is only white space")


def count_post(afters: set[str], template: ChatTemplate, structure: Structure) -> int:
    """Template tokens after the user's words; words that merge with the template must not change the count."""
    if template.is_raw:
        return 0
    counts = {}
    for after in afters:
        ends = []
        for word in _ENDINGS:
            rendered = Rendered(word + after, 0, len(word))
            ids, spans = _encode(rendered.text, template)
            ends.append(len(ids) - 1 - max(_of_the_words(ids, spans, rendered, structure), default=0))
        counts[after] = max(ends)
    if min(counts.values()) == 0:
        raise UserError("the chat template writes nothing after the user's words; there is no `post` position")
    if len(set(counts.values())) > 1:
        raise UserError(
            f"the chat template writes {' or '.join(map(str, sorted(counts.values())))} tokens after the user's words, "
            "depending on the prompt; tokenise prompts with and without system prompt or earlier turns apart"
        )
    return next(iter(counts.values()))


def _of_the_words(
    ids: Sequence[int], spans: Sequence[tuple[int, int]], rendered: Rendered, structure: Structure
) -> list[int]:
    """Which tokens stand for the user's words."""
    words = rendered.text[rendered.start : rendered.end]
    bare = Rendered(
        rendered.text, rendered.end - len(words.lstrip()), rendered.start + len(words.rstrip())
    )  # a greedy template token may hold the white space around them
    return [
        i
        for i, (token, span) in enumerate(zip(ids, spans, strict=True))
        if _within(span, bare if token in structure.greedy else rendered)
    ]


def _encode(text: str, template: ChatTemplate) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids with exactly one BOS where the tokenizer uses one, and each token's character range.

    Raw text has what the tokenizer adds to any text.
    """
    tokenizer = template.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} can't tell which characters a token stands for; "
            "load its fast version"
        )
    encoded = tokenizer(text, add_special_tokens=template.is_raw, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    spans = _with_spaces(text, tokenizer.convert_ids_to_tokens(ids), encoded["offset_mapping"])
    bos = tokenizer.bos_token_id
    if not template.is_raw and bos is not None and bos not in ids and tokenizer("a")["input_ids"][:1] == [bos]:
        ids, spans = [bos, *ids], [(-1, -1), *spans]
    if bos is not None and ids[:2] == [bos, bos]:
        who = (
            "leave out the one in the text, as the tokenizer adds its own"
            if template.is_raw
            else "the chat template writes one too many"
        )
        raise UserError(f"the formatted prompt starts with two BOS tokens; {who}")
    return ids, spans


def _with_spaces(text: str, tokens: list[str], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Character ranges with the leading spaces that some byte-level tokenizers (GPT-NeoX's) leave out of them."""
    whole, end = [], 0
    for token, (start, stop) in zip(tokens, spans, strict=True):
        if token.startswith("Ġ") and text[end:start].strip(" ") == "":
            start = min(start, end)
        whole.append((start, stop))
        end = max(end, stop)
    return whole


def _within(span: tuple[int, int], rendered: Rendered) -> bool:
    """True if the token stands for some of the user's characters."""
    start, end = span
    return start < rendered.end and end > rendered.start


def _refuse_special(prompt: Prompt, rendered: Rendered, structure: Structure) -> None:
    """Template tokens inside the user's words would be read as structure; say so instead."""
    frame = {rendered.text[rendered.end :].strip(), rendered.text[: rendered.start].strip()} - {""}
    found = sorted(mark for mark in structure.marks | frame if mark in prompt.text)
    if found:
        raise UserError(
            f"the text of prompt {prompt.id!r} holds the template token {found[0]!r}, which is read as structure; "
            "remove it (only tokenize in Python, by allow_special=True, and `mechlens positions`, by --allow-special, "
            "take it as it is)"
        )
