"""Tokens with named positions: `inst` is the last token of the user's words, `post[k]` the template after it.

Raw text has no template: its last token is `last` and `inst`, and there is no `post`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechlens.errors import UserError, many
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.place import count_post, place, structure_of, warn_of_blanks
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.same import Comparable
from mechlens.prompts.templates.template import ChatTemplate

LAST = "last"
_POST = re.compile(r"post\[(-?\d+|\*)\]")
_INSTRUCTION = re.compile(r"instruction\[(-?\d+|\*)\]")
_TOKEN = re.compile(r"token\[(-?\d+)\]")


@dataclass(frozen=True, repr=False, eq=False)
class TokenBatch(Comparable):
    """Tokenised prompts in one padded block; every index counts from the start of the padded row.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(ml.builtin_prompts("harmful")[:2], ml.template_of(model))
    >>> batch.positions[0], batch.resolve(["last"]) == batch.positions[-1:]
    ('inst', True)
    """

    prompts: tuple[Prompt, ...]
    tokens: Int[Tensor, "prompt seq"]
    mask: Bool[Tensor, "prompt seq"]
    """True at real tokens."""
    positions: tuple[str, ...]
    """Names of the columns of `index`: "inst", "post[0]", ...; of raw text "last" alone."""
    index: Int[Tensor, "prompt position"]
    instruction: Int[Tensor, "prompt 2"]
    """First and last token of the user's words."""
    merged: Bool[Tensor, " prompt"]
    """True where the token at `inst` also holds the first characters of the template."""
    template: str
    """Fingerprint of the chat template."""
    answer: Int[Tensor, "prompt 2"] | None = None
    """Where `with_answers` put each answer: its first token, and the one after its last."""

    @property
    def n_post(self) -> int:
        """Number of template tokens after the user's words."""
        return len(self.positions) - 1

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Real tokens in each row."""
        return self.mask.sum(dim=1)

    @property
    def offsets(self) -> Int[Tensor, " prompt"]:
        """Padding tokens before the first real one of each row."""
        return self.mask.int().argmax(dim=1)

    def resolve(self, names: Sequence[str]) -> tuple[str, ...]:
        """Position names as columns of `index`: "post[*]" opens up, "last" and "post[-1]" become post[n-1].

        In raw text "inst" becomes "last", and "post[*]" nothing.
        """
        return tuple(dict.fromkeys(column for name in names for column in self._columns(name)))

    def _columns(self, name: str) -> list[str]:
        if name == "inst":
            return [self.positions[0]]
        if name == LAST:
            return [self.positions[-1]]
        match = _POST.fullmatch(name)
        if self.positions == (LAST,) and (match is None or match[1] != "*"):
            raise UserError(
                f"there is no position {name!r} in raw text, which has no template after it; choose last, token[k], "
                "token[-k] or prompt[*]"
            )
        if match is None:
            raise UserError(
                f"there is no position {name!r}; choose inst, last, post[k] with k from 0 to {self.n_post - 1}, "
                "post[-k] or post[*]"
            )
        if match[1] == "*":
            return list(self.positions[1:])
        k = int(match[1])
        if not -self.n_post <= k < self.n_post:
            raise UserError(
                f"there is no position {name!r}: this template has {self.n_post} tokens after the user's words"
            )
        return [self.positions[1:][k]]

    def at(self, name: str) -> Int[Tensor, " prompt"]:
        """Index of one named position in every row.

        `instruction[k]` counts within the user's words, `token[k]` from the start of the prompt and `token[-k]` from
        its end.
        """
        absolute = _TOKEN.fullmatch(name)
        if absolute is not None:
            k = int(absolute[1])
            # Raw text and a prompt cut at its words end in their last column too; answers are no part of a prompt.
            return self._counted(name, self.offsets + k if k >= 0 else self.index[:, -1] + 1 + k, self._last())
        match = _INSTRUCTION.fullmatch(name)
        if match is None or match[1] == "*":
            columns = self._columns(name)
            if len(columns) != 1:
                raise UserError(f"{name!r} names {len(columns)} positions; ask for one of {', '.join(columns)}")
            return self.index[:, self.positions.index(columns[0])]
        k = int(match[1])
        found = self.instruction[:, 0] + k if k >= 0 else self.instruction[:, 1] + 1 + k
        return self._counted(name, found, self.instruction[:, 1])

    def _last(self) -> Int[Tensor, " prompt"]:
        """Index of the last real token of every row."""
        return self.mask.shape[1] - 1 - self.mask.flip(1).int().argmax(dim=1)

    def _counted(self, name: str, found: Tensor, last: Tensor) -> Int[Tensor, " prompt"]:
        """Indices that were counted off, refused where a row ends before them or they precede its words."""
        first = self.instruction[:, 0] if name.startswith("instruction") else self.offsets
        inside = (found >= first) & (found <= last)
        if not bool(inside.all()):
            row = int((~inside).nonzero()[0, 0])
            raise UserError(f"prompt {self.prompts[row].id!r} is too short to have a token {name!r}")
        return found

    def select(self, rows: Sequence[int]) -> "TokenBatch":
        """The same batch for some of the prompts, in the order asked for."""
        keep = torch.as_tensor(rows, dtype=torch.long)
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in rows),
            tokens=self.tokens[keep],
            mask=self.mask[keep],
            index=self.index[keep],
            instruction=self.instruction[keep],
            merged=self.merged[keep],
            answer=None if self.answer is None else self.answer[keep],
        )

    def with_answers(self, answers: Sequence[Sequence[int]]) -> "TokenBatch":
        """Each prompt followed by the tokens of its answer, padded on the right; `answer` says where they are."""
        if self.answer is not None:
            raise UserError("the prompts have answers already; add them to a batch without")
        if len(answers) != len(self.prompts):
            raise UserError(
                f"{many(len(answers), 'answer')} came for {many(len(self.prompts), 'prompt')}; give one for each"
            )
        rows = [[*self.row(i), *own] for i, own in enumerate(answers)]
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        offsets = self.offsets.unsqueeze(1)
        ends = torch.tensor([len(row) for row in rows])
        return replace(
            self,
            tokens=tokens,
            mask=torch.arange(width) < ends.unsqueeze(1),
            index=self.index - offsets,
            instruction=self.instruction - offsets,
            answer=torch.stack([self.lengths, ends], dim=1),
        )

    def without_post(self) -> "TokenBatch":
        """The prompts cut right after `inst`: no template token follows the user's words, and no answer."""
        kept = torch.arange(self.tokens.shape[1]) <= self.instruction[:, 1:]
        return replace(self, mask=self.mask & kept, positions=("inst",), index=self.index[:, :1], answer=None)

    def require_rows(self, n: int, tokenizer: Any) -> None:
        """UserError where a token has no row in an embedding of `n` rows: the tokenizer isn't the model's own."""
        beyond = self.mask & ((self.tokens < 0) | (self.tokens >= n))
        if bool(beyond.any()):
            row = int(beyond.nonzero()[0, 0])
            require_rows_for(self.row(row), f"prompt {self.prompts[row].id!r}", n, tokenizer)

    def row(self, i: int) -> list[int]:
        """Token ids of prompt `i` without padding."""
        ids: list[int] = self.tokens[i][self.mask[i]].tolist()
        return ids

    def offset(self, i: int) -> int:
        """Padding tokens before the first real token of row `i`."""
        return int(self.mask[i].int().argmax())

    def roles(self, i: int) -> list[str]:
        """What each real token of prompt `i` is: template, instruction[k], inst, post[k], answer[k]."""
        start, end = (self.instruction[i] - self.offset(i)).tolist()
        names = ["template"] * len(self.row(i))
        if self.answer is not None:
            first, stop = (self.answer[i] - self.offset(i)).tolist()
            names[first:stop] = [f"answer[{k}]" for k in range(stop - first)]
        names[start : end + 1] = [f"instruction[{k}]" for k in range(end + 1 - start)]
        # `inst` last: where the words' end merges with the template it is both inst and post[0]
        for name, column in reversed(list(zip(self.positions, self.index[i].tolist(), strict=True))):
            names[column - self.offset(i)] = name
        return names

    def __repr__(self) -> str:
        lengths = self.lengths.tolist()
        size = f"{len(lengths)} prompts of {min(lengths, default=0)} to {max(lengths, default=0)} tokens"
        ends = ", ".join(dict.fromkeys([*self.positions[:1], *self.positions[-1:]]))
        return f"TokenBatch({size}; {len(self.positions)} named positions: {ends})"


def joined(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The prompts of several batches of one template and without answers, one batch after the other."""
    width = max(batch.tokens.shape[1] for batch in batches)

    def wide(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))

    return replace(
        batches[0],
        prompts=tuple(prompt for batch in batches for prompt in batch.prompts),
        tokens=torch.cat([wide(batch.tokens) for batch in batches]),
        mask=torch.cat([wide(batch.mask) for batch in batches]),
        index=torch.cat([batch.index for batch in batches]),
        instruction=torch.cat([batch.instruction for batch in batches]),
        merged=torch.cat([batch.merged for batch in batches]),
    )


def tokenize(
    prompts: Prompts,
    template: ChatTemplate,
    *,
    padding_side: str = "right",
    allow_special: bool = False,
) -> TokenBatch:
    """Render and tokenise prompts with the chat template and name their positions; texts get ids (`as_prompts`).

    Raises UserError for empty text, for template tokens inside the text (unless `allow_special`), for a
    template that can't hold the prompt, and for a tokenizer that can't tell where its tokens come from.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize("Bake a cake.", ml.template_of(model))
    >>> model.tokenizer.decode(batch.tokens[0, batch.at("inst")[0]])
    '.'
    """
    prompts = as_prompts(prompts)
    if not prompts:
        raise UserError("there are no prompts; give at least one")
    if padding_side not in ("left", "right"):
        raise UserError(f"there is no padding side {padding_side!r}; choose left or right")
    tokenizer = template.tokenizer
    structure = structure_of(template)
    placed = [
        place(prompt, rendered, template, structure, allow_special=allow_special)
        for prompt, rendered in zip(prompts, template.render_all(prompts), strict=True)
    ]
    warn_of_blanks(prompts, placed)
    n_post = count_post({row.after for row in placed}, template, structure)
    width = max(len(row.ids) for row in placed)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    tokens = torch.full((len(placed), width), fill, dtype=torch.long)
    mask = torch.zeros(len(placed), width, dtype=torch.bool)
    index = torch.empty(len(placed), 1 + n_post, dtype=torch.long)
    instruction = torch.empty(len(placed), 2, dtype=torch.long)
    for i, row in enumerate(placed):
        shift = width - len(row.ids) if padding_side == "left" else 0
        end = shift + len(row.ids)
        tokens[i, shift:end] = torch.tensor(row.ids)
        mask[i, shift:end] = True
        instruction[i] = torch.tensor([shift + row.start, shift + row.inst])
        # Counted from the end, so that a row whose first template token merged into `inst` keeps its roles.
        post = torch.arange(end - n_post, end).clamp(min=shift + row.inst)
        index[i] = torch.cat([torch.tensor([end - 1]) if template.is_raw else instruction[i, 1:], post])
    return TokenBatch(
        prompts=tuple(prompts),
        tokens=tokens,
        mask=mask,
        positions=(LAST,) if template.is_raw else ("inst", *(f"post[{k}]" for k in range(n_post))),
        index=index,
        instruction=instruction,
        merged=torch.tensor([row.merged for row in placed]),
        template=template.fingerprint,
    )


def token_text(tokenizer: Any, token: int) -> str:
    """The text that a token stands for, never empty.

    A token without text of its own is shown as the vocabulary writes it, and an id that the tokenizer has no token
    for (embeddings are often padded beyond the vocabulary) as "<id 151700>".
    """
    text: str = tokenizer.decode([token])
    if text:
        return text
    piece = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    return piece or f"<id {token}>"


def require_rows_for(ids: Sequence[int], what: str, n: int, tokenizer: Any) -> None:
    """UserError where one of the ids has no row in an embedding of `n` rows; `what` says whose ids they are."""
    token = next((token for token in ids if not 0 <= token < n), None)
    if token is None:
        return
    shown = f"{token_text(tokenizer, token)!r} (id {token})" if tokenizer is not None and token >= 0 else f"{token}"
    raise UserError(
        f"{what} has the token {shown}, and the model's embedding has {n} rows only; "
        "load the model with its own tokenizer, or resize its embedding and train the new rows"
    )
