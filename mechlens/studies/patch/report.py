"""A patching run as a record: grids, controls, heads, and two sentences."""

import pandas as pd

from mechlens.methods.patching.plan import MODES
from mechlens.methods.patching.result import MIN_SHARE
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.patch.figures import draw
from mechlens.studies.patch.study import Candidates, RefusalPath
from mechlens.studies.patch.verdict import PathVerdict, path_verdict

QUESTION = (
    "Two prompts differ in a few words; the model refuses one and accepts the other. Where does the difference enter "
    "the residual stream, at which positions does it travel, where does it end up, and which heads move it?"
)


def record(writer: RunWriter, result: RefusalPath, given: Candidates) -> None:
    """Writes every sweep, its figures and the report into an open run."""
    seed = int(writer.run.seed or 0)
    verdict = path_verdict(result, seed)
    writer.metrics(verdict.numbers)
    chosen = result.chosen.pairs
    writer.table(
        "pairs", pd.DataFrame([{"clean": p.clean.text, "corrupt": p.corrupt.text, "id": p.clean.id} for p in chosen])
    )
    for name, sweep in result.sweeps.items():
        writer.artifact(f"patching_{name}", sweep)
        writer.table(f"patching_{name}", sweep.table(seed=seed))
    writer.table("recovery_by_role", result.by_role(seed))
    writer.table("heads", verdict.heads)
    writer.report(_report(writer, result, verdict, given.model, draw(writer, result, seed)))


def _shown() -> dict[str, str]:
    """The recoveries of both directions, each beside what random vectors do; the layers stand in the sentences."""
    named = {
        "recovery.best_before_last": "best place before the last token",
        "recovery.random_maximum": "best random vector",
        "recovery.top_head": "best head at the last token",
        "recovery.top_head_random": "best random vector at a head",
    }
    return {f"{way}.{key}": f"{way}: {name}" for way in MODES for key, name in named.items()}


def _report(
    writer: RunWriter,
    result: RefusalPath,
    verdict: PathVerdict,
    model: LanguageModel,
    drawn: dict[str, tuple[str, ...]],
) -> Report:
    sweep = result.sweeps["denoising"]
    tokens = result.chosen.first_token.tokens
    return Report(
        title=f"Where refusal travels in {loaded(model).checkpoint.name}",
        question=QUESTION,
        verdict=" ".join(verdict.sentences),
        numbers={name: verdict.numbers[key] for key, name in _shown().items()},
        sections=(
            Section(
                "Where it enters, travels and ends up",
                "Recovery is the mean of patched - start over the mean of target - start in the metric: 0 changes "
                f"nothing, 1 gives the other run's behaviour. It is over the {int(sweep.has_gap.sum())} of "
                f"{len(sweep.pairs)} pairs whose runs differ by at least {MIN_SHARE:g} of what the median pair's do. "
                "Columns are tokens of the first pair; other pairs are aligned by role. The control "
                "adds a random vector as long as the difference of the two runs: what it recovers, any push would.",
                drawn["where"],
            ),
            Section(
                "Which heads move it",
                "The same at the output `z` of every head, at the last token only: what a head wrote to where the "
                "answer is decided. The table has the five largest of each mode.",
                drawn["heads"],
                table=verdict.heads,
            ),
            Section(
                "Attribution patching on the same grid",
                f"The first-order estimate correlates with exact patching at {result.correlation():.3f}. It costs two "
                "forward passes and one backward, and fails where softmaxes saturate.",
            ),
        ),
        how=(
            f"{result.chosen.note}; {len(result.chosen.pairs)} were patched. Metric: {sweep.metric} with first tokens "
            f"{list(tokens.texts)} ({tokens.origin}). Site {sweep.site}, engine: {sweep.engine}; heads: "
            f"{result.sweeps['heads.denoising'].engine}. Intervals: bootstrap over families. p: their sign flips, "
            "largest mean effect over the grid (with few pairs it can't fall below 2^(1-n)). The best sites are chosen "
            "and reported on the same pairs: their p is corrected for that, their interval is not."
        ),
        model=loaded(model).checkpoint.name,
    )
