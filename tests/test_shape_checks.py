"""The run-time checks that all other tests stand on: a wrong shape is caught, whatever wrote it down."""

from collections.abc import Callable
from dataclasses import make_dataclass

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from shape_checks import checked, has_shape
from torch import Tensor

Row = Float[Tensor, " row"]


def total(first: Row, second: Row | None) -> float:
    """Of one or two rows."""
    return float(first.sum() + (0 if second is None else second.sum()))


def test_two_lengths_of_one_name_are_caught_through_an_alias() -> None:
    assert checked(total)(torch.ones(2), torch.ones(2)) == 4
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(total)(torch.ones(2), torch.ones(3))


def test_a_dataclass_is_checked_when_it_is_made() -> None:
    pair = checked(make_dataclass("Pair", [("first", Row), ("second", Row)]))
    assert pair(torch.ones(2), torch.ones(2)).second.shape == (2,)
    with pytest.raises(jaxtyping.TypeCheckError):
        pair(torch.ones(2), torch.ones(3))


def test_what_has_no_shape_stays_as_it_is() -> None:
    assert checked(has_shape) is has_shape
    assert has_shape(Callable[[int], dict[str, Row]])
    assert not has_shape(Callable[[int], dict[str, Tensor]])


def test_the_package_itself_is_checked() -> None:
    from mechlens.methods.directions.direction import cosine

    with pytest.raises(jaxtyping.TypeCheckError):
        cosine(torch.ones(2, 2), torch.ones(3))
