"""What an intervention breaks: cross-entropy on plain text and on the model's own answers, KL, repetition, silence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.reading import halving
from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.steering.interventions import ALL, Ablate, Add, Intervention
from mechlens.methods.steering.steering import applied
from mechlens.models.bridge import LanguageModel, checkpoint_now, device_of, embedding_rows, is_bridge, loaded
from mechlens.models.engine.probes import require_finite_logits
from mechlens.prompts.batch import TokenBatch, require_rows_for

PLAIN_TEXT = (
    "The train to the coast leaves at nine in the morning and arrives a little before noon.",
    "Water boils at a lower temperature in the mountains, because the air presses less on it.",
    "She put the bread into the oven, set the timer and went out to look after the tomatoes.",
    "Most of the island is covered by forest, and the two villages lie on its eastern side.",
    "A triangle with three equal sides also has three equal angles of sixty degrees each.",
    "The library opens at ten on Saturdays; children can borrow up to five books at a time.",
    "In autumn the leaves of the maple turn red before they fall, and the paths grow slippery.",
    "He learned to play the violin from his aunt, who had been a teacher in the next town.",
    "The committee will meet again in March to discuss the budget for the new swimming pool.",
    "Bees find their way home by the position of the sun and by landmarks that they remember.",
    "To paint a wall, clean it first, cover the floor, and begin with the corners and edges.",
    "The museum shows coins, tools and clothes that were found when the harbour was built.",
)
"""Sentences that nobody would refuse to read, of our own."""
_ROWS = 4
"""Texts run at once: logits of every token over a large vocabulary are large."""


@dataclass(frozen=True)
class Damage:
    """Losses in nats per token, one value a text; lower is better, and the unsteered model's stand beside them."""

    plain: Float[Tensor, " text"]
    """Cross-entropy of plain text."""
    own: Float[Tensor, " prompt"]
    """Cross-entropy of the model's own unsteered answers, given the steered prompt."""
    kl: Float[Tensor, " prompt"]
    """KL(unsteered || steered), mean over all tokens of those answers."""


def damage(
    model: LanguageModel,
    intervention: Add | Ablate | None,
    batch: TokenBatch,
    answers: Answers,
    texts: Sequence[str] = PLAIN_TEXT,
) -> Damage:
    """Losses under an intervention, which acts on every token of the plain texts; None is the unsteered model.

    `answers` are the unsteered answers to the batch; empty ones are left out.
    """
    return damage_of_each(model, [intervention], batch, answers, texts)[0]


def damage_of_each(
    model: LanguageModel,
    interventions: Sequence[Add | Ablate | None],
    batch: TokenBatch,
    answers: Answers,
    texts: Sequence[str] = PLAIN_TEXT,
) -> list[Damage]:
    """`damage` of several interventions, for all of which the unsteered model is run once."""
    ids = _ids_of(model, texts)
    losses = answer_losses(model, [[] if one is None else [one] for one in interventions], batch, answers)
    return [Damage(_on_texts(model, one, ids), own, kl) for one, (own, kl) in zip(interventions, losses, strict=True)]


def answer_losses(
    model: LanguageModel, conditions: Sequence[Sequence[Intervention]], batch: TokenBatch, answers: Answers
) -> Float[Tensor, "condition 2 prompt"]:
    """Cross-entropy of given answers under each condition (nats per token), and KL(unsteered || steered) over them.

    Answers that hold no token are left out; UserError where none does.
    """
    rows = [i for i, tokens in enumerate(answers.tokens) if tokens]
    if not rows:
        raise UserError("the model said nothing to any of the prompts, so there is no answer to be damaged")
    longest = max(len(batch.row(i)) + len(answers.tokens[i]) for i in rows)

    def run(chunk: list[int]) -> Tensor:
        return _on_answers(model, conditions, batch, answers, chunk)

    return torch.cat([halving(run, chunk, longest) for chunk in chunks(rows)]).permute(1, 2, 0)


def said_texts(model: LanguageModel, batch: TokenBatch, texts: Sequence[str]) -> Answers:
    """Texts as if they were the answers to a batch, one to each prompt, for `answer_losses`."""
    return Answers(
        ids=tuple(prompt.id for prompt in batch.prompts),
        texts=tuple(texts),
        tokens=tuple(tuple(row) for row in _ids_of(model, texts)),
        max_new_tokens=max(map(len, texts)),
        checkpoint=checkpoint_now(model),
        template=batch.template,
        engine="plain",
    )


def plain_loss(
    model: LanguageModel, intervention: Add | Ablate | None, texts: Sequence[str] = PLAIN_TEXT
) -> Float[Tensor, " text"]:
    """Cross-entropy of plain texts (nats per token) under an intervention on every token; None is the model itself."""
    return _on_texts(model, intervention, _ids_of(model, texts))


@torch.inference_mode()
def _on_answers(
    model: LanguageModel,
    interventions: Sequence[Sequence[Intervention]],
    batch: TokenBatch,
    answers: Answers,
    rows: list[int],
) -> Float[Tensor, "prompt intervention 2"]:
    """Cross-entropy of each answer under each intervention, and its KL from the unsteered model."""
    asked = answered(model, batch, answers, rows)
    clean = asked.told(logits_everywhere(model, asked.tokens))
    found = []
    for one in interventions:
        steered = clean
        if one:
            with applied(model, list(one), asked.prompts, said=asked.longest):
                steered = asked.told(logits_everywhere(model, asked.tokens))
        for i, (p, q) in enumerate(zip(clean, steered, strict=True)):
            said = torch.tensor(asked.ids[i][asked.starts[i] :])
            found.append(torch.stack([-q.gather(1, said[:, None]).mean(), (p.exp() * (p - q)).sum(dim=-1).mean()]))
    return torch.stack(found).reshape(len(interventions), len(rows), 2).transpose(0, 1)


@dataclass(frozen=True)
class Answered:
    """Prompts with their answers after them, in one block of tokens without padding on the left."""

    prompts: TokenBatch
    """The prompts alone, placed as they stand there, which is how interventions find their tokens."""
    ids: list[list[int]]
    starts: list[int]
    """Where each answer begins."""
    tokens: Int[Tensor, "row token"]

    @property
    def longest(self) -> int:
        """Most tokens of an answer."""
        return max(len(row) - start for row, start in zip(self.ids, self.starts, strict=True))

    def read(self, logits: Float[Tensor, "row token vocab"]) -> list[Float[Tensor, "said vocab"]]:
        """Logits of each answer's tokens."""
        return _read(logits, self.ids, self.starts)

    def told(self, logits: Float[Tensor, "row token vocab"]) -> list[Float[Tensor, "said vocab"]]:
        """Log-probabilities of each answer's tokens."""
        return _told(logits, self.ids, self.starts)


def answered(model: LanguageModel, batch: TokenBatch, answers: Answers, rows: Sequence[int]) -> Answered:
    """Some of a batch's prompts with their answers."""
    part = batch.select(list(rows))
    ids = [[*batch.row(i), *answers.tokens[i]] for i in rows]
    tokens = _padded(ids, model)
    # The prompt starts each row, whatever the batch's own padding, and the answer follows it at once.
    width = int(part.lengths.max())
    bare = replace(
        part,
        tokens=tokens[:, :width].cpu(),
        mask=torch.arange(width) < part.lengths[:, None],
        index=part.index - _offsets(part),
        instruction=part.instruction - _offsets(part),
    )
    return Answered(bare, ids, [len(batch.row(row)) for row in rows], tokens)


def _told(logits: Tensor, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """Log-probabilities of each row's tokens from a place on, in float64 on the CPU."""
    return [part.double().log_softmax(dim=-1) for part in _read(logits, ids, starts)]


def _read(logits: Tensor, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """Logits of each row's tokens from a place on, on the CPU: only what is read, in one move."""
    read = [logits[i, start - 1 : len(row) - 1] for i, (row, start) in enumerate(zip(ids, starts, strict=True))]
    return list(torch.split(torch.cat(read).cpu(), [len(part) for part in read]))


def _ids_of(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = loaded(model).tokenizer
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    for text, row in zip(texts, ids, strict=True):
        require_rows_for(row, f"the text {text[:40]!r}", embedding_rows(model), tokenizer)
    return ids


def _on_texts(model: LanguageModel, one: Add | Ablate | None, ids: Sequence[Sequence[int]]) -> Float[Tensor, " text"]:
    everywhere = [] if one is None else [replace(one, positions=ALL, phase="both")]

    def run(chunk: list[int]) -> Tensor:
        own = [ids[i] for i in chunk]
        with torch.inference_mode(), applied(model, everywhere):
            told = _told(logits_everywhere(model, _padded(own, model)), own, [1] * len(own))
        after = [torch.tensor(row[1:])[:, None] for row in own]
        return torch.stack([-one.gather(1, said).mean() for one, said in zip(told, after, strict=True)])

    longest = max(map(len, ids))
    return torch.cat([halving(run, chunk, longest) for chunk in chunks([i for i, x in enumerate(ids) if len(x) > 1])])


def logits_everywhere(model: LanguageModel, tokens: Tensor) -> Float[Tensor, "row token vocab"]:
    """Of the next token at every token, through the hook points at which interventions act."""
    logits = (
        model.original_model(tokens, use_cache=False).logits if is_bridge(model) else model(tokens, prepend_bos=False)
    )
    require_finite_logits(logits)
    found: Tensor = logits
    return found


def _padded(ids: Sequence[Sequence[int]], model: LanguageModel) -> Tensor:
    """Right-padded, where causal attention doesn't see it."""
    width = max(map(len, ids))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=device_of(model))


def _offsets(batch: TokenBatch) -> Tensor:
    return torch.tensor([[batch.offset(i)] for i in range(len(batch.prompts))])


def chunks(rows: list[int]) -> Iterator[list[int]]:
    """As many at once as logits of every token allow."""
    for low in range(0, len(rows), _ROWS):
        yield rows[low : low + _ROWS]


def repetition(tokens: Sequence[int]) -> float:
    """Share of an answer's token triples that were there before; 0 for answers of fewer than four tokens."""
    triples = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0
