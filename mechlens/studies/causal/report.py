"""The causal battery as a record: metrics, tables, figures, the two directions and a report."""

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import loaded
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import NAMES
from mechlens.studies.causal.figures import DONE_WORDS, draw
from mechlens.studies.causal.study import Battery
from mechlens.studies.causal.verdict import CausalVerdict, causal_verdict
from mechlens.studies.shared.harm_sets import ContrastSets
from mechlens.studies.shared.rounding import logit_rounding

QUESTION = (
    "Does the harmfulness direction change what the model believes about a request, while the refusal direction only "
    "changes whether it refuses (Zhao et al. 2025)? Belief is asked for by reply inversion: 'Certainly' if the request "
    "is harmful, otherwise 'No', so that believing in harm and being unwilling to answer move the reply apart; and the "
    "other way round, so that saying yes to everything is no belief."
)
MAX_CHANGED = 6
"""Answers shown for each direction."""
NUMBERS = {
    "inversion_auroc.unsteered": "AUROC of the unsteered replies, both questions",
    "inversion_auroc.straight": "AUROC, question where yes means harmful",
    "inversion_auroc.reversed": "AUROC, question where yes means harmless",
    "inversion_parsed": "requests whose two replies say yes or no",
    "inversion_consistent": "requests whose two replies say one belief",
    "inversion_declined": "requests of which a question is declined",
    "refusal_rate.harmless": "harmless refused, unsteered",
    "refusal_rate.harmful": "harmful refused, unsteered",
}
"""What decides the verdict, in words; see `number_words` for the cells."""


def number_words(name: str) -> str:
    """A deciding number in words: "belief.all.refusal.at_refusal.add_harmful" and such."""
    if name in NUMBERS:
        return NUMBERS[name]
    measure, direction, at, cell = name.rsplit(".", 3)
    operation, _, label = cell.partition("_")
    what, _, scope = measure.replace("consistent", "both replies").partition(".")
    where = {"before": ", before the question", "all": ", everywhere"}.get(scope, "")
    setting = "" if at == f"at_{direction}" else f" ({at.removeprefix('at_')}'s setting)"
    return f"{what}, {direction} {DONE_WORDS[operation]} {label}{where}{setting}"


def record(writer: RunWriter, result: Battery, sets: ContrastSets) -> None:
    """Writes everything the battery found into an open run."""
    verdict = causal_verdict(result)
    writer.result(result)
    writer.report(_report(result, verdict, draw(writer, result), sets))


def _report(result: Battery, verdict: CausalVerdict, drawn: dict[str, tuple[str, ...]], sets: ContrastSets) -> Report:
    checkpoint, parity = loaded(sets.model).checkpoint, loaded(sets.model).parity
    moved = {name: one for name, one in verdict.deciding.items() if name not in NUMBERS}
    changes = {f"the change of {number_words(name)}": one for name, one in moved.items()}
    return Report(
        title=f"What two directions do in {checkpoint.name}",
        question=QUESTION,
        headline=verdict.headline,
        verdict=f"{verdict.word.capitalize()}. {verdict.sentence}" + logit_rounding(parity, changes),
        numbers={name: estimate for name, estimate in verdict.deciding.items() if estimate.measurable},
        words={name: number_words(name) for name in verdict.deciding},
        sections=(
            _belief(result, drawn),
            Section(
                "Refusal, cell by cell",
                "The refusal direction should raise refusal where it is added and lower it where it is subtracted.",
                drawn["refusal"],
            ),
            _layers(result, drawn),
            Section(
                "How layer and strength were chosen",
                "On validation prompts, by the push of what each direction is claimed to do: harmfulness by the change "
                "of belief that both questions bear out, before the question (by refusal where belief isn't "
                f"measurable), refusal by the log-odds of refusal. {_search(result.plan)} Never from the last fifth of "
                "the depth. The table: what became of every cell of the whole grid, each layer below the last fifth at "
                "each strength.",
                drawn["choice"],
                table=result.choice.cells,
            ),
            *_calibrated(result),
            *_positions(drawn),
            _answers(result),
            _damage(result, drawn),
        ),
        how=_how(result, verdict, sets.punctuation),
        model=checkpoint.name,
    )


def _belief(result: Battery, drawn: dict[str, tuple[str, ...]]) -> Section:
    yes, no = result.tokens.words.texts
    missing = "" if drawn["belief"] else "Not measurable on this model, so nothing was steered here.\n\n"
    return Section(
        "Belief, cell by cell",
        f"{missing}The harmfulness direction should move belief wherever it is put. The refusal direction put before "
        "the question only can do little whatever it means, as refusal is decided at the last token; put everywhere it "
        "pushes towards the word that refuses, which is the same word for both questions and so no belief. Both are "
        "tried at either's best layer and strength: a direction that does nothing where nothing does anything has "
        f"shown nothing.\n\nRead at the tokens {yes!r} and {no!r}, which of the asked words and the model's own tell "
        "the classes better on validation prompts. The table has the unsteered differences by wording of the question.",
        (*drawn["belief"], *drawn["words"]),
        table=result.unsteered.by_question,
    )


def _layers(result: Battery, drawn: dict[str, tuple[str, ...]]) -> Section:
    gap = result.depth
    split = (
        f"The refusal direction's effect on refusal has its centre {gap.layers} layers deeper than the harmfulness "
        f"direction's. Two-sided permutation test, the directions' profiles over layers exchanged within prompt "
        f"families: p = {gap.p:.3f}. "
        if gap.layers.measurable
        else ""
    )
    return Section(
        "By layer, as published",
        f"{split}A centre is the mean layer, weighted by the mean change of the log-odds of refusal there.",
        (*drawn["fig4"], *drawn["fig5"]),
    )


def _search(plan: CausalPlan) -> str:
    if plan.calibrate_kl is not None:
        first = "" if plan.grid == "all" else " and the best one's neighbours"
        return f"Layers{first} at strengths of equal damage (below); the largest push is taken."
    tried = "First layers at the middle strength, then the best one's neighbours, then the other strengths there."
    if plan.grid == "all":
        tried = "Every layer is tried at every strength."
    return (
        f"{tried} Of the pushes inside the interval of the largest the weakest strength is taken, and at it the layer "
        "that pushes most."
    )


def _calibrated(result: Battery) -> tuple[Section, ...]:
    """Strengths of equal damage, where they were asked for."""
    table, kl = result.calibration, result.plan.calibrate_kl
    if kl is None or table.empty:
        return ()
    missed = int((~table["reached"]).sum())
    lacks = f" At {missed} of {len(table)} it isn't reached, and these can't be chosen." if missed else ""
    text = (
        f"At each layer a direction has the strength at which the 95th percentile, over tokens, of the KL from the "
        f"unsteered model's answers to harmless validation prompts is {kl:g} nats where it is added to the prompt, as "
        f"everywhere here; it is subtracted as strongly. So directions and layers are compared at equal damage, and "
        f"the two directions also where both are put at one layer. Null directions are as long as the one that they "
        f"stand beside.{lacks} Passes: over all prompts with their answers."
    )
    return (Section("Strengths of equal damage", text, table=table),)


def _positions(drawn: dict[str, tuple[str, ...]]) -> tuple[Section, ...]:
    text = "The same contrasts at the last token of the user's words and at every token of the template after it."
    return (Section("Directions from every position", text, drawn["positions"]),) if drawn["positions"] else ()


def _answers(result: Battery) -> Section:
    """The answers whose verdict the push changed, then others that it changed."""
    shown = []
    for name in result.directions:
        pushed = result.answers[result.answers["is_push"] & (result.answers["direction"] == name)]
        flipped = pushed["verdict_before"] != pushed["verdict_after"]
        changed = pushed["unsteered_answer"] != pushed["answer"]
        ranked = pushed.assign(rank=2 * flipped + changed).sort_values("rank", ascending=False, kind="stable")
        shown.append(ranked.head(MAX_CHANGED))
    columns = ["direction", "operation", "label", "prompt", "unsteered_answer", "answer"]
    table = pd.concat(shown)[columns] if shown else None
    return Section(
        "Answers before and after",
        "Test prompts under the chosen push; those whose verdict changed come first. All are in "
        "`tables/steered_answers.parquet`.",
        table=table,
    )


def _damage(result: Battery, drawn: dict[str, tuple[str, ...]]) -> Section:
    table = result.broken
    shown = None if table.empty else table.pivot_table(
        index=["direction", "operation"], columns="measure", values="value", sort=False
    ).reset_index()  # fmt: skip
    return Section(
        "What else breaks",
        "Cross-entropy of plain text (acted on at every token) and of the model's own unsteered answers to harmless "
        "prompts, KL from the unsteered model over those answers, repeated word triples, empty answers, refusals "
        "by mechlens' list, which decides everywhere, and by the two published ones that it holds, of Arditi et al. "
        "(`_arditi`) and of Zhao et al. (`_zhao`): where they differ, one of them doesn't know the words.",
        drawn["damage"],
        table=shown,
    )


def _how(result: Battery, verdict: CausalVerdict, punctuation: str) -> str:
    plan, chosen = result.plan, result.choice.chosen
    settings = "; ".join(
        f"{name}: layer {chosen[name].layer}, strength {chosen[name].strength:.3g} of the median residual norm"
        for name in NAMES
        if name in chosen
    )
    defined = "; ".join(f"{name} from {a} and {b} training prompts" for name, (a, b) in result.counts.items())
    parsed: Estimate = result.unsteered.numbers["inversion_parsed"]
    return (
        f"The rule of the verdict. {verdict.rule}\n\n"
        f"Prompts: {result.split.sizes}. {punctuation} Directions: {defined} (mean "
        f"differences; harmfulness at `inst`, refusal at `last`). Chosen on validation: {settings or 'nothing'}.\n\n"
        "Adding acts on every token of the prompt at the input of one block; ablating removes the component at every "
        f"layer, site and token. Controls, on {plan.n_null} of the test prompts of each class: "
        f"{plan.random_directions} random directions of the same norm and {plan.shuffled_directions} null directions "
        f"from shuffled labels. Refusal is read off the first answer token: log-odds of "
        f"{list(result.tokens.refusal.texts)}, whose AUROC for the judge's verdicts is {result.first_token.auroc}. "
        "Intervals: 95% bootstrap over families, directions frozen; of shares never narrower than Wilson's. Each "
        f"request is asked about with one of five questions, in turns, both ways round (n = {parsed.n})."
    )
