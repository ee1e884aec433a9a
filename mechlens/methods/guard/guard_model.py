"""A guard model as a judge of prompts: asked through its own chat template, its verdict read as a word and as log-odds.

Inan et al. 2023: the guard's template wraps the conversation in instructions and a list of hazards, and the answer is
`safe`, or `unsafe` with the hazards' codes on the next line. Others answer a question about harm by yes or no.

The word alone is a decision at a threshold that somebody else chose; a score is needed to compare guards. It is the
log-odds of the tokens by which this model itself gives its verdicts, all prompts read after the same start of an
answer, as Llama Guard's blank lines.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.activations.collect import template_of
from mechlens.methods.activations.reading import halving
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel, loaded, n_layers, unembed
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.prompts.batch import TokenBatch, token_text, tokenize
from mechlens.prompts.prompt import Prompt

ANSWER_TOKENS = 12
MAX_TOKENS = 4096
"""Prompt tokens in a batch."""
ALIKE = 0.9
"""Share of the answers that must give a verdict after the same tokens: elsewhere its log-odds mean something else."""
_CODE = re.compile(r"\b[SO]\d{1,2}\b")


@dataclass(frozen=True)
class VerdictWords:
    """The two words of a way of answering."""

    harmful: str
    harmless: str
    pattern: re.Pattern[str]
    """Where one of them is a verdict; its first group is the word."""

    def opposite(self, word: str) -> str:
        """The other word, in the capitals of this one."""
        other = self.harmless if word.lower() == self.harmful else self.harmful
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


SAFETY = VerdictWords("unsafe", "safe", re.compile(r"\b(unsafe|safe)\b", re.IGNORECASE))
# Inside a sentence "no" is said of all sorts of things, so it must open the answer or follow a field's name.
YES_NO = VerdictWords("yes", "no", re.compile(r"(?:\A|[:>])\s*(yes|no)\b", re.IGNORECASE))


@dataclass(frozen=True)
class GuardModelAnswer:
    """What a guard model said of one prompt."""

    harmful: bool | None
    """None where the answer holds no verdict."""
    hazards: tuple[str, ...]
    """Codes such as S1 or O3, in the order given."""
    answer: str


@dataclass(frozen=True)
class GuardModelOpinion:
    """What a guard model said of every prompt, and how sure it was."""

    answers: tuple[GuardModelAnswer, ...]
    log_odds: Float64[Tensor, " prompt"] | None
    """log P(harmful) - log P(harmless) of the verdict's tokens; None where there is no such token."""
    note: str
    """Which tokens, or why there are none."""

    @property
    def unread(self) -> int:
        """Answers without a verdict."""
        return sum(answer.harmful is None for answer in self.answers)


def parse_guard_answer(text: str, words: VerdictWords = SAFETY) -> GuardModelAnswer:
    """The verdict is the first of the two words; codes count only after the harmful one."""
    found = words.pattern.search(text)
    if found is None:
        return GuardModelAnswer(None, (), text)
    harmful = found[1].lower() == words.harmful
    codes = tuple(dict.fromkeys(_CODE.findall(text[found.end() :]))) if harmful else ()
    return GuardModelAnswer(harmful, codes, text)


def ask_guard_model(guard: LanguageModel, prompts: Sequence[Prompt], cache: Cache | None = None) -> GuardModelOpinion:
    """The guard model's word on every prompt, asked through the chat template of its own tokenizer, and its log-odds.

    It answers by the pair of words, safe and unsafe or yes and no, that more of its answers hold.
    """
    plain = [Prompt(prompt.id, prompt.text, history=prompt.history) for prompt in prompts]
    batch = tokenize(plain, template_of(guard))
    said = answer(guard, batch, max_new_tokens=ANSWER_TOKENS, cache=cache)
    words = max((SAFETY, YES_NO), key=lambda pair: sum(bool(pair.pattern.search(text)) for text in said.texts))
    found = verdict_tokens(loaded(guard).tokenizer, said.tokens, words)
    answers = tuple(parse_guard_answer(text, words) for text in said.texts)
    if isinstance(found, str):
        return GuardModelOpinion(answers, None, f"no log-odds: {found}")
    odds = _log_odds(guard, batch, found)
    return GuardModelOpinion(answers, odds, f"log-odds of {found.named(loaded(guard).tokenizer)}")


@dataclass(frozen=True)
class VerdictTokens:
    """The first tokens of both verdicts, and the start of an answer after which they come."""

    before: tuple[int, ...]
    harmful: tuple[int, ...]
    harmless: tuple[int, ...]

    def named(self, tokenizer: Any) -> str:
        """The tokens in words: 'unsafe' against 'safe' after '\\n\\n'."""
        sides = (", ".join(repr(token_text(tokenizer, one)) for one in side) for side in (self.harmful, self.harmless))
        start = f" after {tokenizer.decode(list(self.before))!r}" if self.before else ""
        return " against ".join(sides) + start


def verdict_tokens(tokenizer: Any, answers: Sequence[Sequence[int]], words: VerdictWords) -> VerdictTokens | str:
    """From a model's own answers (token ids); or, where they have no such tokens, the reason in words."""
    found = [_verdict(tokenizer, list(tokens), words) for tokens in answers]
    starts = Counter(one.before for one in found if one is not None)
    if not starts:
        return f"no answer says {words.harmful} or {words.harmless}"
    before, n = starts.most_common(1)[0]
    if n < ALIKE * len(answers):
        return f"only {n} of {len(answers)} answers give a verdict after the same tokens"
    alike = [one for one in found if one is not None and one.before == before]
    harmful, harmless = (_side(tokenizer, alike, words, side) for side in (words.harmful, words.harmless))
    if not harmful or not harmless or set(harmful) & set(harmless):
        return f"{words.harmful} and {words.harmless} don't begin with tokens of their own"
    return VerdictTokens(before, harmful, harmless)


@dataclass(frozen=True)
class _Verdict:
    """A verdict in one answer."""

    word: str
    before: tuple[int, ...]
    """Tokens before the one that the word begins in."""
    token: int


def _verdict(tokenizer: Any, tokens: list[int], words: VerdictWords) -> _Verdict | None:
    found = words.pattern.search(_text(tokenizer, tokens))
    if found is None:
        return None
    k = next(k for k in range(len(tokens)) if len(_text(tokenizer, tokens[: k + 1])) > found.start(1))
    return _Verdict(found[1], tuple(tokens[:k]), tokens[k])


def _side(tokenizer: Any, verdicts: Sequence[_Verdict], words: VerdictWords, word: str) -> tuple[int, ...]:
    """First tokens of one of the words: those with which it was said, or would be, had it been said at all."""
    said = [one.token for one in verdicts if one.word.lower() == word]
    instead = [] if said else [_opposite(tokenizer, one, words) for one in verdicts]
    return tuple(dict.fromkeys([*said, *(token for token in instead if token is not None)]))


def _opposite(tokenizer: Any, said: _Verdict, words: VerdictWords) -> int | None:
    """The token that would stand in a verdict's place had the model said the other word; None if that can't be seen.

    Both are written after the same start: a word alone may be cut into tokens differently.
    """
    start = _text(tokenizer, [*said.before, said.token])
    start = start[: len(start) - len(start[len(_text(tokenizer, list(said.before))) :].lstrip())]
    own, other = (
        tokenizer.encode(start + word, add_special_tokens=False) for word in (said.word, words.opposite(said.word))
    )
    place = next((i for i in range(len(own) - 1, -1, -1) if own[i] == said.token), None)
    return other[place] if place is not None and own[:place] == other[:place] else None


def _text(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def _log_odds(guard: LanguageModel, batch: TokenBatch, tokens: VerdictTokens) -> Float64[Tensor, " prompt"]:
    """log P(harmful) - log P(harmless) after every prompt and the start of an answer."""
    rows = [(*batch.row(i), *tokens.before) for i in range(len(batch.prompts))]
    reads = [Row(ids, (len(ids) - 1,)) for ids in rows]
    fast, level = forward.fits_fast_path(guard), n_layers(guard)
    odds = torch.empty(len(rows), dtype=torch.float64)

    def run(chunk: list[Row]) -> Tensor:
        residual = (
            forward.fast_batch(guard, chunk, [level], None) if fast else forward.reference_batch(guard, chunk, [level])
        )
        logits = unembed(guard, residual[:, 0, 0]).double()
        return logits[:, list(tokens.harmful)].logsumexp(1) - logits[:, list(tokens.harmless)].logsumexp(1)

    for members in forward.plan(reads, MAX_TOKENS, equal_lengths=not fast):
        odds[members] = halving(run, [reads[i] for i in members])
    return odds
