"""What the papers report, beside this run's numbers."""

import pandas as pd

from mechlens.studies.sinks.study import SinkResult

BESIDE = (
    "Published numbers are of larger models and other texts: what is there or isn't can be compared, sizes can't. "
    "Qiu et al. 2025 are 15B mixtures of experts, from notes on the paper; Sun et al. 2024 Llama-2-7B."
)


def beside_table(result: SinkResult) -> pd.DataFrame:
    """A row a published number, with ours on the first kind of text."""
    first = next(iter(result.maps))
    own = {str(row["measure"]): row for row in result.measures[result.measures["domain"] == first].to_dict("records")}
    massive = result.tables()["massive"].iloc[0]
    rows = [
        ("attention to the first token, share of all", "0.467; 0.048 with gated attention (Qiu et al.)",
         f"{own['first']['value']:.3f}"),
        ("largest activation", "1053; 94 with gated attention (Qiu et al.)", f"{own['largest']['value']:.0f}"),
        ("massive dimensions, with their values", "1415 and 2533: -459 and 768 at the first token (Sun et al.)",
         f"{massive['dimension']}: {massive['value']:.0f}"),
        ("heads that switch", "Llama-2-7B 16.25: dormant on Wikipedia, active on GitHub (Guo et al.)",
         f"{result.verdict.word}: {_most(result)}"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["quantity", "papers", f"here ({first})"])


def _most(result: SinkResult) -> str:
    layer, head = result.contrast.strongest(1)[0]
    dormant, active = result.verdict.between
    return f"{layer}.{head}, dormant on {dormant}, active on {active}"
