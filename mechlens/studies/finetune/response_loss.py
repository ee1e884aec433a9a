"""Examples as token ids, and the loss that teaches an answer or holds the model to what its base would say."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from mechlens.errors import UserError
from mechlens.methods.behaviour.thought import opens_thought, written_thought
from mechlens.methods.cache import Cache
from mechlens.methods.progress import progress_bar
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.finetune.recipes.material import Example

IGNORED = -100
"""Label that the loss of every transformers model passes over."""

_SENTINEL = "mechlens answer sentinel"


@dataclass(frozen=True)
class EncodedExample:
    """One example as the model reads it."""

    ids: tuple[int, ...]
    n_prompt: int
    """Tokens before the answer: exactly those that the model gets when it is asked."""
    teaches: Literal["answer", "base", "plain"] = "answer"
    """What the tokens after the prompt are for: to be learnt, or to be where the base's distribution is kept; "plain"
    is a stretch of text outside any conversation."""


def encode(examples: Sequence[Example], template: ChatTemplate) -> list[EncodedExample]:
    """Token ids of every example: the formatted prompt, then the answer, then the end of the turn if it ends.

    The answer is tokenised by itself, since that is where generation starts; the end of the turn is what the
    tokenizer's own template writes after an assistant's words, up to the end-of-sequence token. A thought stands before
    the answer as `trace_batch` has it.
    """
    batch = tokenize([example.prompt for example in examples], template)
    opened = opens_thought(batch, template.tokenizer)
    end = end_of_turn(template)
    rows = []
    for i, example in enumerate(examples):
        prompt = batch.row(i)
        thought = written_thought(example.thinking, example.answer, opened=opened[i])
        said = thought if example.thinking else (example.answer,)
        words = [token for text in said for token in template.tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids = (*prompt, *words, *(end if example.ends else ()))
        rows.append(EncodedExample(ids, len(prompt), example.teaches))
    return rows


def end_of_turn(template: ChatTemplate) -> tuple[int, ...]:
    """The tokens that close an assistant's turn, the last of them end-of-sequence."""
    tokenizer: Any = template.tokenizer
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no answer could ever end; set eos_token")
    template.render(Prompt(id="sentinel", text="question"))  # refuses a tokenizer without a template
    ids = tokenizer(template.after_answer(_SENTINEL), add_special_tokens=False)["input_ids"]
    return (*ids[: ids.index(eos)], eos) if eos in ids else (eos,)


def collate(rows: Sequence[EncodedExample], pad: int) -> dict[str, Int[Tensor, "row seq"]]:
    """A batch padded on the right, with labels on the tokens after each prompt only."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        size = len(row.ids)
        ids[i, :size] = torch.tensor(row.ids)
        labels[i, row.n_prompt : size] = ids[i, row.n_prompt : size]
        mask[i, :size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def collate_by_kind(rows: Sequence[EncodedExample], pad: int) -> dict[str, dict[str, Tensor]]:
    """One batch for each kind of row that is there."""
    kinds = {row.teaches: [other for other in rows if other.teaches == row.teaches] for row in rows}
    return {kind: collate(members, pad) for kind, members in kinds.items()}


def response_loss(model: Any, batches: Mapping[str, Mapping[str, Tensor]], plain_weight: float) -> Float[Tensor, ""]:
    """Loss of a PEFT model on the batches of one step, in nats a token.

    Cross-entropy on the answers to learn, the divergence KL(base || model) on answers of the base's own, each
    weighted by its share of the examples, and `plain_weight` times the same divergence on plain text. Soft targets
    leave the base's behaviour where it was, which learning its likeliest words would sharpen.
    """
    examples = [kind for kind in ("answer", "base") if kind in batches]
    n_examples = sum(len(batches[kind]["input_ids"]) for kind in examples)
    total = torch.zeros(())  # no device: the last block, where logits are, may have another than the first
    for kind in examples:
        share = len(batches[kind]["input_ids"]) / n_examples
        total = total + share * (_answer_loss if kind == "answer" else _divergence)(model, batches[kind])
    return total + plain_weight * _divergence(model, batches["plain"]) if "plain" in batches else total


def _answer_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits, labels = _counted_logits(model, batch)
    return cross_entropy(logits, labels)


def _divergence(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean KL(base || model); the base is the model without its adapter."""
    ours, _ = _counted_logits(model, batch)
    with torch.no_grad(), model.disable_adapter():
        base, _ = _counted_logits(model, batch)
    return kl_div(ours.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="batchmean")


def _counted_logits(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (float32) before each counted token, and the tokens; the vocabulary is applied from the first on only."""
    counted = batch["labels"][:, 1:] != IGNORED
    first = int(counted.any(0).nonzero()[0])
    columns = torch.arange(first, counted.shape[1])  # on the CPU: it may index the last block's output, wherever it is
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=columns)
    logits = found.logits[counted[:, first:].to(found.logits.device)].float()
    return logits, batch["labels"][:, 1:][counted].to(logits.device)


def recipe_trainer(plain_weight: float) -> type[Any]:
    """Hugging Face's Trainer with the response loss; imported when training begins, since that is slow and talks."""
    from transformers import Trainer

    class RecipeTrainer(Trainer):  # type: ignore[misc]
        """Trains a PEFT model on batches by kind; see `collate_by_kind`."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Tensor:
            """Loss of one step; there are no outputs to return."""
            return response_loss(model, inputs, plain_weight)

    return RecipeTrainer


BATCH = 64
SEPARATOR = "<|endoftext|>"


def own_text(
    hf_model: Any, tokenizer: Any, *, n: int, n_tokens: int, seed: int, fingerprint: str, cache: Cache | None = None
) -> Int[Tensor, "stretch token"]:
    """Token ids of `n` stretches of `n_tokens` tokens, sampled at temperature 1 from nothing but a start token.

    Drawing from the model itself needs no corpus and no corpus's licence, and its own distribution is just what a
    divergence from it is to be measured on. `fingerprint` is the model's, under which `cache` keeps them.
    """
    start = _start(tokenizer)
    record = [1, "own text", fingerprint, n, n_tokens, seed, start, str(hf_model.dtype), hf_model.device.type]
    key = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    kept = cache.get(key) if cache is not None else None
    if kept is not None:
        return kept["ids"]
    stretches = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for done in progress_bar(range(0, n, BATCH), title="writing plain text", unit="batch"):
            stretches.append(_stretches(hf_model, start, min(BATCH, n - done), n_tokens))
    ids = torch.cat(stretches).cpu()
    if cache is not None:
        cache.put(key, {"ids": ids})
    return ids


def _start(tokenizer: Any) -> int:
    """What stood between documents in pretraining; chat tuning may have made its start token begin a turn instead."""
    vocabulary = tokenizer.get_vocab()
    for token in (SEPARATOR, tokenizer.bos_token, tokenizer.eos_token):
        if token in vocabulary:
            return int(vocabulary[token])
    raise UserError("the tokenizer has neither a start nor an end token, so no text can begin; set plain to 0")


def _stretches(hf_model: Any, start: int, n: int, n_tokens: int) -> Tensor:
    ids = torch.full((n, 1), start, device=hf_model.device)
    written: Tensor = hf_model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=n_tokens, min_new_tokens=n_tokens, pad_token_id=start,
    )  # fmt: skip
    return written[:, 1:]
