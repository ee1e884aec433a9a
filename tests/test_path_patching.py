"""Path patching: TransformerLens' sweep against one written here, its silence before an edge exists, its refusals."""

from typing import Any

import pytest
import torch
from test_patching import CLOSE, LONG, METRIC, UNEVEN, model_of, pair, plain_logits, short
from test_patching_truth import HEAD, PAIRS, circuit, token
from torch import Tensor
from transformer_lens.utilities.statistics import sign_flip_permutation_pvalue

from mechlens.errors import UserError
from mechlens.methods.patching.metrics import KLDivergence, LogitDifference
from mechlens.methods.patching.paths import path_sweep
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.models.bridge import has_hooks
from mechlens.prompts.batch import tokenize

pytestmark = pytest.mark.exact


@torch.inference_mode()
def by_hand(model: Any, start: list[int], source: list[int], sender: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Last logits with one head's query recomputed from a residual that holds the sender's other write (llama).

    The difference is added to the block's input for a pass of its own, and only the head's query is taken from there.
    """
    layer, head = sender
    write = model.blocks[layer].attn.W_O[head]
    found = []
    for ids in (start, source):
        _, cache = model.run_with_cache(torch.tensor([ids]))
        found.append(cache[f"blocks.{layer}.attn.hook_z"][0, :, head] @ write)
    queries: list[Tensor] = []

    def shifted(value: Tensor, hook: Any) -> Tensor:
        return value + (found[1] - found[0])

    def taken(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, to[1]] = queries[0][:, :, to[1]]
        return value

    name = f"blocks.{to[0]}"
    tokens = torch.tensor([start])
    model.run_with_hooks(
        tokens,
        fwd_hooks=[
            (f"{name}.hook_resid_pre", shifted),
            (f"{name}.attn.hook_q", lambda v, hook: queries.append(v.clone())),
        ],
    )
    return model.run_with_hooks(tokens, fwd_hooks=[(f"{name}.attn.hook_q", taken)])[0, -1]


@pytest.mark.parametrize("mode", ["denoising", "noising"])
def test_equals_a_query_taken_from_a_run_with_the_other_write(mode: str) -> None:
    model, metric = model_of("llama"), LogitDifference(40, 50)
    got = path_sweep(model, LONG, metric, (0, 1), mode=mode, template=short())
    assert (got.layers, got.heads, got.values.shape) == ((1, 2), (0, 1, 2, 3), (1, 2, 1, 4))
    assert got.site == "q from head 0.1"
    rows = [tokenize([getattr(LONG[0], side)], short()).row(0) for side in ("clean", "corrupt")]
    start, source = rows[::-1] if mode == "denoising" else rows
    ends = [float(metric(plain_logits(model, row)[None], plain_logits(model, row))) for row in rows]
    assert float(got.clean) == pytest.approx(ends[0], abs=CLOSE)
    assert float(got.corrupt) == pytest.approx(ends[1], abs=CLOSE)
    for a, layer in enumerate(got.layers):
        for head in got.heads:
            logits = by_hand(model, start, source, (0, 1), (layer, head))
            assert float(metric(logits[None], logits)) == pytest.approx(float(got.values[0, a, 0, head]), abs=CLOSE)
    assert float(got.effect().abs().min()) > 10 * CLOSE
    assert not has_hooks(model)


def test_the_planted_edge_is_found_in_the_values_of_the_head_that_reads_it() -> None:
    """Head (0, 1) writes what head (1, 2) copies on: through its values, and no other head's anything."""
    metric = LogitDifference(token("A"), token("B"))
    for planted, expected in ((True, 1.0), (False, 0.0)):
        for receiver in ("q", "k", "v"):
            got = path_sweep(circuit(planted), PAIRS, metric, (0, 1), receiver=receiver, template=short())
            assert got.heads == tuple(range(HEAD))
            effect = got.effect()[0, 0, 0] / (got.clean - got.corrupt if planted else 1.0)
            at = effect[2] if receiver == "v" else torch.tensor(0.0)
            assert float(at) == pytest.approx(expected if receiver == "v" else 0.0, abs=1e-5)
            assert float(effect[[head for head in range(8) if head != 2 or receiver != "v"]].abs().max()) < 1e-5
    other = path_sweep(circuit(True), PAIRS, metric, (0, 3), receiver="v", template=short())
    assert float(other.effect().abs().max()) < 1e-5


def test_the_statistics_equal_transformer_lens_where_both_hold() -> None:
    """One site, every pair its own family: their exact sign-flip p and ours by sampling are one number."""
    letters = "bcdfghjk"
    pairs = [
        pair(f"{x}ake a {y}ig one", f"{y}all a {x}ed pin", f"{x}{y}")
        for x, y in zip(letters, letters[::-1], strict=True)
    ]
    plan = PatchPlan("z", layers=(1,), positions=("last",), heads=(2,))
    got = patch_sweep(model_of("llama"), pairs, METRIC, plan, template=short())
    theirs = float(sign_flip_permutation_pvalue(got.effect().flatten().float(), dim=-1))
    ours = float(got.table(seed=0, resamples=10, n_flips=20000)["p_corrected"][0])
    assert 0.02 < theirs < 0.98
    assert ours == pytest.approx(theirs, abs=0.015)


REFUSED = {
    "choose pairs of one length": ("llama", UNEVEN, (0, 0), "q"),
    "GQA": ("llama", LONG, (0, 0), "v"),
    "normalized or scaled": ("gemma3", LONG, (0, 0), "q"),
    "can't patch paths in this model": ("opt", LONG, (0, 0), "q"),
    "no head 2.0 with layers above it": ("llama", LONG, (2, 0), "q"),
    "no head 0.4": ("llama", LONG, (0, 4), "q"),
    "no receiver 'z'": ("llama", LONG, (0, 0), "z"),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_done_is_said(sentence: str) -> None:
    architecture, pairs, sender, receiver = REFUSED[sentence]
    with pytest.raises(UserError, match=sentence):
        path_sweep(model_of(architecture), pairs, KLDivergence(), sender, receiver=receiver, template=short())
    assert not has_hooks(model_of(architecture))
