"""Cosines as figures and sentences say them: corrected for noise, one can pass 1, and then it may be no angle."""

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate

WIDEST = 1.0
"""Half of all that a cosine can be: an interval that takes more of it says nothing of the angle."""
NO_ANGLE = "no angle: too noisy"
POSSIBLE = (-1.0, 1.0)


def is_angle(value: float, low: float, high: float) -> bool:
    """Whether the interval reaches what a cosine can be, and takes no more than half of it."""
    return value == value and low <= 1 and high >= -1 and min(high, 1) - max(low, -1) <= WIDEST


def angles(frame: pd.DataFrame, value: str, low: str, high: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows that are angles, each within -1 and 1, and the rows that are none.

    A column `curve` knows all curves in both, so that each keeps its colour where another can't be drawn.
    """
    columns = [value, low, high]
    if "curve" in frame:
        frame = frame.assign(curve=pd.Categorical(frame["curve"], frame["curve"].unique()))
    drawn = [is_angle(*row) for row in frame[columns].itertuples(index=False)]
    within = frame[drawn].copy()
    within[columns] = within[columns].clip(*POSSIBLE)
    return within, frame[[not one for one in drawn]]


def angle_text(cosine: Estimate) -> str:
    """The cosine with its interval, or that it is none."""
    return str(cosine) if is_angle(cosine.value, cosine.low, cosine.high) or not cosine.measurable else NO_ANGLE
