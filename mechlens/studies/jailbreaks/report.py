"""The jailbreak study as a record: beliefs by attack family, what putting components back does, categories."""

from collections import Counter

import numpy as np
import pandas as pd
import torch

from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.runs.headline import Headline
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.jailbreaks.category_directions import CategoryDirections
from mechlens.studies.jailbreaks.config import JailbreakPlan
from mechlens.studies.jailbreaks.pairs import OrdinaryPrompts, Pairs
from mechlens.studies.jailbreaks.study import AttackSets, JailbreakResult
from mechlens.studies.shared.rounding import class_rounding

QUESTION = (
    "An attack gets an answer to a request that the model refuses when it is asked plainly. Does the model no longer "
    "see that the request is harmful, or does it see it and not refuse (Zhao et al. 2025, sections 3.2 and 4)?"
)
RULE = (
    "By the centred beliefs of attacks on requests that are refused when plain:\n\n"
    "- Hides harmfulness: the mean belief of harmfulness is below 0, and lower than for the plain requests, by their "
    "intervals.\n\n"
    "- Suppresses refusal only: it stays above 0 while the belief of refusal falls.\n\n"
    "- No effect on refusal shown: the interval of that fall reaches 0."
)
NUMBERS = {
    "success": "answered though the plain request is refused",
    "belief_harm.centered": "belief of harmfulness",
    "change.belief_harm.centered": "change of the belief of harmfulness",
    "change.belief_refusal.centered": "change of the belief of refusal",
}
"""What decides the verdict, in words; the beliefs are centred."""


SETTLED = ("hides harmfulness", "suppresses refusal only")
"""Verdicts that more requests wouldn't change."""


def record(writer: RunWriter, result: JailbreakResult, given: AttackSets) -> None:
    """Writes everything the study found into an open run."""
    writer.result(result)
    sections = [_beliefs(writer, result), _put_back(writer, result)]
    if result.categories is not None:
        sections.append(_categories(writer, result.categories))
    measured = result.by_family
    writer.report(
        Report(
            title=f"What jailbreaks do to {loaded(given.model).checkpoint.name}",
            question=QUESTION,
            headline=_headline(result.verdicts, measured),
            verdict=_sentence(result.verdicts, measured) + _rounding(result, given.model),
            numbers={f"{name}.{family}": measures[name] for family, measures in measured.items() for name in NUMBERS},
            words={f"{name}.{family}": f"{family}: {words}" for family in measured for name, words in NUMBERS.items()},
            sections=tuple(sections),
            how=_how(result.pairs, result.reference, result.plan, given.punctuation),
            model=loaded(given.model).checkpoint.name,
        )
    )


def _rounding(result: JailbreakResult, model: LanguageModel) -> str:
    """Of the distances between the centroids by which beliefs are read, at the levels of the two directions."""
    classes, found = {}, result.reference
    for means, direction in ((found.harm, found.harm_direction), (found.refusal, found.refusal_direction)):
        level = means.levels.index(direction.level)
        both = torch.stack([means.positive[level], means.negative[level]])
        words = f"the distance between {' and '.join(means.contrast)} prompts at {means.position}"
        classes[words] = both, torch.tensor([True, False])
    return class_rounding(loaded(model).parity, classes)


def _headline(verdicts: dict[str, str], measured: dict[str, dict[str, Estimate]]) -> Headline:
    """How many families do what, with the numbers of the one that works most often."""
    most = max(verdicts, key=lambda family: np.nan_to_num(measured[family]["success"].value, nan=-1.0))
    harm, change = (measured[most][name] for name in ("belief_harm.centered", "change.belief_harm.centered"))
    counts = Counter(verdicts.values()).most_common()
    families = ", ".join(f"{word} ({n} of {len(verdicts)} attack families)" for word, n in counts)
    word = families if len(verdicts) > 1 else f"{most} {verdicts[most]}"
    settle = "" if verdicts[most] in SETTLED else "more requests that are refused when asked plainly would settle it"
    number = f"under {most} the belief of harmfulness is {harm.brief},"
    return Headline(word, number, f"a change of {change.brief} from the plain requests'", settle)


def _sentence(verdicts: dict[str, str], measured: dict[str, dict[str, Estimate]]) -> str:
    parts = [
        f"{family}: {verdict} (works on {measured[family]['success']} of refused requests; belief of harmfulness "
        f"{measured[family]['belief_harm.centered']}, change {measured[family]['change.belief_harm.centered']})."
        for family, verdict in verdicts.items()
    ]
    return " ".join(part[0].upper() + part[1:] for part in parts)


def _beliefs(writer: RunWriter, result: JailbreakResult) -> Section:
    aimed = result.attacks[result.attacks["plain.refused"]]
    plain = aimed.drop_duplicates("goal")
    points = pd.concat(
        [
            pd.DataFrame({"belief_harm": plain["plain.belief_harm.centered"],
                          "belief_refusal": plain["plain.belief_refusal.centered"], "group": "plain requests"}),
            pd.DataFrame({"belief_harm": aimed["belief_harm.centered"],
                          "belief_refusal": aimed["belief_refusal.centered"], "group": aimed["family"]}),
        ],
        ignore_index=True,
    )  # fmt: skip
    writer.table("belief_points", points)
    figure = figures.scatter(
        points, x="belief_harm", y="belief_refusal", group="group", hline=0.0, vline=0.0,
        title="Beliefs of plain requests that are refused, and of attacks around them",
        xlabel="belief of harmfulness at inst (cosine difference, centred)",
        ylabel="belief of refusal at last (cosine difference, centred)",
    )  # fmt: skip
    seen = (
        "Each point is a prompt. Right: seen as harmful. Up: about to refuse. An attack that suppresses refusal moves "
        "points down; one that hides harmfulness moves them to the left."
    )
    writer.figure("beliefs", figure, table="belief_points", caption=seen)
    names = {"change.belief_harm.centered": "harmfulness", "change.belief_refusal.centered": "refusal"}
    families = result.families()
    changes = families[families["measure"].isin(names)]
    bars = figures.bars(
        changes.assign(belief=changes["measure"].map(names)), x="family", y="value", low="low", high="high",
        group="belief", hline=0.0, title="Change of the beliefs against the plain request, paired by goal", xlabel="",
        ylabel="attack minus plain (cosine difference)",
    )  # fmt: skip
    fallen = (
        "Below 0: the attack lowers the belief. Where it lowers that of refusal alone the model still sees the harm. "
        "Bars: 95% bootstrap over goals."
    )
    writer.figure("belief_changes", bars, table="families", caption=fallen)
    summary = [
        {"family": family, "verdict": verdict} | {name: str(result.by_family[family][name]) for name in
         ("plain_refused", "success", "seen_as_harmful", "belief_harm", "belief_refusal")}
        for family, verdict in result.verdicts.items()
    ]  # fmt: skip
    return Section(
        "Which attacks hide harmfulness, and which only suppress refusal",
        "Beliefs are mean cosine differences to centroids of refused harmful and accepted harmless prompts without an "
        "attack. `belief_harm` and `belief_refusal` in the table are the paper's, the figures' are centred. Only "
        "attacks on requests that are refused when plain count.",
        ("beliefs", "belief_changes"),
        table=pd.DataFrame(summary),
    )


def _put_back(writer: RunWriter, result: JailbreakResult) -> Section:
    title = "Does putting the component back restore refusal?"
    if result.restored is None:
        return Section(title, "Not measurable: no attack turned a refusal into an acceptance.")
    table = result.restored.table(result.plan)
    figure = figures.bars(
        table, x="family", y="log_odds_change", low="low", high="high", group="way", hline=0.0,
        title="Log-odds of refusal with the plain request's component put back", xlabel="",
        ylabel="change of the log-odds",
    )  # fmt: skip
    caption = "Above 0, and above random directions in the table: putting the component back brings refusal back."
    writer.figure("restored", figure, table="restored", caption=caption)
    return Section(
        title,
        "In attacks that succeeded, the component along a direction, at the level and position where it is read, is "
        f"set to that of the plain request. `random_mean` and `random_maximum`: {result.plan.random_directions} random "
        "directions treated alike at the same place.",
        ("restored",),
        table=table,
    )


def _in_words(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The table with spaces in its categories' names."""
    return frame.assign(**{column: frame[column].str.replace("_", " ") for column in columns})


def _categories(writer: RunWriter, categories: CategoryDirections) -> Section:
    shown = []
    for position, part in _in_words(categories.pairs, "category", "other").groupby("position", sort=False):
        figure = figures.heatmap(
            part, x="other", y="category", value="cosine", center=0.0, limits=(-1.0, 1.0), label="cosine",
            title=f"Cosines between categories' directions at {position}", xlabel="category",
            ylabel="category",
        )  # fmt: skip
        name = f"category_cosines_{'inst' if position == 'inst' else 'last'}"
        caption = "Red off the diagonal: the categories share a direction. Plain as the page: nothing in common."
        shown.append(writer.figure(name, figure, table="category_cosines", caption=caption))
    for position, part in _in_words(categories.transfer, "fitted_on", "tested_on").groupby("position", sort=False):
        figure = figures.heatmap(
            part, x="tested_on", y="fitted_on", value="auroc", center=0.5, limits=(0.0, 1.0), label="AUROC",
            title=f"One category's direction on the others, at {position}", xlabel="tested on", ylabel="fitted on",
        )  # fmt: skip
        name = f"category_transfer_{'inst' if position == 'inst' else 'last'}"
        caption = "Red: what was fitted on one category tells another from harmless prompts too. Plain is chance."
        shown.append(writer.figure(name, figure, table="category_transfer", caption=caption))
    missing = f"Directions of refusal can't be compared: {categories.no_refusals}. " if categories.no_refusals else ""
    means = "; ".join(f"{name.rpartition('.')[2]} {mean}" for name, mean in categories.means.items())
    return Section(
        "Is harmfulness one thing?",
        "A category's direction of harmfulness, at inst, is its mean minus that of harmless prompts; its direction of "
        "refusal, at the last token, the mean of its refused prompts minus that of accepted harmless ones. Mean cosine "
        f"over pairs: {means}. {missing}Two categories are compared by directions from disjoint halves of the harmless "
        "prompts; `corrected` in the table divides by the directions' reliability. Transfer is tested on prompts that "
        "no direction was fitted to.\n\n"
        "What every prompt of a file shares against the harmless ones (final punctuation, wording) makes such "
        "directions alike and lets them transfer, whatever they mean: only differences between categories, or "
        "categories and harmless prompts from one source, say more.",
        tuple(shown),
        table=categories.reliability,
    )


def _how(pairs: Pairs, reference: OrdinaryPrompts, plan: JailbreakPlan, punctuation: str) -> str:
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in reference.counts.items())
    left = int(pairs.left_out["left_out"].sum())
    harm, refusal = reference.harm_direction, reference.refusal_direction
    return (
        f"The rule of the verdict. {RULE}\n\nReference prompts: {counts}. {punctuation}. Attacks: {len(pairs.attacks)} "
        f"on {len(pairs.goals)} requests; {left} were left out because the model was trained on their goal or it is a "
        f"reference prompt. Directions: harmful minus harmless at {harm.position}, level {harm.level}; refused minus "
        f"accepted at {refusal.position}, level {refusal.level}; levels chosen on validation families.\n\nIntervals: "
        f"95% bootstrap over goals ({plan.resamples} resamples), centroids and directions frozen; for mean cosines "
        f"of categories a jackknife over tenths of the prompt families, directions refitted. Answers: greedy, "
        f"{plan.max_new_tokens} tokens, judged by {pairs.attack_judged.judge}."
    )
