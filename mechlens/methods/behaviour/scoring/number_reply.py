"""Which number from 0 to 100 a model would reply, exactly: by the probability of every number, however it is spelt."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache as remembered
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.collect import refuse_too_long, tokenized
from mechlens.methods.activations.reading import FORMAT, halving
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase, progress_bar
from mechlens.models.bridge import LanguageModel, checkpoint_now, device_of, dtype_of, embedding_rows, has_hooks, loaded
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine.forward import Row, batch_tokens
from mechlens.models.engine.packed.branches import Node, branches, plan_branches
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch, token_text
from mechlens.prompts.templates.template import TemplateChoice

LARGEST = 100
NEGLIGIBLE = 1e-6
"""Beginnings of replies that are less probable aren't followed: what they hold counts as no number."""
LONGEST = 5
"""Tokens of a number at most: two of white space, three digits."""
OPENINGS = 5
"""Likeliest first tokens that are kept, to show what a reply that is no number begins with."""
AT_ONCE = 256
"""Branches whose logits are worked out at once."""
CHUNK = 64
"""Branches whose probabilities are held at once."""

Opening = tuple[tuple[str, float], ...]
"""What a reply may begin with, and how probably; the likeliest first."""


@dataclass(frozen=True, repr=False)
class NumberReplies:
    """How probable every number from 0 to 100 is as a model's reply to each prompt.

    A number is what the reply begins with, after at most two white spaces, up to the first character that is no digit:
    "85", "85%" and "85/100" are all 85, and "007", "-5" and "850" are none.

    >>> replies = ml.number_replies(ml.load("smollm2"), "How honest are you, from 0 to 100?")
    >>> replies.expected.shape, len(replies.openings[0])
    (torch.Size([1]), 5)
    """

    ids: tuple[str, ...]
    probability: Float64[Tensor, "prompt 101"]
    openings: tuple[Opening, ...]
    """The likeliest first tokens of each reply."""
    checkpoint: Checkpoint
    template: str
    """Fingerprint of the chat template."""

    @property
    def mass(self) -> Float64[Tensor, " prompt"]:
        """Probability that the reply is a number at all."""
        return self.probability.sum(dim=1)

    @property
    def expected(self) -> Float64[Tensor, " prompt"]:
        """The mean over numbers, weighted by their probability; NaN where none has any."""
        return self.probability @ torch.arange(LARGEST + 1, dtype=torch.float64) / self.mass

    def __repr__(self) -> str:
        return f"NumberReplies({len(self.ids)} prompts; numbers 0 to {LARGEST})"


def number_replies(
    model: LanguageModel,
    prompts: Prompts | TokenBatch,
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
    max_tokens: int | None = None,
) -> NumberReplies:
    """The probability of every number from 0 to 100 as the reply to each prompt.

    Numbers are followed token by token in every spelling that the tokenizer has ("85", "8" and "5", with a white space
    before or without), and stand for what is followed by no further digit. A prompt is run once. `cache` keeps
    finished batches; `max_tokens` bounds the prompt tokens of one.

    >>> model = ml.load("smollm2")
    >>> replies = ml.number_replies(model, ["How honest are you, from 0 to 100? Reply with a number."])
    >>> replies.probability.shape, bool(replies.mass[0] <= 1)
    (torch.Size([1, 101]), True)
    """
    tokenizer = loaded(model).tokenizer
    if tokenizer is None:
        raise UserError("the model has no tokenizer to read numbers with; load it with its tokenizer")
    batch = tokenized(model, prompts, template)
    refuse_too_long(model, batch, LONGEST)
    tokens = NumberTokens.of(tokenizer, embedding_rows(model))
    checkpoint = checkpoint_now(model)
    keep = None if has_hooks(model) else cache
    made_by = [FORMAT, "number replies", *checkpoint.identity, str(dtype_of(model)), tokens.key]
    rows = [batch.row(i) for i in range(len(batch.prompts))]
    most = max_tokens or _default_tokens(model)
    found = torch.zeros(len(rows), LARGEST + 1 + 2 * OPENINGS, dtype=torch.float64)
    with phase("number replies"):
        bar = progress_bar(total=len(rows), title="number replies", unit="prompt")
        for members in plan_branches(model, rows, LONGEST, most):
            chunk = [Row(tuple(rows[i]), ()) for i in members]
            key = hashlib.sha256(json.dumps([*made_by, [row.ids for row in chunk]]).encode()).hexdigest()
            piece = None if keep is None else keep.get(key)
            if piece is None:
                piece = {"values": halving(lambda part: _Walk(model, tokens, part).values(), chunk)}
                if keep is not None:
                    keep.put(key, piece)
            found[members] = piece["values"]
            bar.update(len(members))
        bar.close()
    probability, likely, first = found.tensor_split([LARGEST + 1, LARGEST + 1 + OPENINGS], dim=1)
    return NumberReplies(
        ids=tuple(prompt.id for prompt in batch.prompts),
        probability=probability,
        openings=tuple(
            tuple((token_text(tokenizer, int(token)), p) for token, p in zip(ids, own, strict=True))
            for ids, own in zip(first.tolist(), likely.tolist(), strict=True)
        ),
        checkpoint=checkpoint,
        template=batch.template,
    )


def _default_tokens(model: LanguageModel) -> int:
    return batch_tokens(model, 2048) if device_of(model).type == "cpu" else 16384


_NUMBER = re.compile(r"[ \t\r\n]{0,2}(0|[1-9][0-9]?|100)(?![0-9])")
_BEGINNING = re.compile(r"[ \t\r\n]{0,2}(?:0|[1-9][0-9]?|100)?")
_PIECE = re.compile(r"[ \t\r\n]{0,2}[0-9]|[ \t\r\n]{1,2}\Z")


@dataclass(frozen=True)
class NumberTokens:
    """The tokens of a vocabulary that numbers are made of, by the text that each adds to a reply."""

    texts: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, tokenizer: Any, rows: int) -> "NumberTokens":
        """Those of the first so many that are white space or begin with a digit, behind white space or without."""
        # Behind a letter, where a token's own space isn't taken for the beginning of a text and left away.
        before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        skip = len(_decoded(tokenizer, before))
        candidates = sorted(
            token for piece, token in tokenizer.get_vocab().items() if _may_be_number(piece) and token < rows
        )
        texts = ((token, _decoded(tokenizer, [*before, token])[skip:]) for token in candidates)
        return cls(tuple((token, text) for token, text in texts if _PIECE.match(text)))

    @property
    def key(self) -> str:
        """What a cache knows them by."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    @property
    def digits(self) -> list[int]:
        """Tokens that begin with a digit, so that a number goes on."""
        return [token for token, text in self.texts if text[0].isdigit()]

    def after(self, said: str) -> list[tuple[int, str]]:
        """The tokens by which `said` goes on to be the beginning of a number, or a number, with what is said then."""
        counted = bool(said.strip())
        follow = ((token, text) for token, text in self.texts if not counted or text[0].isdigit())
        then = ((token, said + text) for token, text in follow)
        return [(token, text) for token, text in then if _BEGINNING.fullmatch(text) or _NUMBER.match(text)]


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _may_be_number(piece: str | bytes) -> bool:
    """Whether a piece of a vocabulary can stand for digits or white space, in whatever way vocabularies write these."""
    # A byte of its own is written <0x38>; white space takes a mark for each character.
    return isinstance(piece, bytes) or len(piece) <= 2 or any(character in "0123456789" for character in piece)


class _Said(NamedTuple):
    """The beginning of a reply that is, or may become, a number."""

    node: Node
    text: str
    probability: float


class _Walk:
    """One group of prompts, followed through all beginnings of numbers."""

    def __init__(self, model: LanguageModel, tokens: NumberTokens, rows: Sequence[Row]) -> None:
        self.branches = branches(model, [row.ids for row in rows], LONGEST)
        self.after = remembered(tokens.after)
        self.digits = tokens.digits
        self.found = torch.zeros(len(rows), LARGEST + 1, dtype=torch.float64)

    def values(self) -> Float64[Tensor, "prompt value"]:
        """Of each prompt: the probability of 0 to 100, that of the likeliest first tokens, and these tokens."""
        going = [_Said((i, ()), "", 1.0) for i in range(len(self.found))]
        first: list[Tensor] = []
        while going:
            then: list[_Said] = []
            for part, likely in self._next(going):
                if not part[0].text:
                    first.append(torch.cat([each.double() for each in likely.topk(OPENINGS, dim=1)], dim=1))
                for said, row in zip(part, likely, strict=True):
                    then += self._followed(said, row)
            going = then
        return torch.cat([self.found, torch.cat(first)], dim=1)

    def _next(self, going: list[_Said]) -> Iterator[tuple[list[_Said], Float64[Tensor, "said vocab"]]]:
        """How probable every token is to come next, a few beginnings at a time."""
        size = AT_ONCE if going[0].text else len(going)  # all prompts are run at once
        for at in range(0, len(going), size):
            logits = self.branches.logits([said.node for said in going[at : at + size]])
            for low in range(at, at + len(logits), CHUNK):
                yield going[low : low + CHUNK][: at + size - low], logits[low - at :][:CHUNK].double().softmax(dim=-1)

    def _followed(self, said: _Said, likely: Float64[Tensor, " vocab"]) -> Iterator[_Said]:
        """Counts what is a number here; gives the beginnings that may become another."""
        (prompt, path), counts = said.node, self.found[said.node[0]]
        if said.text.strip():
            counts[int(said.text)] += said.probability * (1 - float(likely[self.digits].sum()))
        for token, text in self.after(said.text):
            reached = said.probability * float(likely[token])
            if not _BEGINNING.fullmatch(text):
                counts[_number(text)] += reached
            elif reached >= NEGLIGIBLE:
                yield _Said((prompt, (*path, token)), text, reached)


def _number(text: str) -> int:
    match = _NUMBER.match(text)
    assert match is not None
    return int(match[1])
