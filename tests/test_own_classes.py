"""A run on classes of somebody's own says what harmful and harmless stand for, and only there."""

import pytest

from mechlens.runs.own_classes import own_classes


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"harmful": "harmful+looks-harmless", "harmless": "all-harmless"}, ""),
        ({"positive": "rude.csv", "negative": "polite.csv"}, ""),
        ({"harmful": "/data/rude.csv", "harmless": "harmless"},
         'Here "harmful" stands for rude.csv and "harmless" for harmless.'),
        ({"harmful": "a/one.txt+b/two.txt", "harmless": "c++.txt"},
         'Here "harmful" stands for one.txt + two.txt and "harmless" for c++.txt.'),
        ({"harmful": "flattering", "harmless": "plain", "data": "asked.csv", "label_column": "tone"},
         'In asked.csv "harmful" stands for tone = flattering and "harmless" for tone = plain.'),
        ({"harmful": "harmful", "harmless": "harmless", "data": "asked.csv", "label_column": "label"}, ""),
    ],
)  # fmt: skip
def test_what_the_classes_stand_for_is_said_where_they_are_somebodys_own(config: dict[str, str], said: str) -> None:
    assert own_classes(config) == said
