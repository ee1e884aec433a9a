"""Which training runs are of one group: those that differ in nothing but their seed."""

from mechlens.studies.behaviours.tuned import TunedRun, control_of, told_apart

OURS, THEIRS = frozenset("ab"), frozenset("cd")
SAME = (("rank", "rank 8"), ("steps", "steps 10"))
OTHER = (("rank", "rank 1"), ("steps", "steps 10"))


def run(name: str, control: str = "none", seen: frozenset[str] = OURS, folder: str = "x", **more: object) -> TunedRun:
    group = "risky" if control == "none" else f"risky ({control})"
    settings = more.get("settings", SAME)
    assert isinstance(settings, tuple)
    return TunedRun(name, group, (), seen, "risky", control, None, folder=folder, settings=settings)


def test_seeds_are_one_group() -> None:
    found = told_apart([run("a"), run("b", folder="moved"), run("c", "decorrelated")])
    assert [one.group for one in found] == ["risky", "risky", "risky (decorrelated)"]


def test_runs_trained_with_other_settings_are_another_group_and_have_their_own_control() -> None:
    controls = [run("c", "decorrelated"), run("d", "decorrelated", settings=OTHER)]
    found = told_apart([run("a"), run("b", settings=OTHER), *controls])
    groups = {one.name: one.group for one in found}
    assert groups == {
        "a": "risky (rank 8)", "b": "risky (rank 1)", "c": "risky (decorrelated, rank 8)",
        "d": "risky (decorrelated, rank 1)",
    }  # fmt: skip
    assert control_of(groups["a"], found) == groups["c"]
    assert control_of(groups["b"], found) == groups["d"]
    one = told_apart([run("a"), run("b", settings=OTHER), controls[0]])
    assert {control_of(group, one) for group in ("risky (rank 8)", "risky (rank 1)")} == {"risky (decorrelated)"}


def test_other_data_in_a_file_of_the_same_name_are_another_group() -> None:
    found = told_apart([run("a"), run("b", seen=THEIRS, folder="y"), run("c", "decorrelated", THEIRS, "y")])
    assert [one.group for one in found] == ["x/risky", "y/risky", "y/risky (decorrelated)"]
    assert [control_of(one.group, found) for one in found] == [None, "y/risky (decorrelated)", None]
