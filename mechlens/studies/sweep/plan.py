"""What a sweep is of: one study, options that all its jobs share, and lists whose every combination is a job.

study: separate
options: {n: 40}
over:
  model: [smollm2, smollm2-refuser]
  seed: [0, 1, 2]
  prompts:                                  # options that vary together
    - {harmful: a.txt, harmless: b.txt}
    - {harmful: c.txt, harmless: d.txt}
"""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mechlens.checked_json import checked
from mechlens.choices import require_known
from mechlens.errors import UserError, kind_of, quoted
from mechlens.files import read_whole, short_name
from mechlens.registry import unknown_name
from mechlens.runs.run import plain
from mechlens.studies.possible import require_possible, with_paths
from mechlens.studies.registry import Study, studies

MOST = 10_000
"""Jobs of one sweep; more is a slip of the hand."""
MOST_VALUES, DEEPEST = 100_000, 30
"""Of a plan, everything in it counted."""
OURS = ("out",)
"""Options that the sweep itself decides."""
WANDB = {"mode": "offline"}
"""What a plan leaves open: many runs at a time log on disk, and `mechlens wandb sync` uploads them."""
REMEDY = "mend the plan"
WIDTH = 40
"""Characters of a value in a job's name."""


@dataclass(frozen=True)
class Plan:
    """A plan as its file has it."""

    study: str
    options: dict[str, Any] = field(default_factory=dict)
    """The same for every job."""
    over: dict[str, list[Any]] = field(default_factory=dict)
    """Values of one option by its name, or sets of options that vary together by a name of your own."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of each process; `device_map: auto` among the options spreads a model over them."""
    shards: Annotated[int, Field(ge=1)] = 1
    """Processes of each job, among which the prompts are divided."""


@dataclass(frozen=True)
class Job:
    """One run: a study's complete configuration, by a name that says in what it differs from the others."""

    name: str
    study: str
    config: Any

    @property
    def plain(self) -> dict[str, Any]:
        """The configuration as JSON."""
        found: dict[str, Any] = plain(self.config)
        return found

    @property
    def loads(self) -> tuple[Any, ...]:
        """What it loads; jobs that load the same can share it."""
        names = ("model", "base", "adapter", "revision", "dtype", "device", "device_map")
        return tuple(self.plain.get(name) for name in names)


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file; UserError for what is none, with the nearest name for a slip of the hand."""
    import yaml

    try:
        found = yaml.safe_load(read_whole(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # days and numbers that can't be, and deep nesting
        if isinstance(error, UserError):
            raise
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where is not None else ""
        raise UserError(f"{path} is no YAML{line}; {REMEDY}") from error
    _require_plain(found, path)
    if not isinstance(found, dict) or "study" not in found:
        raise UserError(f"{path} has no `study`; a plan has study, options and over, such as study: separate")
    known = [one.name for one in fields(Plan)]
    if unknown := next((name for name in found if name not in known), None):
        raise unknown_name(f"entry of {path} called", str(unknown), known)
    plan: Plan = checked(found, Plan, str(path), REMEDY)
    for name, values in plan.over.items():
        if not values:
            raise UserError(f"{path}: `over` has no values for {name!r}; give a list of them")
    return plan


def _require_plain(found: object, path: Path) -> None:
    """UserError for what JSON hasn't, and for the few lines whose aliases stand for more than any memory holds."""
    waiting: list[tuple[object, int]] = [(found, 0)]
    seen = 0
    while waiting:
        one, depth = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise UserError(
                f"{path} holds more than {MOST_VALUES} values, or nests them more than {DEEPEST} deep, once its "
                f"aliases (*name) are written out; {REMEDY}"
            )
        inner = [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
        if not isinstance(one, str | int | float | dict | list | None):
            raise UserError(f"{path} holds {quoted(one)} ({kind_of(one)}); put it in quotes if it is a text")
        waiting += [(value, depth + 1) for value in inner]


def jobs_of(plan: Plan, out: Path, name: str) -> list[Job]:
    """Every combination as a job with a run folder below `out`; UserError for the first that can't be.

    `name` is what errors call the plan.
    """
    study = _study(plan.study, name)
    wanted = math.prod(map(len, plan.over.values()))
    if wanted > MOST:
        raise UserError(f"{name} makes {wanted:,} jobs, and a sweep has at most {MOST:,}; shorten its lists")
    _refuse_twice(plan, name)
    parts = [[_part(key, value) for value in values] for key, values in plan.over.items()]
    labels = [_labels(key, values) for key, values in plan.over.items()]
    made = []
    for places in itertools.product(*(range(len(values)) for values in parts)):
        options = _options(plan.options, study, name)
        for axis, place in zip(parts, places, strict=True):
            options |= _options(axis[place], study, name)
        label = "_".join(words[place] for words, place in zip(labels, places, strict=True)) or study.verb
        made.append(_job(study, label, options, out, name))
    return made


def _study(given: str, name: str) -> Study:
    known = {study.name: study for study in studies().values()}
    if given not in known:
        raise UserError(f"{name}: {unknown_name('study', given, list(known))}")
    return known[given]


def _part(key: str, value: Any) -> dict[str, Any]:
    """The options that one value of an axis stands for."""
    return value if isinstance(value, dict) else {key: value}


def _options(given: Mapping[str, Any], study: Study, name: str) -> dict[str, Any]:
    """Options by their names in Python; UserError for one that the study hasn't, or that a sweep decides."""
    known = [one.name for one in fields(study.config) if one.name not in OURS]
    found = {}
    for option, value in given.items():
        python = str(option).lstrip("-").replace("-", "_")
        if python in OURS:
            raise UserError(f"{name} sets {python!r}, which the sweep decides for every job; leave it out")
        if python not in known:
            raise UserError(f"{name}: {unknown_name(f'option of {study.name} called', python, known)}")
        found[python] = value
    return found


def _refuse_twice(plan: Plan, name: str) -> None:
    """UserError for an option that two entries of the plan set, of which one would be passed over."""
    sets = [[option for value in values for option in _part(key, value)] for key, values in plan.over.items()]
    counts = Counter(option for one in [list(plan.options), *map(set, sets)] for option in one)
    if twice := next((option for option, count in counts.items() if count > 1), None):
        raise UserError(f"{name} sets {twice!r} in two places; leave one of them out")


def _labels(key: str, values: list[Any]) -> list[str]:
    """A word for each value of an axis, all different and fit for a folder's name."""
    words = [_word(key, value) for value in values]
    counts = Counter(words)
    marks = [hashlib.sha256(repr(value).encode()).hexdigest()[:6] for value in values]
    return [word if counts[word] == 1 else f"{word}-{mark}" for word, mark in zip(words, marks, strict=True)]


def _word(key: str, value: Any) -> str:
    shown = "+".join(_short(one) for one in value.values()) if isinstance(value, dict) else _short(value)
    return f"{_fit(key)}-{shown}"


def _short(value: Any) -> str:
    """A value in a few characters: of a path its last part, of a list its parts."""
    if isinstance(value, list | tuple):
        return "+".join(map(_short, value))[:WIDTH]
    text = short_name(value) if isinstance(value, str) and value else str(value)
    return _fit(text)[:WIDTH] or "none"


def _fit(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-.")


def _job(study: Study, label: str, options: dict[str, Any], out: Path, name: str) -> Job:
    wandb = options.get("wandb", {})
    grouped = {**WANDB, "group": out.name, **wandb} if isinstance(wandb, dict) else wandb
    values = {**options, "wandb": grouped, "out": str(out / label)}
    where = f"{name}, job {label}:"
    config = with_paths(checked(values, study.config, where, REMEDY, extra="forbid"))
    try:
        require_possible(config)
        require_known(config)
    except UserError as error:
        raise UserError(f"{where} {error.typed}") from error
    return Job(label, study.verb, config)
