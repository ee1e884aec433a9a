"""A language model behind an OpenAI-compatible endpoint as a judge, read by the likeliest beginnings of its reply."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch

from mechlens.checked_json import parse_json
from mechlens.errors import UserError, quoted
from mechlens.methods.behaviour.scoring.number_reply import Opening
from mechlens.methods.behaviour.scoring.questions import ALIGNED, JudgeQuestion
from mechlens.methods.behaviour.scoring.score_judge import Reply, Scores, scores_by
from mechlens.methods.cache import Cache
from mechlens.methods.progress import progress_bar
from mechlens.prompts.prompt import Prompt

AT_ONCE = 4
"""Requests that wait for their replies at a time."""
TOP = 20
"""Likeliest tokens that are asked for, the most that the interface gives."""
REPLY_TOKENS = 6
"""The papers ask for one, which is a whole number for their judges; for a model that spells numbers digit by digit it
would be 8 of 85, and only more of the reply shows that."""
AGAIN = frozenset({408, 429, 500, 502, 503, 504, 529})
"""Answers of a server that is busy or broken for now."""
LONGEST_PAUSE = 60.0
"""Seconds."""


@dataclass(frozen=True)
class EndpointScoreJudge:
    """A model behind an endpoint that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, Ollama and others.

    The score is the mean over numbers among the 20 likeliest first tokens, by their probability (Betley et al. 2025).
    Where the server gives no log-probabilities, or numbers are spelt digit by digit there, it is the number in the
    reply's text; `Scores.read_from` says which. The endpoint is sent the prompts and answers, and nothing else is.

    >>> ml.EndpointScoreJudge("https://api.example.org/v1", "some-model", key_variable="EXAMPLE_KEY").name
    'some-model'
    """

    url: str
    """Up to where /chat/completions follows, such as https://api.openai.com/v1 or http://localhost:8000/v1."""
    model: str
    """As the endpoint calls it."""
    question: JudgeQuestion = ALIGNED
    key_variable: str | None = None
    """Environment variable that holds the key, such as OPENAI_API_KEY; None sends no key."""
    timeout: float = 60.0
    """Seconds that a reply may take."""
    tries: int = 6
    """How often a request is made while the server is busy, broken or out of reach."""
    pause: float = 1.0
    """Seconds before the second try; doubled for each further one, unless the server says when."""
    cache: Cache | None = field(default=None, repr=False)
    """Keeps every reply, so that no request is made twice."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"the judge's url {quoted(self.url, 80)} isn't one; give one such as https://api.openai.com/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                "the judge's url holds more than a place (a name, a password or a query); put the key into an "
                "environment variable and name it by key_variable"
            )
        if self.tries < 1:
            raise UserError(f"tries is {self.tries}; a request has to be made at least once")

    @property
    def name(self) -> str:
        return self.model

    def headers(self) -> dict[str, str]:
        """What a request says of its sender; UserError where the variable holds no key."""
        if self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise UserError(f"there is no key in the environment variable {self.key_variable}; set it")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {self.key_variable} holds what can't be a key; set it anew")
        return {"Authorization": f"Bearer {key}"}

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Scores:
        """One score for each answer; an empty one has none, and the endpoint isn't asked about it."""
        return scores_by(self, prompts, answers, self._replies)

    def _replies(self, asked: list[Prompt]) -> list[Reply]:
        with _Endpoint.opened(self) as endpoint, ThreadPoolExecutor(AT_ONCE) as pool:
            bar = progress_bar(total=len(asked), title=f"asking {self.model}", unit="answer")
            replies = [pool.submit(self._reply, endpoint, prompt.text) for prompt in asked]
            try:
                found = []
                for reply in replies:
                    found.append(reply.result())
                    bar.update(1)
            finally:
                bar.close()
                endpoint.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return found

    def _reply(self, endpoint: "_Endpoint", text: str) -> Reply:
        key = hashlib.sha256(json.dumps(["endpoint score", self.url, self.model, text]).encode()).hexdigest()
        kept = None if self.cache is None else self.cache.get(key)
        if kept is not None:
            raw, mass, opening, read_from = json.loads(bytes(kept["reply"].tolist()))
            return Reply(raw, mass, tuple((word, p) for word, p in opening), read_from)
        reply = reading(endpoint.completion(text))
        if self.cache is not None:
            said = json.dumps([reply.raw, reply.mass, reply.opening, reply.read_from]).encode()
            self.cache.put(key, {"reply": torch.tensor(list(said), dtype=torch.uint8)})
        return reply


class _Endpoint:
    """Makes requests, again where that may help; every other trouble is one sentence, without what was asked."""

    def __init__(self, judge: EndpointScoreJudge, client: httpx.Client) -> None:
        self.judge, self.client = judge, client
        self.host = urlsplit(judge.url).netloc
        self.logprobs = True
        """Whether to ask for log-probabilities: until the server refuses."""
        self.stopped = Event()
        """Nobody waits for replies any more."""

    @classmethod
    @contextmanager
    def opened(cls, judge: EndpointScoreJudge) -> Iterator["_Endpoint"]:
        with httpx.Client(headers=judge.headers(), timeout=judge.timeout) as client:
            yield cls(judge, client)

    def completion(self, text: str) -> "Completion":
        asks_logprobs = self.logprobs
        response = self._response(text, asks_logprobs)
        if response.status_code in (400, 422) and asks_logprobs:
            response = self._response(text, False)
            if response.is_success:
                self.logprobs = False
        if not response.is_success:
            raise UserError(self._refusal(response))
        remedy = "choose an endpoint that speaks OpenAI's chat completions"
        found: Completion = parse_json(response.content, Completion, f"the reply of {self.host}", remedy)
        if not found.choices:
            raise UserError(f"the reply of {self.host} holds no choice; {remedy}")
        return found

    def _response(self, text: str, logprobs: bool) -> httpx.Response:
        body: dict[str, Any] = {
            "model": self.judge.model, "messages": [{"role": "user", "content": text}], "temperature": 0,
            "max_tokens": REPLY_TOKENS,
        }  # fmt: skip
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP}
        address = self.judge.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        trouble = ""
        for k in range(self.judge.tries):
            wait = self.judge.pause * 2**k
            try:
                response = self.client.post(address, json=body)
            except httpx.TimeoutException:
                trouble = f"gave no reply within {self.judge.timeout:g} s"
            except httpx.TransportError as error:
                trouble = f"can't be reached ({type(error).__name__})"
            else:
                if response.status_code not in AGAIN:
                    return response
                trouble = f"answered {_status(response)}"
                wait = _seconds(response.headers.get("retry-after", ""), wait)
            if k + 1 == self.judge.tries or self.stopped.wait(min(wait, LONGEST_PAUSE)):
                break
        raise UserError(
            f"the judge's endpoint {self.host} {trouble}, {self.judge.tries} times; look at the url and the server, or "
            "try later"
        )

    def _refusal(self, response: httpx.Response) -> str:
        """Why there is no reply, and what to do."""
        answered = f"the judge's endpoint {self.host} answered {_status(response)}"
        if response.status_code in (401, 403) and self.judge.key_variable:
            return f"{answered}; it doesn't take the key in {self.judge.key_variable}, so set it to one that it takes"
        if response.status_code in (401, 403):
            return f"{answered}; it wants a key, so name the environment variable that holds it by key_variable"
        if response.status_code == 404:
            return f"{answered}; it has no model {self.judge.model!r}, or /chat/completions doesn't follow the url"
        return f"{answered}; it doesn't take such a request for the model {self.judge.model!r}, so choose another"


def _seconds(said: str, otherwise: float) -> float:
    """What a server says to wait, where it says it in seconds."""
    return float(said) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]*)?", said) else otherwise


def _status(response: httpx.Response) -> str:
    """The status with the server's own word for it, such as invalid_api_key. What else it says may quote an answer or
    the key, and isn't shown."""
    status = f"{response.status_code} {response.reason_phrase}".strip()
    try:
        word = json.loads(response.content)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return status
    return f"{status} ({word})" if isinstance(word, str) and re.fullmatch(r"[a-z_]{1,60}", word) else status


@dataclass(frozen=True)
class _Likely:
    token: str
    logprob: float


@dataclass(frozen=True)
class _Written(_Likely):
    top_logprobs: list[_Likely] | None = None


@dataclass(frozen=True)
class _Logprobs:
    content: list[_Written] | None = None


@dataclass(frozen=True)
class _Message:
    content: str | None = None


@dataclass(frozen=True)
class _Choice:
    message: _Message
    logprobs: _Logprobs | None = None


@dataclass(frozen=True)
class Completion:
    """What is read of an endpoint's reply."""

    choices: list[_Choice]


_WHOLE = re.compile(r"\s*(0|[1-9][0-9]?|100)\s*")
_BEGINS = re.compile(r"\s*(0|[1-9][0-9]?|100)(?![0-9]|[.,][0-9])")


def reading(completion: Completion) -> Reply:
    """The score in a reply, by the probabilities of its first token that isn't white space, or by its text."""
    choice = completion.choices[0]
    text = choice.message.content or ""
    match = _BEGINS.match(text)
    number = float(match[1]) if match else math.nan
    written = choice.logprobs.content if choice.logprobs is not None and choice.logprobs.content else []
    reached = 1.0
    while len(written) > 1 and not written[0].token.strip():
        reached *= _probability(written[0])
        written = written[1:]
    if not written or not written[0].top_logprobs:
        return Reply(number, float(match is not None), ((text[:20], 1.0),), "text")
    likely = {own.token: _probability(own) for own in (written[0], *written[0].top_logprobs)}
    opening: Opening = tuple(sorted(likely.items(), key=lambda item: -item[1]))
    numbers = {token: int(own[1]) for token in likely if (own := _WHOLE.fullmatch(token))}
    # A single digit may be the beginning of two, unless the model is seen to write two at once.
    whole = any(value > 9 for value in numbers.values())
    first = numbers.get(written[0].token)
    if whole and (match is None or first == number):
        mass = sum(likely[token] for token in numbers)
        raw = sum(value * likely[token] for token, value in numbers.items()) / mass if mass else math.nan
        return Reply(raw, min(1.0, reached * mass), opening, "logprobs")
    digits = sum(p for token, p in likely.items() if token.strip()[:1].isdecimal())
    return Reply(number, min(1.0, reached * digits), opening, "text")


def _probability(token: _Likely) -> float:
    return min(1.0, math.exp(min(0.0, token.logprob)))
