"""What the model says: greedy answers to prompts, kept with their labels so that judging again needs no model."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from mechlens.errors import UserError
from mechlens.methods.activations.collect import refuse_too_long, template_of
from mechlens.methods.activations.reading import FORMAT, halving, shared_start
from mechlens.methods.behaviour.thought import answer_texts
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel, checkpoint_now, device_of, dtype_of, has_hooks, loaded
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.generate import greedy_batch
from mechlens.models.engine.reference import reference_engine, reference_greedy
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate

if TYPE_CHECKING:
    import pandas

NO_TOKEN = -1
FAST = "fast"


@dataclass(frozen=True)
class Answers:
    """Greedy answers of one checkpoint, one per prompt."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    """In words. A thought stays in its marks, and where the template opened it, the answer begins with its mark."""
    tokens: tuple[tuple[int, ...], ...]
    """Answer tokens without the end-of-sequence token."""
    max_new_tokens: int
    checkpoint: Checkpoint
    template: str
    engine: str
    """"fast" (shared prefix, packed cache), or one of `reference_engine`: "plain", "native" or "uncached"."""
    why_plain: str = field(default="", kw_only=True)
    """Why the fast path was not taken; empty where it was."""

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """The first answer token of every prompt; NO_TOKEN where the model said nothing."""
        return tuple(tokens[0] if tokens else NO_TOKEN for tokens in self.tokens)

    def select(self, rows: Iterable[int]) -> "Answers":
        """Those to some of the prompts."""
        kept = list(rows)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in kept),
            texts=tuple(self.texts[i] for i in kept),
            tokens=tuple(self.tokens[i] for i in kept),
        )

    def table(self) -> "pandas.DataFrame":
        """One row per prompt: id, answer, number of tokens."""
        import pandas as pd

        lengths = [len(tokens) for tokens in self.tokens]
        return pd.DataFrame({"id": self.ids, "answer": self.texts, "n_tokens": lengths})


def answer(
    model: LanguageModel,
    prompts: Sequence[Prompt] | TokenBatch,
    *,
    max_new_tokens: int,
    template: ChatTemplate | None = None,
    cache: Cache | None = None,
    max_tokens: int = 4096,
) -> Answers:
    """Greedy answers of up to `max_new_tokens` tokens; equal to answering one prompt at a time.

    Greedy means the likeliest token: sampling settings and repetition penalties of the model don't count.
    `cache` keeps finished batches, so that a killed run goes on; `max_tokens` bounds prompt tokens in a batch.

    Raises UserError for a model without a tokenizer and where prompt and answer don't fit into the context.
    """
    tokenizer = loaded(model).tokenizer
    if tokenizer is None:
        raise UserError("the model has no tokenizer to write answers with; load it with its tokenizer")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; ask for at least one token")
    batch = prompts if isinstance(prompts, TokenBatch) else tokenize(prompts, template or template_of(model))
    rows = [Row(tuple(ids := batch.row(i)), (len(ids) - 1,)) for i in range(len(batch.prompts))]
    refuse_too_long(model, batch, max_new_tokens)
    if has_hooks(model):
        cache = None  # what hooks change is in no fingerprint, so nothing made under them is kept or reused
    fast = forward.fits_fast_path(model)
    engine = FAST if fast else reference_engine(model)
    checkpoint = checkpoint_now(model)
    found: dict[int, list[int]] = {}
    skip = forward.shared_prefix(rows) if fast else 0
    prefix = None
    # Every new token costs a pass of its own for each batch.
    cost = forward.BATCH_COST * max_new_tokens
    batches = forward.plan(rows, max_tokens, shared=skip, batch_cost=cost, equal_lengths=not fast)
    for members in tqdm(batches, desc="answering", unit="batch", delay=2, leave=False):
        chunk = [rows[i] for i in members]
        key = _key(model, checkpoint, chunk, max_new_tokens, skip, engine)
        piece = cache.get(key) if cache is not None else None
        if piece is None:
            if fast and skip and prefix is None:
                prefix = shared_start(model, rows[0].ids[:skip])
            piece = {"tokens": halving(_runner(model, max_new_tokens, fast, prefix), chunk)}
            if cache is not None:
                cache.put(key, piece)
        found.update(zip(members, piece["tokens"].tolist(), strict=True))
    tokens = tuple(tuple(t for t in found[i] if t != NO_TOKEN) for i in range(len(rows)))
    return Answers(
        ids=tuple(prompt.id for prompt in batch.prompts),
        texts=answer_texts(tokenizer, batch, tokens),
        tokens=tokens,
        max_new_tokens=max_new_tokens,
        checkpoint=checkpoint,
        template=batch.template,
        engine=engine,
        why_plain=forward.why_plain(model),
    )


def _runner(model: LanguageModel, max_new_tokens: int, fast: bool, prefix: Any) -> Any:
    """A batch of rows to a block of token ids, padded with NO_TOKEN, which is what a cache can hold."""

    def run(chunk: list[Row]) -> torch.Tensor:
        rows = (
            greedy_batch(model, chunk, max_new_tokens, prefix)
            if fast
            else reference_greedy(model, chunk, max_new_tokens)
        )
        return torch.tensor([row + [NO_TOKEN] * (max_new_tokens - len(row)) for row in rows], dtype=torch.long)

    return run


def _key(
    model: LanguageModel, checkpoint: Checkpoint, rows: list[Row], max_new_tokens: int, skip: int, engine: str
) -> str:
    """Fingerprint of a batch: weights, type, every token id and how far to go."""
    record = [
        FORMAT, "answers", *checkpoint.identity, str(dtype_of(model)), device_of(model).type,
        engine, skip, max_new_tokens, [row.ids for row in rows],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
