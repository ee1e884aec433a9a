"""Vectors that lm-eval's `steered` model adds: a dict from hook points, modules by name, to what is done there."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mechlens.errors import UserError, quoted
from mechlens.methods.directions.direction import Direction
from mechlens.runs.vectors.foreign_vectors import by_level, load_tensors, plain_numbers

_BLOCK = re.compile(r"(?:\w+\.)*(0|[1-9]\d{0,5})")
"""A module in a list of modules, such as layers.12 or model.layers.12."""


def is_lm_eval(saved: object) -> bool:
    """Whether a file's content is a dict from hook points to vectors with an action."""
    return (
        isinstance(saved, Mapping)
        and bool(saved)
        and all(
            isinstance(name, str) and isinstance(done, Mapping) and "steering_vector" in done
            for name, done in saved.items()
        )
    )


def read_lm_eval(path: Path) -> tuple[Direction, ...]:
    """The directions of such a file by level, each as long as it is added: with coefficient and all.

    A hook point is a module, here one in a list of blocks, at whose output the vector is added: block N's is our level
    N + 1. At every token, so that where the vector was read isn't recorded; hence "last".
    """
    saved = load_tensors(path)
    if not is_lm_eval(saved):
        raise UserError(
            f"{path} is no file of lm-eval's steered model; give a dict from hook points to steering vectors"
        )
    return by_level({_block(path, name): _pushed(path, name, done) for name, done in saved.items()}, "lm-eval", path)


def _block(path: Path, name: str) -> int:
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise UserError(
            f"{path} steers at {quoted(name)}, which is no block in a list, such as layers.12; leave it out"
        )
    return int(match[1])


def _pushed(path: Path, name: str, done: Mapping[str, Any]) -> Tensor:
    if done.get("action") != "add" or done.get("bias") is not None or done.get("head_index") is not None:
        raise UserError(
            f"{path} does more at {name} than to add a vector to the residual stream (its action is "
            f"{quoted(done.get('action'))}); only such files can be read"
        )
    vector, times = done["steering_vector"], done.get("steering_coefficient", 1.0)
    if isinstance(times, bool) or not isinstance(times, int | float):
        raise UserError(f"{path} has the coefficient {quoted(times)} at {name}; a number is needed")
    numbers = plain_numbers(vector, path)
    return (numbers.reshape(-1) if numbers.ndim == 2 and len(numbers) == 1 else numbers) * float(times)
