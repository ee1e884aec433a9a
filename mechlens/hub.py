"""The model hub, when it can't be reached: known within seconds, where its client tries five times, with waits."""

import contextlib
import difflib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SECONDS = 5.0
"""How long an answer may take before the hub counts as out of reach."""
KNOWN_FOR = 60.0
"""Seconds for which what was found is believed."""
OLD_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt")
"""Language models that the hub knows without an owner's name."""
_found: dict[str, tuple[float, bool]] = {}


@contextlib.contextmanager
def asked() -> Iterator[None]:
    """Inside, a hub that can't be reached isn't tried at all: what its cache holds is there, all else fails at once."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not in_reach()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def in_reach() -> bool:
    """Whether the hub, or the proxy before it, answers at all; asked at most once a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    at, before = _found.get(constants.ENDPOINT, (0.0, False))
    if not at or time.monotonic() - at > KNOWN_FOR:
        before = _answers(constants.ENDPOINT)
        _found[constants.ENDPOINT] = time.monotonic(), before
    return before


def _answers(endpoint: str) -> bool:
    """Asked by the client's own session, which knows proxies; in a thread, since names are looked up without limit."""
    from huggingface_hub import get_session

    found: list[int] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # of many kinds; every one of them means that there was no answer
            found.append(get_session().head(endpoint, timeout=SECONDS).status_code)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(found)


def why_not() -> str:
    """Why nothing could be had from the hub, where it is the network; else ""."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off here (HF_HUB_OFFLINE)"
    return "" if in_reach() else f"{constants.ENDPOINT} can't be reached from here; check the network"


def nearest_id(given: str, known: Sequence[str]) -> str:
    """A question after the id that was perhaps meant, of those in the hub's cache here and the `known`; "" if none."""
    ids = {name.lower(): name for name in (*known, *_cached())}
    if given.lower() in ids:
        return ""
    close = difflib.get_close_matches(given.lower(), ids, n=1, cutoff=0.8)
    return f"did you mean {ids[close[0]]!r}?" if close else ""


def has_no_owner(name: str) -> bool:
    """True for a name that the hub can't know: without an owner, not one of its oldest, and not in its cache here."""
    return "/" not in name and name not in OLD_NAMES and name not in _cached()


def _cached() -> list[str]:
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    return [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]
