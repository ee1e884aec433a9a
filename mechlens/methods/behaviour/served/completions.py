"""Greedy completions of token ids by a server that speaks OpenAI's completions: vLLM, SGLang, llama.cpp and others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mechlens.checked_json import parse_json
from mechlens.errors import UserError
from mechlens.methods.behaviour.served.endpoint import Endpoint, Line
from mechlens.registry import unknown_name
from mechlens.settings import ServedAnswering

AS_GREEDY = {
    "temperature": 0, "n": 1, "stream": False, "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1,
    "repeat_penalty": 1, "return_token_ids": True,
}  # fmt: skip
"""Penalties of the model's own settings don't count; the last three are of vLLM and SGLang, llama.cpp, and vLLM."""
WITHOUT_LIST = (404, 405, 501)
"""What a server answers that doesn't say which models it has."""
REMEDY = "choose a server that speaks OpenAI's completions and takes token ids"


def endpoint_of(plan: ServedAnswering) -> Endpoint | None:
    """Where answers are to come from, if from a server; UserError where only half of it is said."""
    if plan.answers_from is None:
        if plan.served_model is not None:
            raise UserError("--served-model was given without --answers-from; add the server's url, or leave it out")
        return None
    if plan.served_model is None:
        raise UserError("--answers-from was given without --served-model; add what the server calls the model")
    return Endpoint(
        called="the answering server", url=plan.answers_from, path="/completions", model=plan.served_model,
        key_variable=plan.served_key, key_option="--served-key", timeout=120.0, tries=6, pause=1.0, at_once=8,
    )  # fmt: skip


def require_served(plan: ServedAnswering) -> None:
    """UserError, before anything is loaded, where answers are to come from a server that isn't there or lacks the
    model."""
    endpoint = endpoint_of(plan)
    if endpoint is None:
        return
    with replace(endpoint, tries=2, timeout=30.0).opened() as line:
        response = line.get("/models")
        if response.status_code in WITHOUT_LIST:
            return
        if not response.is_success:
            raise UserError(line.refusal(response))
        listed: _Models = parse_json(response.content, _Models, f"the list of models of {endpoint.host}", REMEDY)
    names = [one.id for one in listed.data]
    if names and endpoint.model not in names:
        raise unknown_name(f"model at {endpoint.host} called", endpoint.model, names)


@dataclass(frozen=True)
class Completed:
    """What a server wrote after a prompt: its token ids where it gives them, and its text."""

    text: str
    tokens: tuple[int, ...] | None


def completed(line: Line, prompt: Sequence[int], max_new_tokens: int) -> Completed:
    """The greedy completion; UserError where the server gives none, read another prompt, or stopped before its time."""
    endpoint = line.endpoint
    body: dict[str, Any] = {"model": endpoint.model, "prompt": list(prompt), "max_tokens": max_new_tokens, **AS_GREEDY}
    response = line.post(body)
    if not response.is_success:
        raise UserError(line.refusal(response))
    reply: _Reply = parse_json(response.content, _Reply, f"the reply of {endpoint.host}", REMEDY)
    if not reply.choices:
        raise UserError(f"the reply of {endpoint.host} holds no choice; {REMEDY}")
    choice, usage = reply.choices[0], reply.usage or _Usage()
    if usage.prompt_tokens not in (None, len(prompt)):
        raise UserError(
            f"{endpoint.called} {endpoint.host} read {usage.prompt_tokens} tokens of a prompt of {len(prompt)}; raise "
            "its context length, or choose a server that takes token ids as they are"
        )
    written = usage.completion_tokens if choice.token_ids is None else len(choice.token_ids)
    if choice.finish_reason == "length" and written is not None and written < max_new_tokens:
        raise UserError(
            f"{endpoint.called} {endpoint.host} stopped an answer at {written} of {max_new_tokens} tokens; raise its "
            "context length or its limit of new tokens, or ask for fewer (--max-new-tokens)"
        )
    return Completed(choice.text, None if choice.token_ids is None else tuple(choice.token_ids))


@dataclass(frozen=True)
class _Choice:
    text: str
    finish_reason: str | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class _Usage:
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class _Reply:
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass(frozen=True)
class _Model:
    id: str


@dataclass(frozen=True)
class _Models:
    data: list[_Model]
