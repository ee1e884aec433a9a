"""What the model says: answers to prompts, greedy or drawn, kept so that judging again needs no model."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from mechlens.errors import UserError
from mechlens.methods.activations.collect import refuse_too_long, tokenized
from mechlens.methods.activations.reading import FORMAT, halving, shared_start
from mechlens.methods.behaviour.drawing import Draws, drawn_batch, require_length, streams_of
from mechlens.methods.behaviour.judges import OnceSettled
from mechlens.methods.behaviour.served.agreement import Served
from mechlens.methods.behaviour.thought import answer_texts
from mechlens.methods.cache import Cache
from mechlens.methods.progress import batch_of, phase, steps, told
from mechlens.methods.shown import cut, html_with, lines
from mechlens.models.bridge import LanguageModel, checkpoint_now, device_of, dtype_of, has_hooks, loaded
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.generate import Decided, greedy_batch
from mechlens.models.engine.reference import reference_engine, reference_greedy
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.same import Comparable
from mechlens.prompts.templates.template import TemplateChoice

if TYPE_CHECKING:
    import pandas

NO_TOKEN = -1
FAST = "fast"


@dataclass(frozen=True, repr=False, eq=False)
class Answers(Comparable):
    """Answers of one checkpoint, greedy ones, one per prompt, unless `drawn` says how they were drawn.

    >>> model = ml.load("smollm2")
    >>> said = ml.answer(model, ml.builtin_prompts("harmful")[:4], max_new_tokens=8)
    >>> list(said.table().columns)
    ['id', 'answer', 'n_tokens']
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    """In words. A thought stays in its marks, and where the template opened it, the answer begins with its mark."""
    tokens: tuple[tuple[int, ...], ...]
    """Answer tokens without the end-of-sequence token."""
    max_new_tokens: int
    checkpoint: Checkpoint
    template: str
    engine: str
    """"fast" (shared prefix, packed cache), one of `reference_engine` ("plain", "native", "uncached"), or "served"."""
    why_plain: str = field(default="", kw_only=True)
    """Why the fast path was not taken; empty where it was."""
    cut: tuple[bool, ...] = field(default=(), kw_only=True)
    """Which answers were left off once they were decided; empty where all were written to their end."""
    drawn: str = field(default="", kw_only=True)
    """Temperature, top-p and seed in words; empty where the answers are greedy."""
    draw: tuple[int, ...] = field(default=(), kw_only=True)
    """Which draw of its prompt each answer is, by number, as in its id (prompt#0, prompt#1, ...); empty where each
    prompt has one answer."""
    served: Served | None = field(default=None, kw_only=True)
    """By which server they were written, and how far it agrees with the loaded model; None where that wrote them."""

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
            cut=tuple(self.cut[i] for i in kept if self.cut),
            draw=tuple(self.draw[i] for i in kept if self.draw),
        )

    def table(self) -> "pandas.DataFrame":
        """One row per answer: id, answer, number of tokens; of several to a prompt its id and the draw too."""
        import pandas as pd

        lengths = [len(tokens) for tokens in self.tokens]
        frame = pd.DataFrame({"id": self.ids, "answer": self.texts, "n_tokens": lengths})
        if self.draw:
            frame = frame.assign(prompt=[name.rpartition("#")[0] for name in self.ids], draw=self.draw)
        return frame

    def __repr__(self) -> str:
        title = f"{type(self).__name__} of {self.checkpoint.name}: {len(self.texts)}, {self.drawn or 'greedy'}"
        asked = list(zip(self.ids, self.texts, strict=True))
        first = enumerate(asked[:3])
        facts = {f"{i} ({cut(name, 40)})": repr(cut(text, 80)) for i, (name, text) in first}
        if len(asked) > len(facts):
            facts["and"] = f"{len(asked) - len(facts)} more"
        return lines(f"{title}, of up to {self.max_new_tokens} tokens", facts)

    def _repr_html_(self) -> str:
        return html_with(repr(self).partition("\n")[0], self.table())


def answer(
    model: LanguageModel,
    prompts: Prompts | TokenBatch,
    *,
    max_new_tokens: int,
    template: TemplateChoice = "tokenizer",
    temperature: float = 0.0,
    top_p: float = 1.0,
    n: int = 1,
    seed: int = 0,
    decided: OnceSettled | None = None,
    cache: Cache | None = None,
    max_tokens: int | None = None,
) -> Answers:
    """Answers of up to `max_new_tokens` tokens; equal to answering one prompt at a time.

    They are greedy, the likeliest token each time, unless a `temperature` is given: then each token is drawn as
    transformers draws it, among the likeliest that have the share `top_p` together, and there are `n` answers to each
    prompt (ids prompt#0, prompt#1, ...). The same `seed` gives a prompt the same answers, whatever stands beside it.
    Sampling settings and repetition penalties of the model itself don't count.
    An answer that is `decided` so far is left off there (see `once_settled`). `cache` keeps finished batches, so that a
    killed run goes on; `max_tokens` bounds prompt tokens in a batch (4096 on a CPU, 16384 on a GPU).

    Raises UserError for a model without a tokenizer and where prompt and answer don't fit into the context.

    >>> model = ml.load("smollm2")
    >>> said = ml.answer(model, ["How do I bake a cake?", "Say hello."], max_new_tokens=8)
    >>> len(said.texts), max(map(len, said.tokens)) <= 8
    (2, True)
    >>> ml.answer(model, "Say hello.", max_new_tokens=8, temperature=0.7, n=3, seed=1).ids
    ('prompt-0000#0', 'prompt-0000#1', 'prompt-0000#2')
    """
    tokenizer = loaded(model).tokenizer
    if tokenizer is None:
        raise UserError("the model has no tokenizer to write answers with; load it with its tokenizer")
    require_length(max_new_tokens)
    batch = tokenized(model, prompts, template)
    draws = Draws(temperature, top_p, n, seed)
    streams = streams_of(batch, draws)
    batch = drawn_batch(batch, n)
    rows = [_AnsweredRow(tuple(ids := batch.row(i)), (len(ids) - 1,), streams[i]) for i in range(len(batch.prompts))]
    refuse_too_long(model, batch, max_new_tokens)
    if has_hooks(model):
        cache = None  # what hooks change is in no fingerprint, so nothing made under them is kept or reused
    fast = forward.fits_fast_path(model)
    engine = FAST if fast else reference_engine(model)
    checkpoint = checkpoint_now(model)
    found: dict[int, list[int]] = {}
    skip = forward.own_start(model, rows) if fast else 0
    prefix = None
    on_cpu = device_of(model).type == "cpu"
    # Every new token costs a pass of its own for each batch.
    cost = (forward.BATCH_COST if on_cpu else forward.GPU_BATCH_COST) * max_new_tokens
    most = forward.batch_tokens(model, max_tokens or (4096 if on_cpu else 16384))
    batches = forward.plan(rows, most, shared=skip, batch_cost=cost, equal_lengths=not fast)
    run = _Runner(model, max_new_tokens, fast, decided, draws)
    work = sum(len(row.ids) - skip + max_new_tokens for row in rows)
    bar = steps(len(rows), "answering", "prompt", work)
    with phase("answering"):
        for members in batches:
            chunk = [rows[i] for i in members]
            key = _key(model, checkpoint, chunk, max_new_tokens, skip, engine, decided, draws)
            piece = cache.get(key) if cache is not None else None
            if piece is None:
                if fast and skip and prefix is None:
                    prefix = shared_start(model, rows[0].ids[:skip])
                with batch_of(bar, len(members), max_new_tokens):
                    piece = {"tokens": halving(functools.partial(run, prefix), list(chunk))}
                if cache is not None:
                    cache.put(key, piece)
            else:
                bar.found(len(members))
            found.update(zip(members, piece["tokens"].tolist(), strict=True))
    bar.close()
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
        drawn=draws.described,
        draw=tuple(i % n for i in range(len(rows))) if n > 1 else (),
        cut=() if decided is None else tuple(len(own) < max_new_tokens and decided(list(own)) for own in tokens),
    )


@dataclass(frozen=True)
class _AnsweredRow(Row):
    """A row with the stream of numbers that its answer is drawn by."""

    stream: str


@dataclass(frozen=True)
class _Runner:
    """A batch of rows to a block of token ids, padded with NO_TOKEN, which is what a cache can hold."""

    model: LanguageModel
    max_new_tokens: int
    fast: bool
    decided: Decided | None
    draws: Draws

    def __call__(self, prefix: Any, chunk: list[Row]) -> torch.Tensor:
        pick = self.draws.pick([row.stream for row in cast(list[_AnsweredRow], chunk)])
        if self.fast:
            rows = greedy_batch(self.model, chunk, self.max_new_tokens, prefix, None, told(self.decided), None, pick)
        else:
            whole = reference_greedy(self.model, chunk, self.max_new_tokens, pick)
            rows = [until_decided(row, self.decided) for row in whole]
        padded = [row + [NO_TOKEN] * (self.max_new_tokens - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long)


def until_decided(row: list[int], decided: Decided | None) -> list[int]:
    """The row up to where it is decided, if it ever is."""
    if decided is None:
        return row
    return row[: next((end for end in range(1, len(row) + 1) if decided(row[:end])), len(row))]


def _key(
    model: LanguageModel,
    checkpoint: Checkpoint,
    rows: Sequence[_AnsweredRow],
    max_new_tokens: int,
    skip: int,
    engine: str,
    decided: OnceSettled | None,
    draws: Draws,
) -> str:
    """Fingerprint of a batch: weights, type, every token id, how far to go, what ends it sooner and what is drawn."""
    record = [
        FORMAT, "answers", *checkpoint.identity, str(dtype_of(model)), device_of(model).type,
        engine, skip, max_new_tokens, [row.ids for row in rows], *([] if decided is None else [decided.key]),
        *([] if draws.greedy else [draws.key, [row.stream for row in rows]]),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
