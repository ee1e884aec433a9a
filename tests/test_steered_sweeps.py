"""Laws of sweeps: rows that run as one, kept pieces and early leaving change no number; and less is really run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import DictShelf, Killed
from test_steering import MODELS, NEW, ablate, add, batch_of, direction, first_logits, made, told
from tiny import ARCHITECTURES
from torch import Tensor

from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.judges import OnceRefused, SubstringJudge
from mechlens.methods.steering import steered_batch as batching
from mechlens.methods.steering import steering
from mechlens.methods.steering.interventions import ALL, Add, Intervention
from mechlens.methods.steering.placed import Placement
from mechlens.methods.steering.starts import rows_with_starts
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.models.bridge import has_hooks, loaded
from mechlens.models.engine import shared_rows as merging
from mechlens.models.engine.forward import Row, shared_prefix
from mechlens.models.engine.shared_rows import shares_rows
from mechlens.models.native import native, native_blocks
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt

pytestmark = pytest.mark.exact


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    yield
    assert not any(has_hooks(model) for model in MODELS)


def layer_sweep(architecture: str, phase: str = "prompt") -> tuple[TokenBatch, list[list[Intervention]]]:
    """Three prompts under nothing, an addition at each of three layers, and an ablation of the last block."""
    settings: list[list[Intervention]] = [
        [],
        *([add(architecture, 1.5, layers=(layer,), phase=phase)] for layer in range(3)),
        [ablate(architecture, layers=(2,), sites=("attn_out", "mlp_out"), phase=phase)],
    ]
    rows = [setting for setting in settings for _ in range(3)]
    return batch_of(architecture).select([0, 1, 2] * len(settings)), rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_run_as_one_give_what_recomputation_gives(architecture: str) -> None:
    model = made(architecture)
    batch, rows = layer_sweep(architecture)
    logits, own = logits_under(model, batch, rows), first_logits(model, batch, rows)
    assert float((logits - own).abs().max()) < 1e-4 * float(own.abs().max())
    got = answer_under(model, batch, rows, max_new_tokens=3)
    some = [1, 5, 9, 14]
    expected = told(model, batch.select(some), [rows[i] for i in some], [got.tokens[i] for i in some])
    assert tuple(got.tokens[i] for i in some) == tuple(answer[:3] for answer in expected)


def test_only_what_can_have_changed_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    batch, rows = layer_sweep("llama")
    assert shares_rows(model)
    seen = rows_by_block(model, monkeypatch, lambda: logits_under(model, batch, rows))
    # The shared start first, from what is and isn't changed at block 0 on; then two prompts of like length, then one.
    assert seen == [[2, 3, 5], [4, 6, 10], [2, 3, 5]]
    monkeypatch.setattr(batching, "shares_rows", lambda model: False)
    assert rows_by_block(model, monkeypatch, lambda: logits_under(model, batch, rows)) == [[5] * 3, [10] * 3, [5] * 3]


def two_ends(architecture: str) -> tuple[TokenBatch, list[list[Intervention]]]:
    """Three requests, each with two questions after it, under nothing and pushes before the questions or everywhere."""
    requests = ("bake some good bread for us", "pick the lock of a door", "tell a story of a fox and a hen")
    texts = [f"{request}? {end}" for request in requests for end in ("bad or not", "ok")]
    batch = tokenize([Prompt(str(i), text) for i, text in enumerate(texts)], template_of(made(architecture)))
    ids = [batch.row(i) for i in range(len(texts))]
    before = [f"token[0:{shared_prefix([Row(tuple(ids[k]), (99,)) for k in (i, i ^ 1)])}]" for i in range(6)]
    rows: list[list[Intervention]] = [[]] * 6
    for layer in (0, 2):
        push = add(architecture, 1.5, layers=(layer,), phase="prompt")
        rows += [[replace(push, positions=(before[i],))] for i in range(6)]
        rows += [[push]] * 6
    return batch.select(list(range(6)) * 5), rows


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma2"])
def test_a_prompt_with_several_ends_is_run_once_up_to_them(architecture: str) -> None:
    model = made(architecture)
    batch, rows = two_ends(architecture)
    ids = [tuple(batch.row(i)) for i in range(30)]
    placement = Placement(3, batch)
    changes = [placement.changes(i, row) for i, row in enumerate(rows)]
    common, found = rows_with_starts(ids, changes, fast=True)
    assert all(row.skip > common for row in found)
    assert len({row.start for row in found}) == 3 * (1 + 2)  # the two scopes are alike up to the question
    assert len({row.common for row in found}) == 1 + 2
    logits = logits_under(model, batch, rows)
    alone = torch.cat([logits_under(model, batch.select([i]), [row]) for i, row in enumerate(rows)])
    assert float((logits - alone).abs().max()) < 1e-4 * float(alone.abs().max())
    got = answer_under(model, batch, rows, max_new_tokens=3, max_tokens=100)
    for i in (0, 7, 13, 20, 29):
        assert got.tokens[i] == answer_under(model, batch.select([i]), [rows[i]], max_new_tokens=3).tokens[0]


def rows_by_block(model: Any, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> list[list[int]]:
    """Rows that each block is run on, pass by pass."""
    seen: list[list[int]] = []
    with native(model):
        blocks = native_blocks(model)

    def count(number: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if number == 0:
                seen.append([])
            seen[-1].append(len(output if isinstance(output, Tensor) else output[0]))

        return hook

    handles = [block.register_forward_hook(count(i)) for i, block in enumerate(blocks)]
    with monkeypatch.context() as patch:
        patch.setattr("mechlens.models.engine.forward.has_hooks", lambda model: False)
        try:
            work()
        finally:
            for handle in handles:
                handle.remove()
    return seen


def test_a_model_that_can_not_merge_is_found_out_and_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("gpt2")
    monkeypatch.setattr(merging, "_FAULTS", {})

    def unfit(value: Any, rows: int) -> Any:
        raise TypeError("a mask for another number of rows")

    monkeypatch.setattr(merging, "_for_any_row", unfit)
    assert not shares_rows(model)
    batch, rows = layer_sweep("gpt2")
    own = first_logits(model, batch, rows)
    assert float((logits_under(model, batch, rows) - own).abs().max()) < 1e-4 * float(own.abs().max())


# Kept pieces


@pytest.mark.parametrize("kind", ["answers", "logits"])
def test_a_killed_sweep_goes_on_and_a_finished_one_is_not_repeated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    batch, rows = layer_sweep("llama", "both")
    calls: list[int] = []
    name = "greedy_batch" if kind == "answers" else "prompt_logits"
    run = getattr(steering, name)

    def counted(*args: Any) -> Any:
        calls.append(len(args[1]))
        return run(*args)

    monkeypatch.setattr(steering, name, counted)

    def ask(cache: DictShelf | None, rows: Sequence[Sequence[Intervention]] = rows) -> Any:
        calls.clear()
        if kind == "answers":
            return answer_under(model, batch, rows, max_new_tokens=NEW, max_tokens=200, cache=cache).tokens
        return logits_under(model, batch, rows, max_tokens=200, cache=cache).tolist()

    whole, cache = ask(None), DictShelf(room=2)
    pieces = len(calls)
    assert pieces > 3
    with pytest.raises(Killed):
        ask(cache)
    cache.room = 1000
    assert ask(cache) == whole
    assert len(calls) == pieces - 2
    assert ask(cache) == whole
    assert calls == []
    # Another strength, direction, layer or phase is another piece; the rows that are as before are found again.
    for changed in (
        add("llama", 1.6, layers=(2,), phase="both"),
        add("llama", 1.5, layers=(2,), phase="both", seed=1),
        add("llama", 1.5, layers=(1,), phase="both"),
        add("llama", 1.5, layers=(2,), phase="prompt"),
    ):
        other = [*rows[:9], *([changed] for _ in range(3)), *rows[12:]]
        assert ask(cache, other) == ask(None, other)


def test_functions_without_a_name_are_not_kept() -> None:
    model, batch = made("llama"), batch_of("llama")
    cache = DictShelf()
    answer_under(model, batch, [add("llama")], max_new_tokens=2, cache=cache, decided=lambda tokens: False)
    logits_under(model, batch, [add("llama")], cache=cache, reduce=lambda logits, rows: logits[:, :1])
    assert cache.pieces == {}
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda residual, hook: -3 * residual)]):
        logits_under(model, batch, [add("llama")], cache=cache)
    assert cache.pieces == {}
    decided = OnceRefused(SubstringJudge("x", ("a",), verbatim=True), loaded(model).tokenizer)
    answer_under(model, batch, [add("llama")], max_new_tokens=2, cache=cache, decided=decided)
    assert len(cache.pieces) == 1
    other = OnceRefused(SubstringJudge("x", ("b",), verbatim=True), loaded(model).tokenizer)
    answer_under(model, batch, [add("llama")], max_new_tokens=2, cache=cache, decided=other)
    assert len(cache.pieces) == 2


# Early leaving


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_verdicts_are_those_of_whole_answers(architecture: str) -> None:
    model, length = made(architecture), 12
    batch, rows = layer_sweep(architecture, "both")
    whole = answer_under(model, batch, rows, max_new_tokens=length)
    # A phrase that some answers hold in their middle.
    found = [text[2:4] for text in whole.texts if len(text) > 6 and text[2:4].strip()]
    judge = SubstringJudge("middle", (found[0],), ignore_case=False, verbatim=True)
    cut = answer_under(model, batch, rows, max_new_tokens=length, decided=OnceRefused(judge, loaded(model).tokenizer))
    assert judge(batch.prompts, cut.texts) == judge(batch.prompts, whole.texts)
    assert sum(map(len, cut.tokens)) < sum(map(len, whole.tokens))
    for short, long in zip(cut.tokens, whole.tokens, strict=True):
        assert long[: len(short)] == short
        assert short == long or judge([batch.prompts[0]], [model.tokenizer.decode(short).strip()]) == ["refused"]


def test_many_rows_leave_at_different_times() -> None:
    """More rows than leave one by one: some ended ones are carried along for a step or more."""
    model, batch = made("llama"), batch_of("llama")
    strengths = [-3 + 0.3 * k for k in range(20)]
    each: list[list[Intervention]] = [
        [Add(direction("llama", 3), strength=s, unit="raw", layers=(1,), positions=ALL, phase="both")]
        for s in strengths
        for _ in range(4)
    ]
    rows = batch.select([0, 1, 2, 3] * len(strengths))
    whole = answer_under(model, rows, each, max_new_tokens=10).tokens

    def decided(tokens: list[int]) -> bool:
        return len(tokens) > 1 and tokens[-1] % 5 == 0

    got = answer_under(model, rows, each, max_new_tokens=10, decided=decided).tokens
    expected = tuple(row[: next((k for k in range(2, len(row) + 1) if row[k - 1] % 5 == 0), len(row))] for row in whole)
    assert got == expected
    assert len({len(row) for row in got}) > 3
    alone = [answer_under(model, rows.select([i]), [each[i]], max_new_tokens=10).tokens[0] for i in range(0, 80, 9)]
    assert [whole[i] for i in range(0, 80, 9)] == alone


def test_logits_come_from_each_rows_own_end() -> None:
    """Rows of different lengths in one batch, of which some run as one: none is read at another's last token."""
    model, whole = made("qwen2"), batch_of("qwen2")
    assert len(set(whole.lengths.tolist())) > 2
    logits = logits_under(model, whole.select([0, 1, 2, 3, 0, 3]), [])
    alone = torch.cat([logits_under(model, whole.select([i]), []) for i in (0, 1, 2, 3, 0, 3)])
    assert float((logits - alone).abs().max()) < 1e-4 * float(alone.abs().max())
    assert torch.equal(logits[0], logits[4])
