"""One road for every recorded study: prepare, open the run, execute, report.

The command line, `ml.run(config)` and `mechlens runs rerun` all come this way.
"""

import shlex
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from mechlens.checked_json import checked, require_types
from mechlens.choices import require_known
from mechlens.errors import UserError, kind_of
from mechlens.files import AnyPath, short_name, user_path
from mechlens.methods.heartbeat import heartbeat
from mechlens.methods.progress import Clock, phase, say, timed
from mechlens.models.precision import Parity
from mechlens.prompts.prompt import Prompt
from mechlens.registry import loaded, unknown_name
from mechlens.runs.own_classes import own_classes
from mechlens.runs.remote.copies import shown
from mechlens.runs.remote.mirror import mirrored
from mechlens.runs.remote.store import is_remote, require_here
from mechlens.runs.results.result import RunResult, open_run_folder
from mechlens.runs.run import (
    Difference,
    Inputs,
    Run,
    changed_since,
    largest_difference,
    metric_text,
    plain,
    read_run,
)
from mechlens.runs.writer import RunWriter, finished, open_run, require_folder
from mechlens.settings import WandbSettings
from mechlens.studies.possible import require_possible, with_paths
from mechlens.studies.registry import COMMANDS, Study, studies, study_of
from mechlens.studies.shared.training_data import LeftOut, record_left_out

Content = TypeVar("Content")


@dataclass(frozen=True)
class Preparation(Generic[Content]):
    """All that goes into a study: what it works on, and what the record keeps of that.

    >>> study = ml.Study("loudness", ml.Separate, "package.study:prepare", "package.study:execute")
    >>> study.verb
    'loudness'
    """

    content: Content
    """The study's own: models, prompts, settings."""
    inputs: Inputs
    """Fingerprints that a rerun is held to."""
    prompts: tuple[Prompt, ...] = ()
    """Kept in `tables/prompts.parquet`."""
    left_out: LeftOut | None = None
    """Prompts that the model was trained on."""
    device: str | None = None
    dtype: str | None = None
    parity: Parity | None = None
    """How far the model is from plain Hugging Face in the same type."""
    resolved: Mapping[str, object] = field(default_factory=dict)
    """What the configuration left open, filled in."""


def run(config: Any) -> RunResult:
    """Does the study that this configuration is of, recorded in its run folder, and gives what was found.

    A killed run goes on where it stopped when it is called again with the same configuration; a finished one is given
    back as it is (`rerun` computes it anew). UserError, before anything slow, for whatever can't be had.

    >>> study = ml.FindDirection(
    ...     positive="harmful", negative="harmless", n=20, model="smollm2", out="runs/harm", positions=("last",),
    ...     resamples=50, permutations=10, random_directions=2,
    ... )
    >>> run = ml.run(study)
    >>> run.record.status, list(run.metrics.columns[:3])
    ('success', ['name', 'words', 'value'])
    >>> run.sentence == ml.open("runs/harm").sentence == ml.read_run("runs/harm").sentence
    True
    """
    do(config)
    return open_run_folder(config.out)


def do(config: Any) -> None:
    """As `run`, without opening what was found."""
    study = study_of(config)
    config = with_paths(config)
    require_possible(config)
    require_types(config, plain(config))
    require_known(config)
    given = config.out
    with mirrored(given) if is_remote(given) else nullcontext(given) as out, timed() as clock:
        config = replace(config, out=out)
        with heartbeat(clock, study.name):
            with phase("loading", _model_of(config)):
                study = _imported(study)
                prepared = _prepared(study, config)
            if finished(study.verb, config, out, prepared.resolved, prepared.inputs):
                say(f"the run in {given} is finished; this is it (`runs rerun` computes it anew)")
            else:
                _recorded(study, config, prepared, clock)


def _model_of(config: Any) -> str:
    """The model, for those who wait for it."""
    return short_name(getattr(config, "model", None) or getattr(config, "base", None) or "model")


def _imported(study: Study) -> Study:
    """The study with its functions in place of their names: what can't be imported is said before a run is opened."""
    try:
        report = None if study.report is None else loaded(study.report)
        return replace(study, prepare=loaded(study.prepare), execute=loaded(study.execute), report=report)
    except (ImportError, AttributeError, ValueError) as error:
        if study.name in COMMANDS.ours:
            raise
        raise UserError(f"a function of the study {study.name!r} can't be imported: {error}") from error


def _prepared(study: Study, config: Any) -> Preparation[Any]:
    require_folder(study.verb, config, config.out)
    found = loaded(study.prepare)(config)
    if not isinstance(found, Preparation):
        raise UserError(f"the study {study.name!r} prepared {kind_of(found)}, not a Preparation")
    return found


def _recorded(study: Study, config: Any, prepared: Preparation[Any], clock: Clock) -> Path:
    resolved = prepared.resolved or None
    keep = getattr(config, "keep_cache", False)  # a study of another package may not have it
    with open_run(
        verb=study.verb, config=config, out=config.out, wandb=config.wandb, resolved=resolved, keep_cache=keep
    ) as writer:
        _record_inputs(writer, prepared)
        result = loaded(study.execute)(config, prepared.content, writer)
        if study.report is not None:
            with phase("report", apart=True):
                loaded(study.report)(writer, result, prepared.content)
        writer.seconds(clock.by_phase())
    return Path(config.out)


def _record_inputs(writer: RunWriter, prepared: Preparation[Any]) -> None:
    """Before the work begins: a killed run's folder says what went into it."""
    writer.inputs(prepared.inputs, device=prepared.device, dtype=prepared.dtype, parity=prepared.parity)
    if prepared.left_out is not None:
        record_left_out(writer, prepared.left_out)
    if prepared.prompts:
        writer.prompts(prepared.prompts)


def rerun(folder: AnyPath, out: AnyPath | None = None) -> Difference:
    """Makes a recorded run again, computing everything anew; the metric that differs most.

    It goes to `out`, or to a temporary folder. A chat template that prints the date prints the day of the first run.
    UserError, before anything is computed, naming each input that isn't what it was.

    >>> ml.rerun("runs/first").difference
    0.0
    """
    if out is not None:
        require_here(Path(out), "what is made again")
    before = read_run(folder)
    if before.status != "success":
        raise UserError(
            f"the run in {folder} did not end, so there are no numbers to make again; give its own command once more, "
            "which goes on from what is on disk (`mechlens runs list` shows it)"
        )
    known = studies()
    if before.verb not in known:
        raise unknown_name("study", before.verb, list(known))
    study = _imported(known[before.verb])
    with tempfile.TemporaryDirectory() as scratch:
        day = {"today": before.inputs.today} if before.inputs.today else {}
        where = Path(scratch) / "rerun" if out is None else user_path(out)
        again = with_paths(_rebuilt(study.config, before.config | day, where))
        require_known(again)
        with timed() as clock, heartbeat(clock, study.name):
            with phase("loading", _model_of(again)):
                prepared = _prepared(study, again)
            changed = changed_since(before, prepared.inputs)
            if changed:
                raise UserError(f"the run {before.id} can't be made again: {'; '.join(changed)}")
            return largest_difference(before, read_run(_recorded(study, again, prepared, clock)))


def _rebuilt(cls: Any, config: Mapping[str, Any], out: Path) -> Any:
    """The study's configuration from its record; a rerun isn't mirrored in W&B."""
    values = {**config, "out": str(out), "wandb": asdict(WandbSettings(mode="disabled"))}
    return checked(values, cls, "the run's configuration", "run it by hand with this version's options")


def summary(folder: Path) -> str:
    """What a finished run found, for a terminal: what decided in words, verdict, report, and last the one sentence."""
    run = read_run(folder)
    where = shown(folder)
    lines = [f"{run.words.get(name, name)}: {metric_text(name, one)}" for name, one in run.deciding.items()]
    if more := len(run.metrics) - len(lines):
        lines.append(f"{more} more in the report and `mechlens runs show {shlex.quote(where)}`")
    said = (run.verdict or "").removeprefix(run.sentence).strip()
    lines += ["", *filter(None, [said, own_classes(run.config)])]
    lines += _to_steer(folder, run) if where == str(folder) else []
    lines.append(f"report: {(folder / 'report.html').resolve() if where == str(folder) else where + '/report.html'}")
    return "\n".join([*lines, *filter(None, [run.sentence])])


def _to_steer(folder: Path, run: Run) -> list[str]:
    """The command that tries a run's one direction on a prompt, ready to be pasted."""
    artefact = run.artefacts.get("direction") or run.artefacts.get("strongest")
    if artefact is None or not run.config.get("model"):
        return []
    loading = [
        word
        for name in ("model", "adapter", "revision", "dtype")
        if run.config.get(name) not in (None, "auto")
        for word in (f"--{name}", str(run.config[name]))
    ]
    words = ["mechlens", "steer", *loading, "--direction", str(folder / artefact.file)]
    return [f'steer with it: {shlex.join(words)} --prompt "..."']
