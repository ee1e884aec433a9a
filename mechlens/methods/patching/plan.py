"""What is patched: a site at layers, named positions and heads; names opened up, what there is not refused."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mechlens.errors import UserError
from mechlens.methods.activations.collect import refuse_too_long, template_of
from mechlens.models.bridge import LanguageModel, d_model, n_layers
from mechlens.models.sites import n_heads, require_site
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import PromptPair
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.settings import Options

MODES = ("denoising", "noising")
ALL = "all"
"""Every token of the prompt, as positions token[0], token[1], ..."""


@dataclass(frozen=True)
class PatchPlan(Options):
    """What is patched.

    >>> ml.PatchPlan("z", layers=(1, 2), positions=("last",), heads=(0, 1)).mode
    'denoising'
    """

    site: str
    """One of mechlens.models.sites.SITES, such as resid_pre, attn_out, mlp_out or z."""
    layers: tuple[int, ...] | None = None
    """None is every layer."""
    positions: tuple[str, ...] = (ALL,)
    """Named positions: inst, post[*], instruction[*], last, token[k], token[-k], or all."""
    heads: tuple[int, ...] | None = None
    """None is every head of the site (key and value heads under grouped-query attention)."""
    mode: str = "denoising"
    """denoising: the clean value into the corrupt run; noising: the other way round."""
    read: str = "last"
    """Position whose logits the metric sees."""
    random_seed: int | None = None
    """A control: instead of the source's value, the run's own plus a random vector as long as the difference."""
    max_tokens: int | None = None
    """Tokens in a batch of the growing-batch engine; None chooses, and memory running out halves it."""


def tokenized_pairs(
    model: LanguageModel, pairs: Sequence[PromptPair], template: TemplateChoice
) -> tuple[TokenBatch, TokenBatch]:
    if not pairs:
        raise UserError("there are no pairs to patch; give at least one")
    used = template_of(model, template)
    both = tokenize([pair.clean for pair in pairs], used), tokenize([pair.corrupt for pair in pairs], used)
    for batch in both:
        refuse_too_long(model, batch)
    return both


def refuse_other_shape(model: LanguageModel, source: LanguageModel) -> None:
    shapes = [(n_layers(m), d_model(m), n_heads(m, "q"), n_heads(m, "k")) for m in (model, source)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the source model has another shape (layers, width, heads, key heads: {shapes[1]}, not {shapes[0]}); "
            "patching needs two checkpoints of one model"
        )


def opened_positions(
    both: tuple[TokenBatch, TokenBatch], plan: PatchPlan, pairs: Sequence[PromptPair]
) -> tuple[str, ...]:
    """The plan's position names opened up; absolute positions only where all prompts have one length."""
    if not plan.positions:
        raise UserError("there are no positions to patch; give at least one, such as inst, post[*] or all")
    lengths = torch.cat([batch.lengths for batch in both])
    opened: list[str] = []
    for name in plan.positions:
        if name == ALL or (name.startswith("token[") and not name.startswith("token[-")):
            uneven = [i for i in range(len(pairs)) if len({int(batch.lengths[i]) for batch in both}) > 1]
            if uneven or len(set(lengths.tolist())) > 1:
                raise UserError(
                    f"position {name!r} needs prompts of one length, and there are {sorted(set(lengths.tolist()))} "
                    "tokens; choose pairs of one length, or positions by role (inst, post[*], instruction[-1])"
                )
            opened += [f"token[{k}]" for k in range(int(lengths[0]))] if name == ALL else [name]
        elif name == "instruction[*]":
            words = torch.cat([batch.instruction[:, 1] - batch.instruction[:, 0] + 1 for batch in both])
            # Counted from the end, where `inst` is the same role in every prompt.
            opened += [f"instruction[{-k}]" for k in range(int(words.min()), 0, -1)]
        elif name.startswith(("instruction[", "token[")):
            opened.append(name)
        else:
            opened += both[0].resolve([name])
    if not opened:
        raise UserError(f"the positions {', '.join(plan.positions)} name no token of raw text; choose last or token[k]")
    return tuple(dict.fromkeys(opened))


def opened_axes(model: LanguageModel, plan: PatchPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    require_site(plan.site)
    if plan.mode not in MODES:
        raise UserError(f"there is no mode {plan.mode!r}; choose {' or '.join(MODES)}")
    there = n_layers(model)
    layers = tuple(range(there)) if plan.layers is None else plan.layers
    wrong = [layer for layer in layers if not 0 <= layer < there]
    if wrong or not layers:
        raise UserError(f"there is no layer {wrong[0] if wrong else 'at all'}; this model has blocks 0 to {there - 1}")
    count = n_heads(model, plan.site)
    heads = tuple(range(count)) if plan.heads is None else plan.heads
    if [head for head in heads if not 0 <= head < count] or (count and not heads):
        raise UserError(f"site {plan.site!r} has {count} heads in this model; heads {list(heads)} were asked for")
    return layers, heads
