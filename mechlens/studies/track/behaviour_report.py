"""What the model does at the first and the last step of a series, in words and tables of the report."""

import textwrap
from collections import Counter
from dataclasses import replace

import pandas as pd

from mechlens.errors import many
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import LONGEST, Headline
from mechlens.studies.shared.sink_positions import first_of_each
from mechlens.studies.track.result import Tracking
from mechlens.studies.track.verdict import MOVED, headline_of

FEW_REFUSALS = 20
"""Of fewer the first tokens may be chance: a plain count, chosen by eye; how often it errs was not measured."""
REFUSED = "refusal_rate"
EXAMPLES, SHOWN = 3, 160
"""Answers of each class that are shown, and their characters."""
ALIKE = 5
"""Fewer answers of one text, such as a usual refusal, are nothing to speak of."""
KINDS = ("harmful", "harmless")
LISTED = "refusal_rate_by."
"""How the numbers of the published lists begin."""


def _refused(result: Tracking, kind: str, step: int) -> Estimate:
    table = result.behaviour.set_index(["number", "step"])
    return Estimate.of_row(table.loc[(f"{REFUSED}.{kind}", step)])


def last_refusals(result: Tracking) -> dict[str, Estimate]:
    """What the last checkpoint refuses, in words."""
    last = result.steps[-1]
    return {f"{kind} prompts refused at step {last}": _refused(result, kind, last) for kind in KINDS}


def now_refused(result: Tracking) -> str:
    """How often the model refuses at the end, and how often the base does."""
    base, last = result.steps[0], result.steps[-1]
    parts = [
        f"{_refused(result, kind, last).brief} of the {kind} prompts (the base {_refused(result, kind, base).brief})"
        for kind in KINDS
    ]
    return f"At step {last} the model refuses {' and '.join(parts)}."


def series_headline(result: Tracking) -> Headline | None:
    """The concepts' sentence, and before it what the model does where that changed much; settled later if too long."""
    found = headline_of(result.last_verdicts)
    rates = {kind: [_refused(result, kind, result.steps[end]).value for end in (-1, 0)] for kind in KINDS}
    changes = {kind: abs(now - base) for kind, (now, base) in rates.items() if abs(now - base) >= MOVED}
    if found is None or not changes:
        return found
    kind = max(changes, key=lambda one: changes[one])
    now, base = rates[kind]
    told = replace(found, verdict=f"{found.verdict}, {kind} prompts refused {now:.2f} (base {base:.2f})")
    return told if len(str(told)) <= LONGEST else replace(told, settle="")


def one_text(result: Tracking) -> str:
    """That the last checkpoint gives one text to many prompts which the base didn't; "" where it doesn't."""
    ends = result.snapshots[-1], result.snapshots[0]
    now, base = (Counter(one.answers.texts).most_common(1)[0][1] for one in ends)
    n = len(ends[0].answers.texts)
    if now < max(ALIKE, base * 2, n / 4):
        return ""
    return f"{now} of its {n} answers are one and the same text (the base: {base}), so it may have learnt to say that."


def some_answers(result: Tracking) -> pd.DataFrame:
    """The beginnings of a few answers, at the first and the last step."""
    prompts = result.questions.batch.prompts
    rows = first_of_each([one.label for one in prompts], EXAMPLES)
    ends = {"base": result.snapshots[0]} | {f"step {result.steps[-1]}": result.snapshots[-1]}
    return pd.DataFrame(
        {"class": prompts[i].label, "prompt": _cut(prompts[i].text)}
        | {name: _cut(one.answers.texts[i]) for name, one in ends.items()}
        for i in rows
    )


def _cut(text: str) -> str:
    return textwrap.shorten(text, SHOWN, placeholder=" ...")


def behaviour_text(result: Tracking) -> str:
    """How to read the table, where the first tokens of refusals come from, and what was steered."""
    steered = int(result.effects["n"].max()) if len(result.effects) else 0
    added = f" Each concept's direction was added once, at `inst` and after it, to {steered} harmless test prompts."
    return (
        "The table has the shares at the first and the last step. Empty answers count as no refusal, and ones that the "
        "judge can't tell are left out of the rates.\n\n"
        f"{_tokens_text(result)}{added if steered else ''}"
    )


def _tokens_text(result: Tracking) -> str:
    """First tokens of the base's refusals, and how many refusals they come from."""
    reference, tokens = result.reference, result.reference.tokens
    train = reference.split.train
    refusals = sum(reference.judged.refused[i] for i in train)
    said = f"The base refuses {refusals} of {many(len(train), 'prompt')} that directions are fitted on"
    if tokens.origin == "fallback":
        return (
            f"{said}, in which no first tokens of its own are found; common ones stand in, so their log-odds needn't "
            f"follow its refusals: {tokens.named}."
        )
    care = f"; fewer than {FEW_REFUSALS} (a plain count) may start so by chance: read log-odds with care"
    few = care if refusals < FEW_REFUSALS else ""
    return f"{said}; the first tokens of these refusals are {tokens.named}{few}."


def answer_rates(result: Tracking) -> pd.DataFrame:
    """What the answers are at the first and the last step, by the chosen judge and by the published lists."""
    table = result.behaviour.set_index(["number", "step"])
    named = {REFUSED: f"refused, by the judge {result.reference.judged.judge!r}"}
    stems = [name.removesuffix(".harmful") for name in table.index.unique(level="number") if name.endswith(".harmful")]
    named |= {stem: f"refused, by {stem.partition('.')[2]}'s list" for stem in stems if stem.startswith(LISTED)}
    named |= {"empty_rate": "empty", "unclear_rate": "unclear or unfinished"}
    ends = dict.fromkeys((result.steps[0], result.steps[-1]))
    return pd.DataFrame(
        {"answers": words}
        | {
            f"{kind}, step {step}": str(Estimate.of_row(table.loc[(f"{stem}.{kind}", step)]))
            for kind in KINDS
            for step in ends
        }
        for stem, words in named.items()
    )
