"""Labelled prompts from many places, by one loader: what a detector is tested on, and attacks paired with their goals.

A list of sources is a JSON file; files in it lie below a folder that is given with it, so the list names no machine.
No attack is generated here: attacks are rows of a file, or published templates put around goals.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from mechlens.checked_json import checked, parse_json
from mechlens.errors import UserError, quoted
from mechlens.files import AnyPath, read_whole, user_path
from mechlens.prompts.builtin import builtin_names
from mechlens.prompts.files.load import load_prompts
from mechlens.prompts.files.rows import FILE_ENDINGS, columns_of, read_rows
from mechlens.prompts.prompt import Prompt
from mechlens.studies.shared.training_data import text_sha256

HARMFUL, HARMLESS = "harmful", "harmless"
Kind = Literal["requests", "over-refusal", "suffix", "persuasion", "template"]
ATTACKS: tuple[Kind, ...] = ("suffix", "persuasion", "template")
PLACEHOLDER = "[INSERT PROMPT HERE]"
PRESETS = {"builtin": "builtin_sources.json", "published": "published_sources.json"}
"""Lists that come with mechlens: its own prompt sets, and the names of published sets' files."""
OWN = '[{"name": "mine", "data": "attacks.csv", "goal_column": "goal", "kind": "suffix", "label": "harmful"}]'
"""A list with one source of attacks in rows, each beside the plain request behind it."""


@dataclass(frozen=True)
class Source:
    r"""Where labelled prompts come from, and what kind they are of.

    >>> from pathlib import Path
    >>> _ = Path("ours.csv").write_text("text,label\nBake a cake.,harmless\nPoison a cake.,harmful\n")
    >>> source = ml.Source("ours", "ours.csv", label_column="label", harmful=("harmful",))
    >>> [prompt.label for prompt in ml.load_source(source, Path("."), seed=0).prompts]
    ['harmless', 'harmful']
    """

    name: str
    data: str
    """A built-in set, a file below the folder (or by its whole path), or a hub data set."""
    kind: Kind = "requests"
    """ "over-refusal": its harmless prompts look harmful. "suffix", "persuasion", "template": attacks."""
    label: str | None = None
    """harmful or harmless, where all prompts are one of them."""
    label_column: str | None = None
    harmful: tuple[str, ...] = ()
    """Values of `label_column` that mean harmful; all others mean harmless."""
    column: str | None = None
    goal_column: str | None = None
    """The plain request behind an attack."""
    templates: str | None = None
    """File of templates with [INSERT PROMPT HERE]; the prompts of `data` are then the goals put there."""
    where: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    """Split of a hub data set."""
    sample: int | None = None
    """At most so many prompts, drawn by seed."""


@dataclass(frozen=True)
class SourcePrompts:
    r"""The prompts of one source; an attack's family is the fingerprint of its goal.

    >>> from pathlib import Path
    >>> _ = Path("ours.csv").write_text("text,label\nBake a cake.,harmless\nPoison a cake.,harmful\n")
    >>> source = ml.Source("ours", "ours.csv", label_column="label", harmful=("harmful",))
    >>> [prompt.label for prompt in ml.load_source(source, Path("."), seed=0).prompts]
    ['harmless', 'harmful']
    """

    source: Source
    prompts: tuple[Prompt, ...]
    goals: dict[str, Prompt]
    """By family, the plain request behind each attack."""


def read_sources(given: AnyPath) -> tuple[Source, ...]:
    """The sources of a preset ("builtin", "published") or of a JSON file: a list of objects, one a source.

    >>> all(isinstance(source, ml.Source) for source in ml.read_sources("builtin"))
    True
    """
    given = os.fspath(given)
    if given in PRESETS:
        where = given
        text = (Path(__file__).parent / "data" / PRESETS[given]).read_text(encoding="utf-8")
    else:
        where = given
        try:
            text = read_whole(user_path(given)).decode("utf-8-sig")
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(
                f"the list of sources {quoted(given, 80)} could not be read ({error}); "
                f"give {', '.join(PRESETS)} or a JSON file"
            ) from error
    try:
        rows = parse_json(text, Any, where, "correct it")
    except UserError as error:
        raise UserError(str(error).replace("is not JSON", "is not valid JSON", 1)) from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{where} must hold a list of sources, each with a name and data")
    sources = tuple(_source(row, where) for row in rows)
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where} has two sources called {quoted(twice)}; give each a name of its own")
    return sources


def require_files(sources: Sequence[Source], given: str, folder: Path | None) -> None:
    """UserError, with what is needed and how to give one's own, where files of these sources aren't there."""
    named = [file for source in sources for file in (source.data, source.templates) if file is not None]
    files = [file for file in dict.fromkeys(named) if Path(file).suffix.lower() in FILE_ENDINGS]
    where = Path(".") if folder is None else folder
    missing = [file for file in files if not user_path(where / file).exists()]
    if not missing:
        return
    what = "there is no folder" if not where.is_dir() else f"{len(missing)} of {len(files)} files aren't in the folder"
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    raise UserError(
        f"{what} {str(where)!r}: {given} needs {shown}; give the folder that holds them with --folder, or "
        f"sources of your own as --sources FILE.json, such as {OWN}"
    )


def load_source(source: Source, folder: AnyPath | None, seed: int, most: int | None = None) -> SourcePrompts:
    r"""The source's prompts, labelled harmful or harmless; `most` bounds their number further.

    >>> from pathlib import Path
    >>> _ = Path("ours.csv").write_text("text,label\nBake a cake.,harmless\nPoison a cake.,harmful\n")
    >>> source = ml.Source("ours", "ours.csv", label_column="label", harmful=("harmful",))
    >>> [prompt.label for prompt in ml.load_source(source, Path("."), seed=0).prompts]
    ['harmless', 'harmful']
    """
    folder = None if folder is None else user_path(folder)
    wanted = min((limit for limit in (source.sample, most) if limit is not None), default=None)
    if wanted is not None and wanted < 1:
        raise UserError(f"{wanted} prompts of {source.name} were asked for; ask for at least one")
    whole = _from_templates(source, folder, seed, wanted) if source.templates else _from_rows(source, folder)
    kept = whole.prompts
    if wanted is not None and wanted < len(kept):
        drawn = sorted(random.Random(seed).sample(range(len(kept)), wanted))
        kept = tuple(kept[i] for i in drawn)
    families = {prompt.family for prompt in kept}
    return SourcePrompts(source, kept, {family: goal for family, goal in whole.goals.items() if family in families})


def wrapped(prompts: Sequence[Prompt], file: str, seed: int) -> list[Prompt]:
    """Each prompt put into one of the file's templates, drawn by seed and family: a pair gets the same one."""
    templates = _read_templates(file, file)
    drawn = [random.Random(f"{seed} {prompt.group}").choice(templates) for prompt in prompts]
    return [
        replace(
            prompt,
            id=f"{prompt.id}@{template.id}",
            text=template.text.replace(PLACEHOLDER, prompt.text),
            family=prompt.group,
        )
        for prompt, template in zip(prompts, drawn, strict=True)
    ]


def _read_templates(file: str, name: str) -> list[Prompt]:
    """Those of a file, from the one column that has places for prompts, whatever it's called."""
    path = user_path(file)
    rows = read_rows(path) if path.is_file() else []
    places = [one for one in columns_of(rows) if any(PLACEHOLDER in str(row.values.get(one)) for row in rows)]
    if rows and not places:
        raise UserError(f"{name} has no {PLACEHOLDER} for the prompt in any template; put it there")
    templates = load_prompts(file, column=places[0] if len(places) == 1 else None)
    lacking = [template.id for template in templates if PLACEHOLDER not in template.text]
    if lacking:
        raise UserError(f"{name}: the template {lacking[0]!r} has no {PLACEHOLDER} for the prompt; put it there")
    return templates


def _source(row: Any, where: str) -> Source:
    known = {item.name for item in fields(Source)}
    if not isinstance(row, dict) or not {"name", "data"} <= row.keys():
        raise UserError(f"{where} has a source without name and data ({quoted(row)}); give both")
    name = row["name"]
    unknown = sorted(row.keys() - known)
    if unknown:
        raise UserError(
            f"{where}, source {quoted(name)}, has {quoted(unknown[0])}; a source has {', '.join(sorted(known))}"
        )
    if row.get("kind", "requests") not in get_args(Kind):
        raise UserError(
            f"{where}, source {quoted(name)}, is of kind {quoted(row['kind'])}; choose from {', '.join(get_args(Kind))}"
        )
    source: Source = checked(row, Source, f"{where}, source {quoted(name)},", "correct it")
    if (source.label is None) == (source.label_column is None):
        raise UserError(
            f"{where}, source {quoted(name)}, needs a label (harmful or harmless) or a label_column, one of them"
        )
    if source.label not in (None, HARMFUL, HARMLESS) or (source.label_column and not source.harmful):
        raise UserError(
            f"{where}, source {quoted(name)}: label is harmful or harmless, and with a label_column the values that "
            "mean harmful stand in the list harmful"
        )
    return source


def _located(data: str, folder: Path | None) -> str:
    """A built-in set or hub id as it is; a file below the folder by its path."""
    below = user_path(folder / data if folder is not None else data)
    return data if data in builtin_names() or not below.exists() else str(below)


def _rows_of(source: Source, folder: Path | None, family_column: str | None) -> list[Prompt]:
    builtin = source.data in builtin_names()
    prompts = load_prompts(
        _located(source.data, folder),
        column=source.column,
        label_column=source.label_column,
        where=source.where,
        split=source.split,
        family_column=family_column,
    )
    labels = [source.label or (HARMFUL if prompt.label in source.harmful else HARMLESS) for prompt in prompts]
    missing = set(source.harmful) - {prompt.label for prompt in prompts}
    if not builtin and source.label_column and missing == set(source.harmful):
        found = ", ".join(sorted({prompt.label for prompt in prompts})[:6])
        raise UserError(
            f"{source.name}: no row's {source.label_column} is {' or '.join(sorted(missing))}, only {found}; name the "
            "values that mean harmful"
        )
    return [
        replace(prompt, id=f"{source.name}:{prompt.id}", label=label, source=source.name)
        for prompt, label in zip(prompts, labels, strict=True)
    ]


def _from_rows(source: Source, folder: Path | None) -> SourcePrompts:
    prompts, goals = [], {}
    for prompt in _rows_of(source, folder, source.goal_column):
        if source.goal_column is None:
            # One text in two sources is one family; pairs stay pairs.
            prompts.append(replace(prompt, family=prompt.family or text_sha256(prompt.text)))
            continue
        goal = _goal(source, prompt.family, prompt)
        goals[goal.family] = goal
        prompts.append(replace(prompt, family=goal.family))
    return SourcePrompts(source, tuple(prompts), goals)


def _from_templates(source: Source, folder: Path | None, seed: int, wanted: int | None) -> SourcePrompts:
    """Goals put into templates, in an order drawn by seed: each template as often as the others."""
    goals = [_goal(source, prompt.text, prompt) for prompt in _rows_of(source, folder, None)]
    assert source.templates is not None
    templates = _read_templates(_located(source.templates, folder), source.name)
    draw = random.Random(seed)
    pairs = [(template, goal) for goal in goals for template in templates]
    if wanted is not None and wanted < len(pairs):
        order = draw.sample(range(len(goals)), len(goals))
        pairs = [(templates[i % len(templates)], goals[order[i % len(goals)]]) for i in range(wanted)]
    prompts = dict.fromkeys(_filled(source, template, goal) for template, goal in pairs)
    return SourcePrompts(source, tuple(prompts), {goal.family: goal for goal in goals})


def _filled(source: Source, template: Prompt, goal: Prompt) -> Prompt:
    return replace(
        goal,
        id=f"{source.name}:{template.id}:{goal.family[:12]}",
        text=template.text.replace(PLACEHOLDER, goal.text),
        source=source.name,
    )


def _goal(source: Source, text: str, prompt: Prompt) -> Prompt:
    sha = text_sha256(text)
    return Prompt(f"goal:{sha[:12]}", text, prompt.label, prompt.category, f"{source.name} goals", family=sha)
