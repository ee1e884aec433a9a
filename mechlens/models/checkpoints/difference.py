"""In words, what tells the model that something was made with from the one that it is used on."""

from dataclasses import dataclass

from mechlens.errors import UserError
from mechlens.models.checkpoint import Checkpoint

FOREIGN = "foreign"
"""Name of the checkpoint of what another tool made, which doesn't say with which model."""


@dataclass(frozen=True)
class Difference:
    """One thing in which two checkpoints differ."""

    made: str
    now: str
    option: str = ""
    """What sets it on the command line, such as "--dtype bfloat16"."""


def require_same_weights(what: str, made: Checkpoint, now: Checkpoint, allow: str) -> None:
    """UserError, in words, where `what` was made with other weights or in another regime than the model's.

    `allow` says what else can be done, such as "make it anew".
    """
    if made.regime == now.regime and made.has_weights_of(now):
        return
    raise unlike(what, made, now, differences(made, now), allow)


def require_same_template(what: str, made: str, now: str, allow: str) -> None:
    """UserError where `what` was made under another chat template, both given by fingerprint."""
    if made != now:
        raise UserError(
            f"the {what} was made under another chat template ({made[:12] or 'not known'}) than the prompts are under "
            f"({now[:12]}): use the same --template, --template-arg and --today, or {allow}"
        )


def other_width(what: str, n: int, made: Checkpoint, width: int, now: Checkpoint) -> UserError:
    """The error for a vector that is no vector of the model's, with the models that both come from."""
    source = "another tool" if made.path == FOREIGN else made.name
    return UserError(
        f"{what} has {n} numbers (from {source}) and a vector of this model ({now.name}) has {width}; "
        "load the model that it was made with, or make it anew in this one"
    )


def unlike(what: str, made: Checkpoint, now: Checkpoint, found: list[Difference], allow: str) -> UserError:
    """The error for something that was made with another model; fingerprints stand in it where nothing else differs."""
    if made.path == FOREIGN and not made.fingerprint:
        return UserError(f"the {what} comes from another tool, which doesn't say with which model it was made; {allow}")
    if not found:
        hashes = f"its fingerprint was {_short(made)} and is {_short(now)}"
        return UserError(
            f"the {what} was made with other weights of {made.name} than this model, {now.name}, has ({hashes}); "
            f"load those, or {allow}"
        )
    before, after = (", ".join(getattr(one, side) for one in found) for side in ("made", "now"))
    return UserError(f"the {what} was made {before}, the model is {after}: {_remedy(found)}{allow}")


def differences(made: Checkpoint, now: Checkpoint) -> list[Difference]:
    """What is known to differ, except for the weights themselves; the regime alone where that does."""
    if made.regime != now.regime:
        return [Difference(f"with {made.regime} weights", f"one with {now.regime} ones", _regime(made, now))]
    found = [one for one in (_name(made, now), _adapter(made, now), _revision(made, now), _dtype(made, now)) if one]
    if not found and made.fingerprint == now.fingerprint and made.config != now.config:
        found = [Difference("with another configuration (scales, rotary tables)", "run with its own")]
    return found


def _regime(made: Checkpoint, now: Checkpoint) -> str:
    """Which option gives the regime; folded weights are nothing that can be loaded."""
    if made.regime in ("int8", "nf4", "fp8"):
        return f"--dtype {made.regime}"
    return "--dtype float32" if (made.regime, now.regime) in (("raw", "int8"), ("raw", "nf4"), ("raw", "fp8")) else ""


def _name(made: Checkpoint, now: Checkpoint) -> Difference | None:
    if made.path != now.path and made.path.rstrip("/").split("/")[-1] != now.path.rstrip("/").split("/")[-1]:
        return Difference(f"with {made.path}", now.path, f"--model {made.path}")
    if made.path == now.path and made.step != now.step and None not in (made.step, now.step):
        return Difference(f"at step {made.step}", f"at step {now.step}")
    return None


def _adapter(made: Checkpoint, now: Checkpoint) -> Difference | None:
    if made.adapter == now.adapter:
        return None
    before, after = (f"with the adapter {own}" if own else "without an adapter" for own in (made.adapter, now.adapter))
    return Difference(before, after, f"--adapter {made.adapter}" if made.adapter else "no --adapter")


def _revision(made: Checkpoint, now: Checkpoint) -> Difference | None:
    if made.revision == now.revision:
        return None
    before, after = (f"at revision {own}" if own else "at no named revision" for own in (made.revision, now.revision))
    return Difference(before, after, f"--revision {made.revision}" if made.revision else "no --revision")


def _dtype(made: Checkpoint, now: Checkpoint) -> Difference | None:
    if made.dtype == now.dtype or "" in (made.dtype, now.dtype):
        return None
    return Difference(f"in {made.dtype}", f"loaded in {now.dtype}", f"--dtype {made.dtype}")


def _remedy(found: list[Difference]) -> str:
    """What to pass, on the command line and in Python, and "or" before what else can be done."""
    options = [one.option for one in found if one.option]
    named = [option.removeprefix("--").split(" ", 1) for option in options if option.startswith("--")]
    # What ml.load takes: a model that is loaded can't be told to be another one.
    python = ", ".join(f"{value!r}" if name == "model" else f"{name}={value!r}" for name, value in named)
    if any(name == "model" for name, _ in named):
        python = f"ml.load({python})"
    said = " ".join(options)
    return f"pass {said}{f' ({python} in Python)' if python else ''}, or " if said else ""


def _short(checkpoint: Checkpoint) -> str:
    return checkpoint.fingerprint.removeprefix("v2-")[:12] or "not known"
