"""Laws of `answer`: token for token what plain Hugging Face generates greedily, one prompt at a time."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import DictShelf, Killed
from tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer, words
from transformers import GenerationConfig

from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour import answers as answering
from mechlens.methods.behaviour.answers import NO_TOKEN, Answers, answer
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.engine import forward
from mechlens.models.engine.generate import stop_tokens
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.studies.shared.quadrants import judge_answers

pytestmark = pytest.mark.exact

NEW = 10


def prompts(n: int = 6) -> list[Prompt]:
    return [Prompt(id=f"p{i}", text=text) for i, text in enumerate(words(n))]


def bridged(hf_model: Any) -> Any:
    checkpoint = Checkpoint("tiny", "tests/tiny", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tiny_tokenizer(), checkpoint)


def lively(architecture: str) -> Any:
    """A tiny model whose answers differ from prompt to prompt: Gemma's do anyway, others need larger weights."""
    hf_model = tiny_hf(architecture)
    if not architecture.startswith("gemma"):
        for parameter in hf_model.parameters():
            parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return hf_model


@functools.cache
def pair(architecture: str) -> tuple[Any, Any]:
    """A bridge and a plain copy of the same model, shared by tests that change neither."""
    return bridged(lively(architecture)), lively(architecture)


@functools.cache
def expected(architecture: str) -> tuple[tuple[int, ...], ...]:
    """What plain Hugging Face answers to `prompts()`."""
    model, plain = pair(architecture)
    return generated(plain, tokenize(prompts(), template_of(model)), NEW, {4})


@torch.inference_mode()
def generated(hf_model: Any, batch: TokenBatch, new: int, stop: set[int]) -> tuple[tuple[int, ...], ...]:
    """Hugging Face's own greedy generation, one prompt at a time."""
    found = []
    for i in range(len(batch.prompts)):
        tokens = torch.tensor([batch.row(i)])
        out = hf_model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False,
            eos_token_id=sorted(stop), pad_token_id=0,
        )[0, tokens.shape[1] :].tolist()  # fmt: skip
        found.append(until(out, stop))
    return tuple(found)


@torch.inference_mode()
def recomputed(hf_model: Any, batch: TokenBatch, new: int, stop: set[int]) -> tuple[tuple[int, ...], ...]:
    """The likeliest token by running the whole sequence again at every step: no cache, no mask, no batch."""
    found = []
    for i in range(len(batch.prompts)):
        tokens = batch.row(i)
        for _ in range(new):
            tokens.append(int(hf_model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        found.append(until(tokens[-new:], stop))
    return tuple(found)


def until(tokens: Sequence[int], stop: set[int]) -> tuple[int, ...]:
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tuple(tokens[:end])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_hugging_face_generate(architecture: str) -> None:
    model, _ = pair(architecture)
    got = answer(model, prompts(), max_new_tokens=NEW)
    assert got.engine == "fast"
    assert got.tokens == expected(architecture)
    assert len(set(got.tokens)) > 3  # the prompts matter


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_decoding_equals_full_recomputation(architecture: str) -> None:
    model, plain = pair(architecture)
    # Of very different lengths, so that short rows carry many padding columns.
    texts = [
        Prompt(id=text, text=text) for text in ("a", "a few words", "a request that is a good deal longer " * 2 + "?")
    ]
    batch = tokenize(texts, template_of(model))
    assert answer(model, batch, max_new_tokens=NEW).tokens == recomputed(plain, batch, NEW, {4})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_engine_gives_the_same_answers(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(architecture)
    monkeypatch.setattr(forward, "fits_fast_path", lambda model: False)
    got = answer(model, prompts(), max_new_tokens=NEW)
    assert got.engine == "plain"
    assert got.tokens == expected(architecture)


@pytest.mark.parametrize("max_tokens", [1, 100, 150, 100_000])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "bloom"])
def test_batches_of_any_size_give_the_same_answers(architecture: str, max_tokens: int) -> None:
    model, _ = pair(architecture)
    assert answer(model, prompts(), max_new_tokens=NEW, max_tokens=max_tokens).tokens == expected(architecture)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "bloom"])
@pytest.mark.parametrize("fast", [True, False])
def test_rows_that_end_early(architecture: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = bridged(lively(architecture)), pair(architecture)[1]
    # Tokens that some answers hold early and others late become ends of sequence.
    stop = {4, expected(architecture)[0][1], expected(architecture)[1][3]}
    model.original_model.generation_config.eos_token_id = sorted(stop)
    assert stop_tokens(model) == stop
    monkeypatch.setattr(forward, "fits_fast_path", lambda model: fast)
    batch = tokenize(prompts(), template_of(model))
    got = answer(model, batch, max_new_tokens=NEW)
    assert got.tokens == generated(plain, batch, NEW, stop)
    lengths = [len(tokens) for tokens in got.tokens]
    assert lengths[0] <= 1
    assert len(set(lengths)) > 1


def test_rows_that_say_nothing() -> None:
    model = bridged(lively("llama"))
    model.original_model.generation_config.eos_token_id = list({tokens[0] for tokens in expected("llama")})
    got = answer(model, prompts(), max_new_tokens=NEW)
    assert got.tokens == ((),) * 6
    assert got.texts == ("",) * 6
    assert got.first_tokens == (NO_TOKEN,) * 6


def test_without_any_end_of_sequence_token() -> None:
    hf_model = tiny_hf()
    hf_model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    model = bridge(hf_model, tokenizer, Checkpoint("tiny", "tests/tiny"))
    assert stop_tokens(model) == set()
    assert all(len(tokens) == NEW for tokens in answer(model, prompts(), max_new_tokens=NEW).tokens)


@pytest.mark.parametrize("new", [1, 2, 3])
def test_few_tokens_are_the_start_of_many(new: int) -> None:
    model, _ = pair("qwen3")
    got = answer(model, prompts(), max_new_tokens=new)
    assert got.tokens == tuple(tokens[:new] for tokens in expected("qwen3"))
    assert got.max_new_tokens == new
    assert got.first_tokens == tuple(tokens[0] for tokens in expected("qwen3"))


@pytest.mark.parametrize("fast", [True, False])
def test_a_models_sampling_settings_do_not_count(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bridged(lively("llama"))
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=4)
    model.original_model.generation_config = own
    monkeypatch.setattr(forward, "fits_fast_path", lambda model: fast)
    assert answer(model, prompts(), max_new_tokens=NEW).tokens == expected("llama")
    assert model.original_model.generation_config is own


def test_user_hooks_take_the_plain_engine_and_change_the_answers() -> None:
    model = bridged(lively("llama"))
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda residual, hook: -3 * residual)]):
        pushed = answer(model, prompts(), max_new_tokens=NEW)
    assert pushed.engine == "plain"
    assert pushed.tokens != expected("llama")
    assert answer(model, prompts(), max_new_tokens=NEW).tokens == expected("llama")


def test_running_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    run, sizes = answering.greedy_batch, []

    def small(model: Any, rows: Sequence[Any], *rest: Any) -> list[list[int]]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return run(model, rows, *rest)

    monkeypatch.setattr(answering, "greedy_batch", small)
    assert answer(pair("llama")[0], prompts(), max_new_tokens=NEW).tokens == expected("llama")
    assert max(sizes) == 6


def test_a_killed_run_goes_on_and_a_finished_one_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, calls = pair("llama")[0], DictShelf(room=2), []
    run = answering.greedy_batch

    def counted(*args: Any) -> list[list[int]]:
        calls.append(1)
        return run(*args)

    def ask(model: Any = model, **options: Any) -> Answers:
        calls.clear()
        options = {"max_new_tokens": NEW, "max_tokens": 150, "cache": cache} | options
        return answer(model, options.pop("prompts", prompts()), **options)

    monkeypatch.setattr(answering, "greedy_batch", counted)
    with pytest.raises(Killed):
        ask()
    assert len(calls) == 3
    cache.room = 1000
    assert ask().tokens == expected("llama")
    rest = len(calls)
    assert ask().tokens == expected("llama")
    assert not calls
    assert len(cache.pieces) == rest + 2

    for what, options in {
        "more tokens": {"max_new_tokens": NEW + 1},
        "other weights": {"model": bridged(tiny_hf(seed=1))},
        "other dtype": {"model": bridged(tiny_hf(dtype=torch.bfloat16))},
        "other prompts": {"prompts": [Prompt(f"p{i}", f"another {i}") for i in range(6)]},
    }.items():
        ask(**options)
        assert calls, what


def test_the_table_and_what_travels_with_it() -> None:
    model, _ = pair("llama")
    got = answer(model, prompts(), max_new_tokens=NEW)
    assert got.ids == tuple(f"p{i}" for i in range(6))
    assert got.template == template_of(model).fingerprint
    assert got.checkpoint.fingerprint
    table = got.table()
    assert list(table.columns) == ["id", "answer", "n_tokens"]
    assert list(table.n_tokens) == [len(tokens) for tokens in got.tokens]


def test_what_can_not_be_answered_is_said() -> None:
    model, _ = pair("llama")
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        answer(model, prompts(1), max_new_tokens=0)
    with pytest.raises(UserError, match=r"'p0' has \d+ tokens and the model takes 512, of which 500 are left"):
        answer(model, prompts(1), max_new_tokens=500)
    speechless = bridged(lively("llama"))
    speechless.mechlens = replace(speechless.mechlens, tokenizer=None)  # as a HookedTransformer may have none
    with pytest.raises(UserError, match="no tokenizer"):
        answer(speechless, tokenize(prompts(1), template_of(model)), max_new_tokens=1)


@pytest.mark.real
def test_smollm2_equals_hugging_face_generate(smollm2: Any) -> None:
    from mechlens.models.load import load_hf

    plain, _ = load_hf("smollm2")
    batch = tokenize([*builtin_prompts("harmful")[:2], *builtin_prompts("benign")[:2]], template_of(smollm2))
    got = answer(smollm2, batch, max_new_tokens=8)
    assert got.engine == "fast"
    assert got.tokens == generated(plain, batch, 8, stop_tokens(smollm2))
    assert all(got.texts)


def test_an_empty_answer_stands_in_no_quadrant() -> None:
    prompts = [Prompt(str(i), "?", label) for i, label in enumerate(("harmful", "harmful", "harmless", "harmless"))]
    texts = ("I won’t.", "", "Sure.", " ")
    judged = judge_answers(
        prompts, Answers(tuple("0123"), texts, ((1,),) * 4, 1, Checkpoint("tiny", "tests/tiny"), "", "plain")
    )
    assert judged.judge == "phrases"
    assert judged.quadrants() == ("refused_harmful", "empty", "accepted_harmless", "empty")
    assert (judged.refused, judged.accepted) == ((True, False, False, False), (False, False, True, False))
    counts = judged.counts().set_index(["judge", "quadrant"])["n"]
    for judge in ("phrases", "arditi", "zhao"):  # no list reads a refusal or consent into silence
        assert counts[judge, "empty"] == 2
    assert counts["arditi", "accepted_harmful"] == counts["zhao", "accepted_harmful"] == 1  # a curly "won’t"
