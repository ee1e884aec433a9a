"""A server that speaks OpenAI's interface: asked again where that may help; any other trouble is one sentence."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from mechlens.errors import UserError, quoted
from mechlens.methods.progress import progress_bar

Asked = TypeVar("Asked")
Said = TypeVar("Said")
AGAIN = frozenset({408, 429, 500, 502, 503, 504, 529})
"""Answers of a server that is busy or broken for now."""
LONGEST_PAUSE = 60.0
"""Seconds."""
UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"


@dataclass(frozen=True)
class Endpoint:
    """Where it is, as what, and how patiently."""

    called: str
    """In errors, such as "the judge's endpoint"."""
    url: str
    """Up to where `path` follows."""
    path: str
    """Such as /chat/completions."""
    model: str
    """As the server calls it."""
    key_variable: str | None
    """Environment variable that holds the key; None sends no key."""
    key_option: str
    """What names that variable."""
    timeout: float
    """Seconds that a reply may take."""
    tries: int
    """How often a request is made while the server is busy, broken or out of reach."""
    pause: float
    """Seconds before the second try; doubled for each further one, unless the server says when."""
    at_once: int
    """Requests that wait for their replies at a time."""

    def __post_init__(self) -> None:
        try:
            parts = httpx.URL(self.url)
            possible = parts.scheme in ("http", "https") and bool(parts.host.encode("idna"))
        except (httpx.InvalidURL, UnicodeError):
            possible = False
        if not possible:
            raise UserError(
                f"the url of {self.called} {quoted(self.url, 80)} isn't one; give one such as http://localhost:8000/v1"
            )
        if parts.userinfo or parts.query or parts.fragment:
            raise UserError(
                f"the url of {self.called} holds more than a place (a name, a password or a query); put the key into "
                f"an environment variable and name it by {self.key_option}"
            )
        if self.tries < 1:
            raise UserError(f"tries is {self.tries}; a request has to be made at least once")

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

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

    @contextmanager
    def opened(self) -> Iterator["Line"]:
        """A line to it."""
        headers = self.headers()
        try:
            client = httpx.Client(headers=headers, timeout=self.timeout)
        except (OSError, ValueError) as error:
            raise UserError(
                f"this machine isn't set up to reach {self.called} ({type(error).__name__}); look at the environment "
                "variables SSL_CERT_FILE and SSL_CERT_DIR, and at those that name proxies"
            ) from error
        with client:
            yield Line(self, client)


class Line:
    """Requests to one endpoint, from several threads at once."""

    def __init__(self, endpoint: Endpoint, client: httpx.Client) -> None:
        self.endpoint, self._client = endpoint, client
        self._stopped = Event()  # nobody waits for replies any more

    def all_of(self, asked: Sequence[Asked], ask: Callable[[Asked], Said], unit: str) -> list[Said]:
        """What `ask` gives for each, several at a time; the first trouble ends it."""
        bar = progress_bar(total=len(asked), title=f"asking {self.endpoint.model}", unit=unit)
        with ThreadPoolExecutor(self.endpoint.at_once) as pool:
            replies = [pool.submit(ask, one) for one in asked]
            try:
                found = []
                for reply in replies:
                    found.append(reply.result())
                    bar.update(1)
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                bar.close()
        return found

    def post(self, body: Mapping[str, Any]) -> httpx.Response:
        """What it says to this, if that is no passing trouble."""
        return self._asked("POST", self.endpoint.path, body)

    def get(self, path: str) -> httpx.Response:
        """What stands at another of its paths."""
        return self._asked("GET", path, None)

    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        end = self.endpoint
        address = end.url.rstrip("/").removesuffix(end.path) + path
        trouble, made = "", 0
        for k in range(end.tries):
            wait, made = end.pause * 2**k, k + 1
            try:
                response = self._client.request(method, address, json=body)
            except httpx.TimeoutException:
                trouble = f"gave no reply within {end.timeout:g} s"
            except httpx.RequestError as error:
                if UNTRUSTED in str(error):
                    raise UserError(self._untrusted()) from error
                trouble = f"can't be reached ({type(error).__name__})"
            else:
                if response.status_code not in AGAIN:
                    return response
                trouble = f"answered {_status(response)}"
                wait = _seconds(response.headers.get("retry-after", ""), wait)
            if made == end.tries or self._stopped.wait(min(wait, LONGEST_PAUSE)):
                break
        raise UserError(
            f"{end.called} {end.host} {trouble}, {made} times; look at the url and the server, or try later"
        )

    def _untrusted(self) -> str:
        return (
            f"{self.endpoint.called} {self.endpoint.host} has a certificate that this machine doesn't trust; put the "
            "file of its authority's certificate into the environment variable SSL_CERT_FILE, or use another server"
        )

    def refusal(self, response: httpx.Response) -> str:
        """Why there is no reply, and what to do."""
        end = self.endpoint
        answered = f"{end.called} {end.host} answered {_status(response)}"
        if response.status_code in (401, 403) and end.key_variable:
            return f"{answered}; it doesn't take the key in {end.key_variable}, so set it to one that it takes"
        if response.status_code in (401, 403):
            return f"{answered}; it wants a key, so name the environment variable that holds it by {end.key_option}"
        if response.status_code == 404:
            return f"{answered}; it has no model {end.model!r}, or {end.path} doesn't follow the url"
        return f"{answered}; it doesn't take such a request for the model {end.model!r}, so choose another"


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
