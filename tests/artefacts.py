"""One small result of every kind that can be saved, in which everything is set."""

import torch

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import Direction, DirectionGrid
from mechlens.methods.guard.fitted import FittedGuard, GuardSettings, Place
from mechlens.methods.guard.rules import CosineScore, LinearScore, SubspaceScore
from mechlens.methods.statistics.calibration import Calibration
from mechlens.methods.steering.controllers.controller import Controller, Network
from mechlens.models.checkpoint import Checkpoint

CHECKPOINT = Checkpoint(name="tiny", path="tiny", step=3, fingerprint="ab" * 32)
SIZE = 16


def guard() -> FittedGuard:
    generator = torch.Generator().manual_seed(0)

    def vector() -> torch.Tensor:
        return torch.randn(SIZE, generator=generator, dtype=torch.float64)

    bases = torch.linalg.qr(torch.randn(2, SIZE + 1, 3, generator=generator, dtype=torch.float64)).Q
    places = (
        Place(1, "inst", LinearScore(vector(), 0.25), 0.9),
        Place(2, "post[0]", CosineScore(vector(), vector(), vector()), 0.8),
        Place(2, "last", SubspaceScore(bases, vector(), 3.0), 0.7),
    )
    settings = GuardSettings("lda", ("inst", "last"), "best", 0.05, 5, 0, "harmful", "harmless")
    return FittedGuard(
        settings, places, Calibration(0.5, 2.0, -1.0, 30, 30), "resid", CHECKPOINT, "cd" * 32, ("a", "b"), ("e" * 64,)
    )


def grid() -> DirectionGrid:
    return DirectionGrid(
        torch.arange(2.0 * SIZE).reshape(2, 1, SIZE), (0, 1), ("inst",), "resid", "mean difference",
        ("harmful", "harmless"), CHECKPOINT, "cd" * 32, ("p1", "p2"), "inst",
    )  # fmt: skip


def activations() -> Activations:
    return Activations(
        torch.randn(2, 1, 1, SIZE), (1,), ("inst",), ("p1", "p2"), ("harmful", "harmless"), ("f", "g"), "resid",
        CHECKPOINT, "cd" * 32,
    )  # fmt: skip


def direction() -> Direction:
    one = Direction(
        torch.arange(1.0, SIZE + 1), 1, "inst", "resid", "mean difference", ("harmful", "harmless"), CHECKPOINT,
        "cd" * 32, ("p1", "p2"), 3.5,
    )  # fmt: skip
    return one + 0.5 * one


def controller() -> Controller:
    generator = torch.Generator().manual_seed(0)
    inner, outer = torch.randn(4, SIZE, generator=generator), torch.randn(3, 4, generator=generator)
    network = Network(torch.zeros(SIZE), torch.ones(SIZE), inner, torch.zeros(4), outer, torch.zeros(3))
    return Controller(
        network, ((1, "last"),), (1, 2), torch.eye(2, SIZE), torch.ones(2), "sigmoid", "budget", "resid_pre", "both",
        "taught", CHECKPOINT, "cd" * 32, ("p1", "p2"), None, {"strength": 0.1},
    )  # fmt: skip
