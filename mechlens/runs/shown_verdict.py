"""How a verdict shows itself: its one sentence first, then the numbers that decided."""

from typing import Any

from mechlens.methods.shown import first, html_with, lines


class ShownVerdict:
    """For a class with a `headline` and the numbers that decided in `deciding`; a notebook shows these as a table."""

    def __repr__(self) -> str:
        own: Any = self
        return lines(str(own.headline), first(own.deciding))

    def _repr_html_(self) -> str:
        import pandas as pd

        own: Any = self
        rows = [{"number": name, **estimate.row()} for name, estimate in own.deciding.items()]
        return html_with(str(own.headline), pd.DataFrame(rows, columns=["number", "value", "low", "high", "n"]))
