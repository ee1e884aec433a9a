"""Loading what lies on this machine installs nothing and asks no network, whatever a library would like to do."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_SEALED: ContextVar[bool] = ContextVar("sealed", default=False)


@contextlib.contextmanager
def sealed() -> Iterator[None]:
    """Inside, connecting to another machine and starting an installer raise PermissionError.

    TransformerLens runs `pip install` for some multimodal models, and looks on the hub for what belongs to them.
    """
    from huggingface_hub import constants

    before, offline = _SEALED.set(True), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True  # else each look at the hub is tried five times, with waits between
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        _SEALED.reset(before)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event not in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen") or not _SEALED.get():
        return
    if event == "subprocess.Popen":
        command = args[1] if isinstance(args[1], list | tuple) else str(args[1]).split()
        if "install" not in [str(word) for word in command]:
            return  # a compiler, say, for a kernel
    elif event == "socket.connect" and args[0].family not in (socket.AF_INET, socket.AF_INET6):
        return
    raise PermissionError(f"loading a model installs and fetches nothing ({event})")


sys.addaudithook(_refuse)  # for good: Python has no way to take one off
