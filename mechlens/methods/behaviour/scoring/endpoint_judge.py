"""A language model behind an OpenAI-compatible endpoint as a judge, read by the likeliest beginnings of its reply."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch

from mechlens.checked_json import parse_json
from mechlens.errors import UserError
from mechlens.methods.behaviour.scoring.number_reply import Opening
from mechlens.methods.behaviour.scoring.questions import ALIGNED, JudgeQuestion
from mechlens.methods.behaviour.scoring.score_judge import Reply, Scores, scores_by
from mechlens.methods.behaviour.served.endpoint import Endpoint, Line
from mechlens.methods.cache import Cache
from mechlens.prompts.prompt import Prompt

AT_ONCE = 4
"""Requests that wait for their replies at a time."""
TOP = 20
"""Likeliest tokens that are asked for, the most that the interface gives."""
REPLY_TOKENS = 6
"""The papers ask for one, which is a whole number for their judges; for a model that spells numbers digit by digit it
would be 8 of 85, and only more of the reply shows that."""


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
        self._endpoint()  # which says of a url that it can't be one

    def _endpoint(self) -> Endpoint:
        return Endpoint(
            called="the judge's endpoint", url=self.url, path="/chat/completions", model=self.model,
            key_variable=self.key_variable, key_option="key_variable", timeout=self.timeout, tries=self.tries,
            pause=self.pause, at_once=AT_ONCE,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return self.model

    def headers(self) -> dict[str, str]:
        """What a request says of its sender; UserError where the variable holds no key."""
        return self._endpoint().headers()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Scores:
        """One score for each answer; an empty one has none, and the endpoint isn't asked about it."""
        return scores_by(self, prompts, answers, self._replies)

    def _replies(self, asked: list[Prompt]) -> list[Reply]:
        with self._endpoint().opened() as line:
            asking = _Asking(line)
            return line.all_of(asked, lambda prompt: self._reply(asking, prompt.text), "answer")

    def _reply(self, asking: "_Asking", text: str) -> Reply:
        key = hashlib.sha256(json.dumps(["endpoint score", self.url, self.model, text]).encode()).hexdigest()
        kept = None if self.cache is None else self.cache.get(key)
        if kept is not None:
            raw, mass, opening, read_from = json.loads(bytes(kept["reply"].tolist()))
            return Reply(raw, mass, tuple((word, p) for word, p in opening), read_from)
        reply = reading(asking.completion(text))
        if self.cache is not None:
            said = json.dumps([reply.raw, reply.mass, reply.opening, reply.read_from]).encode()
            self.cache.put(key, {"reply": torch.tensor(list(said), dtype=torch.uint8)})
        return reply


class _Asking:
    """Asks for completions, with log-probabilities until the server refuses them."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.logprobs = True

    def completion(self, text: str) -> "Completion":
        asks_logprobs = self.logprobs
        response = self._response(text, asks_logprobs)
        if response.status_code in (400, 422) and asks_logprobs:
            response = self._response(text, False)
            if response.is_success:
                self.logprobs = False
        if not response.is_success:
            raise UserError(self.line.refusal(response))
        remedy = "choose an endpoint that speaks OpenAI's chat completions"
        host = self.line.endpoint.host
        found: Completion = parse_json(response.content, Completion, f"the reply of {host}", remedy)
        if not found.choices:
            raise UserError(f"the reply of {host} holds no choice; {remedy}")
        return found

    def _response(self, text: str, logprobs: bool) -> httpx.Response:
        body: dict[str, Any] = {
            "model": self.line.endpoint.model, "messages": [{"role": "user", "content": text}], "temperature": 0,
            "max_tokens": REPLY_TOKENS,
        }  # fmt: skip
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP}
        return self.line.post(body)


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
