"""Answers from a server: the same as the loaded model's own, or one sentence about what stands in the way."""

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from caches import DictShelf, Killed
from completion_server import Body, CompletionServer
from refusing import MARK, refusing_model
from tiny import tiny_hf, tiny_tokenizer, words

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.chosen_judge import judges_of, once_settled
from mechlens.methods.behaviour.served import answering, completions
from mechlens.methods.behaviour.served.agreement import Served
from mechlens.methods.behaviour.served.answering import COMPARED, answers_to
from mechlens.methods.behaviour.served.completions import require_served
from mechlens.methods.behaviour.served.endpoint import Endpoint
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.settings import ServedAnswering
from mechlens.studies.separate import study as separation
from mechlens.studies.separate.study import WithoutTemplate

N, NEW = COMPARED + 6, 3


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands between, and nobody waits long."""
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    real = completions.endpoint_of

    def hasty(plan: ServedAnswering) -> Endpoint | None:
        found = real(plan)
        return found and replace(found, tries=2, pause=0.01, timeout=60.0)

    monkeypatch.setattr(completions, "endpoint_of", hasty)
    monkeypatch.setattr(answering, "endpoint_of", hasty)


@pytest.fixture(scope="module")
def model() -> Any:
    return bridge(plain_copy(), tiny_tokenizer(), Checkpoint("tiny", "tests/tiny", fingerprint="f"))


def plain_copy() -> Any:
    """Says something else to most prompts."""
    hf_model = tiny_hf()
    for parameter in hf_model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return hf_model


@pytest.fixture(scope="module")
def running() -> Iterator[CompletionServer]:
    made = CompletionServer(plain_copy(), tiny_tokenizer())
    yield made
    made.close()


@pytest.fixture
def server(running: CompletionServer) -> CompletionServer:
    running.behave()
    return running


@pytest.fixture(scope="module")
def batch(model: Any) -> TokenBatch:
    return tokenize([Prompt(f"p{i}", text) for i, text in enumerate(words(N))], template_of(model))


def at(server: CompletionServer, **options: Any) -> ServedAnswering:
    return ServedAnswering(answers_from=server.url, served_model="served-1", max_new_tokens=NEW, **options)


def test_a_server_says_what_the_model_says(model: Any, batch: TokenBatch, server: CompletionServer) -> None:
    own = answer(model, batch, max_new_tokens=NEW)
    got = answers_to(model, batch, at(server))
    assert (got.ids, got.tokens, got.texts) == (own.ids, own.tokens, own.texts)
    assert len(set(own.tokens)) > N / 2
    assert got.engine == "served"
    served = got.served
    assert served is not None
    assert (served.same, served.in_ids) == ((True,) * COMPARED, True)
    assert str(served.agreement(0)).startswith("1.00 [")
    # Each prompt once, as the ids that were rendered here, and greedily.
    assert sorted(body["prompt"] for body in server.bodies) == sorted(list(batch.row(i)) for i in range(N))
    assert {(body["path"], body["model"], body["temperature"]) for body in server.bodies} == {
        ("/v1/completions", "served-1", 0)
    }
    assert answers_to(model, batch, ServedAnswering(max_new_tokens=NEW)).tokens == own.tokens


def test_a_refused_answer_ends_where_the_models_own_does() -> None:
    hf_model, tokenizer = refusing_model()
    model = bridge(hf_model, tokenizer, Checkpoint("tiny", "tests/tiny", fingerprint="f"))
    batch = tokenize([Prompt("a", f"{MARK * 9} it"), Prompt("b", "Hello")], template_of(model))
    decided = once_settled(judges_of("phrases"), tokenizer)
    server = CompletionServer(refusing_model()[0], tokenizer, ids=False)
    try:
        own = answer(model, batch, max_new_tokens=NEW, decided=decided)
        got = answers_to(model, batch, at(server), decided=decided)
    finally:
        server.close()
    assert (got.tokens, got.cut, got.texts) == (own.tokens, own.cut, own.texts)
    assert got.served is not None
    assert not got.served.in_ids


def test_a_killed_run_asks_nothing_twice(model: Any, batch: TokenBatch, server: CompletionServer) -> None:
    full, cache = DictShelf(), DictShelf(room=COMPARED + 3)
    whole = answers_to(model, batch, at(server), cache=full)
    own = len(full.pieces) - N  # the loaded model's answers
    with pytest.raises(Killed):
        answers_to(model, batch, at(server), cache=cache)
    cache.room = 1000
    server.bodies.clear()
    assert answers_to(model, batch, at(server), cache=cache) == whole
    assert len(server.bodies) == N - (COMPARED + 3 - own)
    server.bodies.clear()
    assert answers_to(model, batch, at(server), cache=cache) == whole
    assert server.bodies == []


def test_another_model_is_found_out_before_the_rest_is_asked(
    model: Any, batch: TokenBatch, server: CompletionServer
) -> None:
    rows = {tuple(batch.row(i)): i for i in range(N)}

    def other_for_some(body: Body, reply: Body) -> Body:
        other = {"token_ids": [9], "finish_reason": "stop"}
        return reply if rows[tuple(body["prompt"])] % 2 else reply | {"choices": [reply["choices"][0] | other]}

    server.after = other_for_some
    with pytest.raises(UserError, match=rf"of the first {COMPARED} answers of 'served-1' .* where 0.9 is the least"):
        answers_to(model, batch, at(server))
    assert len(server.bodies) == COMPARED
    served = answers_to(model, batch, at(server, least_agreement=0.1)).served
    assert served is not None
    compared = [i * N // COMPARED for i in range(COMPARED)]
    assert served.same == tuple(i % 2 == 1 for i in compared)


def says(**what: Any) -> Callable[[Body, Body], Body]:
    """What a server adds to its choice, or to what surrounds it."""
    around = {name: what.pop(name) for name in ("usage",) if name in what}
    return lambda body, reply: reply | around | {"choices": [reply["choices"][0] | what]}


TROUBLE: dict[str, tuple[Any, Any, str]] = {
    "rate limit": ((429, {"error": {"code": "rate_limit"}}), None, r"answered 429 .*\(rate_limit\), 2 times; look"),
    "broken": ((503, b"<html>"), None, "answered 503 .*, 2 times; look at the url and the server"),
    "wrong model": ((404, {"error": {"code": 404}}), None, "answered 404.*it has no model 'served-1', or /completions"),
    "key": ((401, {}), None, "answered 401.*wants a key, so name the environment variable.* by .served_key"),
    "no token ids": ((400, {}), None, "answered 400.*doesn't take such a request"),
    "no JSON": ((200, b"{"), None, "the reply of .* is not JSON.*; choose a server that speaks OpenAI's completions"),
    "no choice": ((200, {"choices": []}), None, "holds no choice"),
    "truncates": (None, says(token_ids=[9], finish_reason="length"), "stopped an answer at 1 of 3 tokens; raise its"),
    "its own prompt": (None, says(usage={"prompt_tokens": 3}), "read 3 tokens of a prompt of .*takes token ids"),
    "other tokenizer": (
        None,
        says(token_ids=[10**6], finish_reason="stop"),
        "wrote the token 1000000, and the loaded model has 270; serve",
    ),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_every_trouble_is_one_sentence(model: Any, batch: TokenBatch, server: CompletionServer, name: str) -> None:
    before, after, sentence = TROUBLE[name]
    server.before, server.after = (lambda body: before), after or server.after
    with pytest.raises(UserError, match=sentence) as caught:
        answers_to(model, batch.select([0]), at(server))
    assert not re.search(r"\. [A-Z]|\n", str(caught.value))


def test_a_server_that_is_busy_for_a_moment_is_asked_again(
    model: Any, batch: TokenBatch, server: CompletionServer
) -> None:
    few = batch.select(range(6))
    server.before = lambda body: (429, {}) if len(server.bodies) % 3 == 1 and len(server.bodies) < 4 else None
    assert answers_to(model, few, at(server)).tokens == answer(model, few, max_new_tokens=NEW).tokens


def test_one_that_breaks_off_stalls_or_is_not_there(
    model: Any, batch: TokenBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = CompletionServer(None, tiny_tokenizer())
    server.lost = 9
    with pytest.raises(
        UserError, match=r"the answering server 127.* can't be reached \(RemoteProtocolError\), 2 times"
    ):
        require_served(at(server))
    hasty, wait = answering.endpoint_of, threading.Event()
    monkeypatch.setattr(answering, "endpoint_of", lambda plan: replace(hasty(plan), timeout=0.05, tries=1))
    server.before = lambda body: (200, {}) if wait.wait(0.5) else (500, {})
    with pytest.raises(UserError, match=r"the answering server 127.* gave no reply within 0.05 s, 1 times"):
        answers_to(model, batch.select([0]), at(server))
    wait.set()
    server.close()
    for ask in (lambda: answers_to(model, batch.select([0]), at(server)), lambda: require_served(at(server))):
        with pytest.raises(UserError, match=r"the answering server 127.* can't be reached \(ConnectError\), \d times"):
            ask()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_certificate_that_nobody_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = tmp_path / "both.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         "-", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    both.write_text(made.stdout)
    server = CompletionServer(None, tiny_tokenizer(), certificate=both)
    try:
        with pytest.raises(UserError, match=r"a certificate that this machine doesn't trust; put .* SSL_CERT_FILE"):
            require_served(at(server))
        monkeypatch.setenv("SSL_CERT_FILE", str(both))
        require_served(at(server))
    finally:
        server.close()


def test_what_can_be_said_before_a_model_is_loaded(server: CompletionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    require_served(at(server))
    require_served(ServedAnswering())
    with pytest.raises(UserError, match=r"no model at .* called 'served-2' \(did you mean 'served-1'\?\); choose from"):
        require_served(replace(at(server), served_model="served-2"))
    server.models = (404, b"")  # which says nothing of models
    require_served(replace(at(server), served_model="served-2"))
    server.models = (401, {})
    with pytest.raises(UserError, match="wants a key, so name"):
        require_served(at(server))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    wrong = {
        "no key in the environment variable NO_SUCH_KEY": {"served_key": "NO_SUCH_KEY"},
        "without .served_model.; add": {"served_model": None},
        "without .answers_from.; add": {"answers_from": None},
        "'localhost:8000' isn't one; give one such as http://localhost:8000/v1": {"answers_from": "localhost:8000"},
        "'http://x:port' isn't one": {"answers_from": "http://x:port"},
        r"'http://\[::1' isn't one": {"answers_from": "http://[::1"},
        "isn't one": {"answers_from": f"http://{'x' * 64}"},
        "holds more than a place": {"answers_from": "http://me:secret@localhost/v1"},
    }
    for sentence, options in wrong.items():
        with pytest.raises(UserError, match=sentence):
            require_served(replace(at(server), **options))
    monkeypatch.setenv("SSL_CERT_FILE", "no-such-file")
    with pytest.raises(UserError, match=r"isn't set up to reach the answering server .*; look at .* SSL_CERT_FILE"):
        require_served(at(server))
    assert server.bodies == []


def test_the_separation_study_takes_its_answers_from_the_server(
    model: Any, batch: TokenBatch, server: CompletionServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(separation, "compare_sides", lambda *sides: None)
    monkeypatch.setattr(separation, "_measured", lambda model, *found: given.extend(found))
    half = N // 2
    plan = ml.SeparationPlan(max_new_tokens=NEW, answers_from=server.url, served_model="served-1")
    ml.separate(model, list(batch.prompts[:half]), list(batch.prompts[half:]), [], plan)
    whole, bare = (judged.answers for judged in given[:2])
    assert whole.tokens == answer(model, batch, max_new_tokens=NEW).tokens
    assert bare.tokens == answer(model, batch.select(range(half)).without_post(), max_new_tokens=NEW).tokens
    assert (len(whole.served.same), len(bare.served.same)) == (COMPARED, half)
    assert whole.served.share == bare.served.share == 1
    assert f"{COMPARED} of {COMPARED} that were compared" in whole.served.sentence
    with pytest.raises(UserError, match="did you mean 'served-1'"):
        separation.prepare(ml.Separate(answers_from=server.url, served_model="served-2", out=tmp_path))


def test_the_agreement_is_among_the_numbers_of_the_study() -> None:
    agreed = Served("localhost", "served-1", (True, True, False, True), tuple("abcd"), in_ids=True).agreement(seed=0)
    assert (agreed.value, agreed.n) == (0.75, 4)
    found = WithoutTemplate({}, Estimate.missing(0), agreed).metrics()
    assert found["served_agreement.no_post_tokens"] == agreed
    assert "served_agreement.no_post_tokens" not in WithoutTemplate({}, Estimate.missing(0)).metrics()
