"""`mechlens env`."""

from dataclasses import dataclass

from mechlens.studies.registry import Command


@dataclass(frozen=True, kw_only=True)
class Env:
    """Show versions, devices, models in the cache and what works here: what a bug report needs."""

    json: bool = False
    """Print one JSON object, for machines."""


COMMAND = Command("env", Env, "mechlens.studies.env.study:execute", ("mechlens env",))
