"""What a run's words harmful and harmless stand for, where somebody contrasts classes of their own."""

from collections.abc import Mapping

from mechlens.files import short_name
from mechlens.prompts.builtin import builtin_names

CLASSES = ("harmful", "harmless")


def own_classes(config: Mapping[str, object]) -> str:
    """One sentence from a recorded configuration; empty where the prompts are built in or the study has no classes.

    >>> from mechlens.runs.own_classes import own_classes
    >>> own_classes({"harmful": "rude.csv", "harmless": "polite.csv"})
    'Here "harmful" stands for rude.csv and "harmless" for polite.csv.'
    >>> own_classes({"harmful": "harmful", "harmless": "harmless"})
    ''
    """
    given = [config.get(name) for name in CLASSES]
    data, column = config.get("data"), config.get("label_column")
    if not all(isinstance(one, str) for one in given):
        return ""
    sources = [str(one) for one in given]
    if data is not None:
        named = [f"{column} = {source}" for source in sources]
        return f"In {short_name(str(data))} {_stand_for(named)}." if sources != list(CLASSES) else ""
    joined = [source.split("+") for source in sources]
    parts = [side if all(side) else [source] for side, source in zip(joined, sources, strict=True)]
    if all(part in builtin_names() for side in parts for part in side):
        return ""
    return f"Here {_stand_for([' + '.join(map(short_name, side)) for side in parts])}."


def _stand_for(named: list[str]) -> str:
    return f'"harmful" stands for {named[0]} and "harmless" for {named[1]}'
