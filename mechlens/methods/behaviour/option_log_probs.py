"""How likely a model holds each of several answers to one prompt, which is run once for all of them."""

import hashlib
import json
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.activations.collect import refuse_too_long, template_of
from mechlens.methods.activations.reading import FORMAT, halving
from mechlens.methods.behaviour.log_odds import said_tokens
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase, progress_bar
from mechlens.models.bridge import LanguageModel, checkpoint_now, dtype_of, has_hooks
from mechlens.models.engine.packed.branches import branches, plan_branches
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import tokenize
from mechlens.prompts.templates.template import TemplateChoice

MAX_TOKENS = 2048
"""Prompt tokens in one batch."""


def option_log_probs(
    model: LanguageModel,
    prompts: Prompts,
    options: Sequence[str],
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Float64[Tensor, "prompt option"]:
    """Log-probabilities of the same answers after each prompt, in nats; those of `answer_log_probs`, to rounding.

    >>> told = ml.option_log_probs(ml.load("smollm2"), ["Name a fruit.", "Name a stone."], ["Apple", "Granite"])
    >>> told.shape, bool((told < 0).all())
    (torch.Size([2, 2]), True)
    """
    said = [tuple(own) for own in said_tokens(model, options)]
    batch = tokenize(prompts, template_of(model, template))
    longest = max(map(len, said))
    refuse_too_long(model, batch, longest)
    rows = [batch.row(i) for i in range(len(batch.prompts))]
    keep = None if has_hooks(model) else cache
    made_by = [FORMAT, "option log-probs", *checkpoint_now(model).identity, str(dtype_of(model)), said]
    found = torch.zeros(len(rows), len(said), dtype=torch.float64)
    with phase("options"):
        bar = progress_bar(total=len(rows), title="options", unit="prompt")
        for members in plan_branches(model, rows, longest, MAX_TOKENS):
            chunk = [tuple(rows[i]) for i in members]
            key = hashlib.sha256(json.dumps([*made_by, chunk]).encode()).hexdigest()
            piece = None if keep is None else keep.get(key)
            if piece is None:
                piece = {"total": halving(lambda part: _walk(model, part, said), chunk)}
                if keep is not None:
                    keep.put(key, piece)
            found[members] = piece["total"]
            bar.update(len(members))
        bar.close()
    return found


def _walk(
    model: LanguageModel, prompts: Sequence[Sequence[int]], said: Sequence[tuple[int, ...]]
) -> Float64[Tensor, "prompt option"]:
    tree = branches(model, prompts, max(map(len, said)))
    total = torch.zeros(len(prompts), len(said), dtype=torch.float64)
    for place in range(max(map(len, said))):
        paths = list(dict.fromkeys(own[:place] for own in said if len(own) > place))
        logits = tree.logits([(i, path) for i in range(len(prompts)) for path in paths])
        likely = logits.double().log_softmax(dim=-1).view(len(prompts), len(paths), -1)
        for k, own in enumerate(said):
            if len(own) > place:
                total[:, k] += likely[:, paths.index(own[:place]), own[place]]
    return total
