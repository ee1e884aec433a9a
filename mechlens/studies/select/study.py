"""Which single direction carries refusal? Every candidate scored, one chosen on validation, tested once.

Candidates are the differences between harmful and harmless training prompts at every post-instruction position and
layer (Arditi et al. 2024). Beside them as many random directions of the same lengths go through the same choice.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float64
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.errors import UserError, many, warn
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.chosen_judge import judges_of, verdicts_by
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction, direction_grid, random_like
from mechlens.methods.progress import phase
from mechlens.methods.shown import html_with, lines
from mechlens.methods.statistics.by_prompt import by_prompt_table
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.candidates import (
    KEPT,
    LOW_INDUCE,
    CandidateFilter,
    CandidateScores,
    SelectionRule,
    filter_candidates,
    score_candidates,
)
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.models.sites import require_everywhere
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.runs.results.paired import BY_PROMPT
from mechlens.runs.writer import RunWriter
from mechlens.settings import FRACTIONS
from mechlens.studies.driver import Preparation
from mechlens.studies.select.config import Select, SelectionPlan
from mechlens.studies.select.held_out import SelectionTest, run_selection_test
from mechlens.studies.shared.harm_sets import ContrastSets, labelled, prepare_harm_study
from mechlens.studies.shared.quadrants import FirstTokenJudgement, JudgedAnswers, judge_answers, judge_first_token

HARMFUL, HARMLESS = "harmful", "harmless"
MIN_KEPT = 3
"""Fewer prompts than this of one class in training or validation don't choose a direction."""
FEWEST = 34
"""Prompts of a class of which three in ten, which test, are ten."""


@dataclass(frozen=True)
class Ranking:
    """Candidates with their scores on validation prompts, and what became of each."""

    candidates: tuple[Direction, ...]
    scores: CandidateScores
    filtered: CandidateFilter

    @property
    def means(self) -> Float64[Tensor, "candidate score"]:
        """Bypass, induce and KL of every candidate."""
        return self.scores.means()

    @property
    def best(self) -> Direction | None:
        """The chosen direction; None where no candidate was let through."""
        return None if self.filtered.chosen is None else self.candidates[self.filtered.chosen]

    def random_controls(self) -> tuple[Direction, ...]:
        """The best at bypassing and the best at inducing; none where no candidate is left to choose from.

        They come from the `pool`.
        """
        if not self.pool:
            return ()
        bypass, induce, _ = self.means.T.tolist()
        lowest, highest = min(self.pool, key=bypass.__getitem__), max(self.pool, key=induce.__getitem__)
        return self.candidates[lowest], self.candidates[highest]

    @property
    def pool(self) -> list[int]:
        """Candidates that are kept or induce too little: of random ones, few or none induce refusal."""
        return [i for i, status in enumerate(self.filtered.status) if status in (KEPT, LOW_INDUCE)]

    def table(self) -> pd.DataFrame:
        """One row per candidate: position, level, norm, bypass, induce, kl, status."""
        bypass, induce, kl = self.means.T.tolist()
        chosen = range(len(self.candidates))
        return pd.DataFrame(
            {
                "position": [candidate.position for candidate in self.candidates],
                "level": [candidate.level for candidate in self.candidates],
                "norm": [candidate.norm for candidate in self.candidates],
                "bypass": bypass,
                "induce": induce,
                "kl": kl,
                "status": ["chosen" if i == self.filtered.chosen else self.filtered.status[i] for i in chosen],
            }
        )


@dataclass(frozen=True, repr=False)
class Selection:
    """What was found, and everything its numbers were made from.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.SelectionPlan(resamples=50, random_directions=2, max_new_tokens=4)
    >>> found = ml.select_direction(model, harmful, harmless, plan)
    >>> ml.selection_verdict(found).sentence != ""
    True
    """

    judged: JudgedAnswers
    first_token: FirstTokenJudgement
    split: Split
    kept: dict[str, dict[str, tuple[int, ...]]]
    """Prompts that chose: row numbers by part ("train", "validation") and class."""
    found: Ranking
    random: Ranking
    """The same choice among as many random directions."""
    test: SelectionTest | None
    """None where no candidate was let through."""
    plan: SelectionPlan

    def metrics(self) -> dict[str, Estimate]:
        """Every headline number by its name in run.json."""
        counts = self.found.filtered.counts()
        total = sum(counts.values())
        numbers = {f"candidates.{name.replace(' ', '_')}": Estimate.exact(n, total) for name, n in counts.items()}
        kept = self.random.filtered.counts()
        numbers["candidates.kept.random"] = Estimate.exact(kept["kept"], sum(kept.values()))
        if self.test is None:
            return numbers
        numbers["chosen.level"] = Estimate.exact(self.test.chosen.level, total)
        return numbers | self.test.metrics()

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        tables = {
            "candidates": self.candidates(),
            "filters": self.filters(),
            "sizes": self.sizes(),
            "answers": self.judged.table().assign(log_odds=self.first_token.log_odds.tolist()),
        }
        if self.test is None:
            return tables
        tested = [{"metric": name, **estimate.row()} for name, estimate in self.test.metrics().items()]
        prompts = [self.judged.prompts[i] for i in self.split.test]
        ids = {label: [prompt.id for prompt in prompts if prompt.label == label] for label in (HARMFUL, HARMLESS)}
        return tables | {
            "test": pd.DataFrame(tested),
            "steered_answers": self.steered_answers(),
            BY_PROMPT: by_prompt_table(self.test.by_prompt(ids)),
        }

    def artifacts(self) -> dict[str, object]:
        """The chosen direction, if there is one."""
        return {} if self.test is None else {"direction": self.test.chosen}

    def candidates(self) -> pd.DataFrame:
        """Scores of every candidate, and of every random one."""
        rankings = {"candidate": self.found, "random": self.random}
        return pd.concat([ranked.table().assign(kind=kind) for kind, ranked in rankings.items()], ignore_index=True)

    def filters(self) -> pd.DataFrame:
        """How many candidates each filter dropped, and how many random ones."""
        counts, random = self.found.filtered.counts(), self.random.filtered.counts()
        return pd.DataFrame([{"filter": name, "candidates": counts[name], "random": random[name]} for name in counts])

    def steered_answers(self) -> pd.DataFrame:
        """Test prompts with their answers before and after, refused or not, by every judge."""
        assert self.test is not None
        before = dict(zip(self.judged.answers.ids, self.judged.answers.texts, strict=True))
        refused = dict(zip(self.judged.answers.ids, self.judged.refused, strict=True))
        prompts = {prompt.id: prompt for prompt in self.judged.prompts}
        frames = []
        for name, said in self.test.answers.items():
            asked = [prompts[prompt] for prompt in said.ids]
            columns = {
                "done": name, "id": said.ids, "prompt": [prompt.text for prompt in asked],
                "answer_before": [before[prompt] for prompt in said.ids], "answer_after": said.texts,
                "refused_before": [refused[prompt] for prompt in said.ids], "refused_after": self.test.refused[name],
            }  # fmt: skip
            others = judges_of(self.plan.judge)[1:]
            lists = {f"verdict_after_{judge.name}": verdicts_by(judge, asked, said.texts) for judge in others}
            frames.append(pd.DataFrame(columns | lists))
        return pd.concat(frames, ignore_index=True)

    def sizes(self) -> pd.DataFrame:
        """Prompts of each part and class: before and after the filter by refusal score."""
        labels = [prompt.label for prompt in self.judged.prompts]
        return pd.DataFrame(
            [
                {
                    "part": part,
                    "class": label,
                    "prompts": sum(labels[i] == label for i in self.split.part(part)),
                    "kept": len(self.kept[part][label]) if part in self.kept else None,
                }
                for part in ("train", "validation", "test")
                for label in (HARMFUL, HARMLESS)
            ]
        )

    def __repr__(self) -> str:
        from mechlens.studies.select.verdict import selection_verdict

        facts = {"prompts": self.split.sizes, "chosen": "none" if self.test is None else self.test.chosen}
        return lines(f"Selection in {self.judged.answers.checkpoint.name}: {selection_verdict(self).headline}", facts)

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.found.table().sort_values("status"))


def select_direction(
    model: LanguageModel,
    harmful: Prompts,
    harmless: Prompts,
    plan: SelectionPlan = SelectionPlan(),
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Selection:
    """The whole selection on one model.

    Harmful prompts with a refusal score of at most 0, and harmless ones with at least 0, neither make nor choose a
    direction (as published); on test every prompt counts. UserError, with the counts, where too few are left.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.SelectionPlan(resamples=50, random_directions=2, max_new_tokens=4)
    >>> found = ml.select_direction(model, harmful, harmless, plan)
    >>> ml.selection_verdict(found).sentence != ""
    True
    """
    require_everywhere(model)
    prompts = labelled(harmful, harmless)
    batch = tokenize(prompts, template_of(model, template))
    judged = judge_answers(prompts, answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache), plan.judge)
    acts = collect(model, batch, positions=["post[*]"], cache=cache)
    labels = [prompt.label for prompt in prompts]
    families = [prompt.group for prompt in prompts]
    split = split_by_family(labels, families, fractions=FRACTIONS, seed=plan.seed)
    judged, first_token = judge_first_token(model, judged, acts, split.train)
    kept = _kept(labels, first_token.log_odds, split)
    candidates = _candidates(acts, kept["train"], n_layers(model))
    matched_controls = [random_like(candidate, 1, plan.seed + 1 + i)[0] for i, candidate in enumerate(candidates)]
    with phase("selecting", f"1 of 3 ({len(candidates)} candidates)"):
        ranked = _ranked(model, candidates, batch, kept["validation"], first_token.tokens.ids, plan, cache)
    with phase("selecting", "2 of 3 (as many random directions)"):
        random = _ranked(model, matched_controls, batch, kept["validation"], first_token.tokens.ids, plan, cache)
    test = None
    if ranked.best is not None:
        with phase("selecting", "3 of 3 (the chosen one on test prompts)"):
            test = run_selection_test(
                model,
                batch.select(split.test),
                [judged.refused[i] for i in split.test],
                ranked.best,
                random.random_controls(),
                first_token.tokens.ids,
                plan,
                cache=cache,
            )
    return Selection(judged, first_token, split, kept, ranked, random, test, plan)


def _kept(
    labels: Sequence[str], scores: Float64[Tensor, " prompt"], split: Split
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Prompts whose first token is on the side of their class, by part and class."""
    sides = {HARMFUL: scores > 0, HARMLESS: scores < 0}
    kept: dict[str, dict[str, tuple[int, ...]]] = {}
    for part in ("train", "validation"):
        kept[part] = {}
        for label, right in sides.items():
            asked = [i for i in split.part(part) if labels[i] == label]
            kept[part][label] = tuple(i for i in asked if right[i])
            if len(kept[part][label]) < MIN_KEPT:
                n = len(kept[part][label])
                more = f"about {math.ceil(MIN_KEPT / n)} times as many" if n else "other"
                raise UserError(
                    f"of {len(asked)} {label} {part} prompts {n} have a refusal score "
                    f"{'above' if label == HARMFUL else 'below'} 0, and at least {MIN_KEPT} are needed; take {more} "
                    "prompts, or a model that refuses harmful and answers harmless ones"
                )
    return kept


def _candidates(acts: Activations, kept: dict[str, tuple[int, ...]], n_blocks: int) -> tuple[Direction, ...]:
    """The difference of means at every position and every level that is a block's input."""
    grid = direction_grid(acts.select([*kept[HARMFUL], *kept[HARMLESS]]), HARMFUL, HARMLESS)
    return tuple(grid.at(level, position) for position in grid.positions for level in range(n_blocks))


def rule_of(plan: SelectionPlan) -> SelectionRule:
    """How one of the candidates is chosen."""
    return SelectionRule(plan.last_layers, plan.highest_kl, plan.least_induce)


def _ranked(
    model: LanguageModel,
    candidates: Sequence[Direction],
    batch: TokenBatch,
    kept: dict[str, tuple[int, ...]],
    tokens: Sequence[int],
    plan: SelectionPlan,
    cache: Cache | None,
) -> Ranking:
    scores = score_candidates(model, candidates, batch, kept[HARMFUL], kept[HARMLESS], tokens, cache=cache)
    rule = rule_of(plan)
    return Ranking(tuple(candidates), scores, filter_candidates(candidates, scores.means(), n_layers(model), rule))


def prepare(config: Select) -> Preparation[ContrastSets]:
    """Prompts and model; UserError for whatever can't be had."""
    least = math.ceil(MIN_KEPT / FRACTIONS[1])
    found = prepare_harm_study(config, config, new_tokens=config.max_new_tokens, least=least)
    sides = (found.content.positive, found.content.negative)
    few = min(len({prompt.group for prompt in side}) for side in sides)
    if few < FEWEST:
        chosen, tested = (round(share * few) for share in FRACTIONS[1:])
        warn(
            f"of {few} prompts of a class {chosen} choose and {tested} test, and an interval needs 10; take at least "
            f"{FEWEST} (--n {FEWEST}, n={FEWEST} in Python)",
        )
    return found


def execute(config: Select, sets: ContrastSets, writer: RunWriter) -> Selection:
    """The selection on the configured model and prompts."""
    tqdm.write(_said(config, sets), file=sys.stderr)
    return select_direction(
        sets.model, sets.positive, sets.negative, config, template=sets.template, cache=writer.cache
    )


def _said(plan: SelectionPlan, sets: ContrastSets) -> str:
    """The plan in one line, before the work begins."""
    prompts = labelled(sets.positive, sets.negative)
    positions = tokenize(prompts, template_of(sets.model, sets.template)).resolve(["post[*]"])
    levels = n_layers(sets.model)
    n = len(positions) * levels
    return (
        f"{len(prompts)} prompts are answered with up to {plan.max_new_tokens} tokens; {n} candidates "
        f"({many(len(positions), 'position')} at {many(levels, 'level')}) and as many random directions are scored on "
        f"validation prompts, and the chosen one is tested beside {plan.random_directions} random ones"
    )
