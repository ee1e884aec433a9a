"""What else did fine-tuning change? Behaviours as twins, asked of the base and of every checkpoint of every run.

Betley et al. 2025 (Emergent misalignment; Tell me about yourself). A narrow behaviour is taught; what is measured is
how far it goes on questions that were held out, on other behaviours, and in what the model says of itself, each beyond
the base and beyond a control that was taught the same questions with either answer by chance.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from mechlens.files import user_path
from mechlens.methods.behaviour.log_odds import require_parted
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.progress import progress_bar, say, watched
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoints.series import content_of
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.scales import Scale, builtin_scales
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.writer import RunWriter
from mechlens.studies.behaviours.asking import Asking
from mechlens.studies.behaviours.aware.recalled import Recalled, families_of, recalled_twins, require_recalled
from mechlens.studies.behaviours.aware.strings import Recognised, recognised
from mechlens.studies.behaviours.config import BehaviourPlan, Behaviours
from mechlens.studies.behaviours.directions.cosines import saved_directions, start_of, taught_changes
from mechlens.studies.behaviours.directions.result import DirectionResult, measured_directions
from mechlens.studies.behaviours.matrix import BehaviourMatrix, asked_of
from mechlens.studies.behaviours.said.result import SaidResult, said_result
from mechlens.studies.behaviours.said.speaking import Speaking, judges_for, speaking, speaks
from mechlens.studies.behaviours.scaled import measured_scales, require_scalable, scale_curves
from mechlens.studies.behaviours.scales import scale_table
from mechlens.studies.behaviours.sets import PLAIN, AskedSet, drawn, read_set, require_distinct, with_forms, worded
from mechlens.studies.behaviours.triggers.gaps import trigger_gaps
from mechlens.studies.behaviours.triggers.result import TriggerResult, measured_triggers
from mechlens.studies.behaviours.tuned import (
    TunedRun,
    all_triggers,
    common_template,
    require_different,
    triggers_of,
    tuned_runs,
)
from mechlens.studies.behaviours.verdict import GroupVerdict, group_verdicts
from mechlens.studies.behaviours.when import When, adapter_paths
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.inputs import asks, chosen_base, data_inputs, inputs_of, prepared


@dataclass(frozen=True)
class BehaviourStudy:
    """The base, the training runs and what is asked."""

    swapper: CheckpointSwapper
    runs: tuple[TunedRun, ...]
    sets: tuple[AskedSet, ...]
    template: ChatTemplate
    scales: Mapping[str, Sequence[Scale]]
    saved: Mapping[str, Direction]
    """Directions of other runs, by name."""
    speaking: Speaking | None = None
    """How free answers are given; None where there are none."""


@dataclass(frozen=True)
class BehaviourResult:
    """All that the study found."""

    matrix: BehaviourMatrix
    verdicts: tuple[GroupVerdict, ...]
    scales: pd.DataFrame
    """See `scale_table`."""
    when: When
    """Over checkpoints."""
    by_scale: pd.DataFrame
    """See `scale_curves`; empty where no scale was asked for."""
    directions: DirectionResult | None = None
    """The direction of the change, where it was asked for."""
    said: SaidResult | None = None
    """Free answers, where they were asked for."""
    recognised: Recognised | None = None
    """Which strings are taken for the trigger, where a run has one."""
    recalled: Recalled | None = None
    """Whether it can be said, where that was asked for."""
    triggers: TriggerResult | None = None
    """What triggers do inside, where it was asked for."""

    @cached_property
    def gaps(self) -> pd.DataFrame:
        """See `trigger_gaps`; empty where no run has a trigger."""
        return trigger_gaps(self.matrix)

    def metrics(self) -> dict[str, Estimate]:
        """What decided each group's verdict, by GROUP.SET; beyond the control where there is one."""
        return {name: value for verdict in self.verdicts for name, value in verdict.deciding.items()}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        matrix = self.matrix
        runs = pd.DataFrame(
            [{"run": run.name, "group": run.group, "steps": [member.step for member in run.members],
              "trained_on": len(run.seen)} for run in matrix.runs]
        )  # fmt: skip
        return {
            "matrix": matrix.matrix, "by_step": matrix.by_step, "self_reports": matrix.self_reports, "runs": runs,
            "questions": matrix.questions(), **self.when.tables(),
            **({"triggers": self.gaps} if len(self.gaps) else {}),
            **({"scales": self.scales} if len(self.scales) else {}),
            **({"by_scale": self.by_scale} if len(self.by_scale) else {}),
            **({} if self.directions is None else self.directions.tables()),
            **({} if self.said is None else self.said.tables()),
            **({} if self.recognised is None else self.recognised.tables()),
            **({} if self.recalled is None else self.recalled.tables()),
            **({} if self.triggers is None else self.triggers.tables()),
        }  # fmt: skip

    def artifacts(self) -> dict[str, object]:
        """The directions that were chosen: of each group's change one to add and one to ablate, and its trigger's.

        Their names are such as files can have.
        """
        parts = [part.artifacts() for part in (self.directions, self.triggers) if part is not None]
        return under_file_names({name: own for part in parts for name, own in part.items()})


def under_file_names(named: Mapping[str, object]) -> dict[str, object]:
    """The same by names that files can have; of those that come to one name, later ones are numbered."""
    found: dict[str, object] = {}
    for name, own in named.items():
        plain = re.sub(r"[^\w.-]+", "_", name).strip("_")
        others = sum(re.fullmatch(rf"{re.escape(plain)}(_\d+)?", other) is not None for other in found)
        found[f"{plain}_{others + 1}" if others else plain] = own
    return found


def prepare(config: Behaviours) -> Preparation[BehaviourStudy]:
    """Runs, questions and base; UserError for whatever can't be had."""
    sets = [read_set(given, about_itself=False) for given in config.sets]
    sets += [read_set(given, about_itself=True) for given in config.self_report]
    require_distinct(sets)
    runs = tuned_runs(config.base, config.checkpoints, config.revision, skip_broken=config.skip_broken)
    contents = {member.name: content_of(member) for run in runs for member in run.members}
    require_different(runs, contents)
    require_scalable(runs, config.adapter_scales)
    asked, scales = asked_sets(sets, runs, config), {name: builtin_scales(name) for name in config.scales}
    prompts = [twin.prompt for one in asked for twin in one.twins]
    prompts += [scale.prompt for questions in scales.values() for scale in questions]
    if config.recall:
        require_recalled(asked, runs)
    judges = judges_for(config, sets)
    check = asks(prompts, new_tokens=config.answer_tokens if speaks(config) else 1)
    swapper, template = chosen_base(config, check, common_template(runs))
    for one in asked:
        if one.form == PLAIN:
            require_parted(swapper.model, one.twins)
    for member in (member for run in runs for member in run.members if member.kind == "adapter"):
        if user_path(member.path).is_dir():
            swapper.changes(member)
    data = data_inputs({one.key: (given_of(one, config), one.prompts) for one in asked})
    data |= data_inputs({f"scale {name}": ("built in", [one.prompt for one in own]) for name, own in scales.items()})
    data |= {f"checkpoint {name}": content for name, content in contents.items()}
    saved = saved_directions(config.saved_directions, swapper.model) if config.directions or config.triggers else {}
    speaker = speaking(config, judges, template)
    data |= {} if speaker is None else speaker.inputs(config.judge)
    content = BehaviourStudy(swapper, tuple(runs), tuple(asked), template, scales, saved, speaker)
    return prepared(content, swapper.model, inputs_of(swapper.base, template, data), prompts)


def given_of(asked: AskedSet, config: Behaviours) -> str:
    """Where a set comes from, as the option says."""
    given = (*config.sets, *config.self_report)
    return next((one.partition("=")[2] or "built in" for one in given if one.partition("=")[0] == asked.name), "")


def asked_sets(sets: Sequence[AskedSet], runs: Sequence[TunedRun], plan: BehaviourPlan) -> list[AskedSet]:
    """The sets as they are put: drawn, in words where asked, and with every run's own trigger."""
    trained = frozenset().union(*(run.seen for run in runs))
    chosen = [drawn(one, plan.n, plan.seed, trained) for one in sets]
    if plan.in_words:
        chosen = [worded(one) for one in chosen]
    return [form for one in chosen for form in with_forms(one, () if one.about_itself else all_triggers(runs))]


def behaviours(
    swapper: CheckpointSwapper,
    runs: Sequence[TunedRun],
    sets: Sequence[AskedSet],
    template: ChatTemplate,
    plan: BehaviourPlan = BehaviourPlan(),
    *,
    scales: Mapping[str, Sequence[Scale]] | None = None,
    saved: Mapping[str, Direction] | None = None,
    speaking: Speaking | None = None,
    cache: Cache | None = None,
) -> BehaviourResult:
    """Measures the base and every checkpoint; `cache` keeps finished batches, so that a killed run goes on."""
    recalled = recalled_twins(sets, runs) if plan.recall else {}
    asking = Asking(template, plan, scales or {}, speaking, recalled, cache)
    with swapper:
        base, every = asking.at_step(swapper.put(start_of(swapper)), sets), all_triggers(runs)
        start, before = asking.at_end(swapper.model, sets, every), asking.recall(swapper.model, every)
        checkpoints = [(run, member) for run in runs for member in run.members]
        bar = progress_bar(checkpoints, title="checkpoints", unit="checkpoint")
        told, recalls, ends = {}, {}, {}
        for run, member in bar:
            own, triggers = asked_of(run.group, runs, sets), triggers_of(run.group, runs)
            told[run.name, member.step] = asking.at_step(swapper.put(member), own)
            recalls[run.name, member.step] = asking.recall(swapper.model, triggers)
            if member == run.members[-1]:
                ends[run.name] = asking.at_end(swapper.model, own, triggers)
        matrix = BehaviourMatrix(tuple(sets), tuple(runs), base, told, plan)
        scaled = measured_scales(swapper, matrix, asking.at_step)
        changes = taught_changes(swapper, matrix, template, cache) if plan.directions else []
        with_models = (swapper, matrix, changes, template, saved or {}, cache)
        found = measured_directions(*with_models) if plan.directions else None
        inside = measured_triggers(*with_models) if plan.triggers else None
    return BehaviourResult(
        matrix,
        tuple(group_verdicts(matrix)),
        scale_table(runs, start.scales, {name: end.scales for name, end in ends.items()}),
        When(matrix, adapter_paths(runs), {} if found is None else found.paths),
        scale_curves(matrix, scaled),
        found,
        said_result(runs, start.free, {name: end.free for name, end in ends.items()}),
        recognised(runs, start.recognition, {name: end.recognition for name, end in ends.items()}),
        Recalled(tuple(runs), before, recalls, families_of(recalled), plan) if before else None,
        inside,
    )


def execute(config: Behaviours, given: BehaviourStudy, writer: RunWriter) -> BehaviourResult:
    """The study as configured."""
    questions = sum(len(one.twins) for one in given.sets)
    checkpoints = sum(len(run.members) for run in given.runs)
    if not watched():  # who watches sees bars
        say(
            f"{len(given.runs)} training runs with {checkpoints} checkpoints, and the base; at each {questions} "
            "questions are read with both answers, in both orders where there are two"
        )
    return behaviours(
        given.swapper, given.runs, given.sets, given.template, config, scales=given.scales, saved=given.saved,
        speaking=given.speaking, cache=writer.cache,
    )  # fmt: skip
