"""Evaluation during training: the best weights are kept, and training ends when they stay the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .data import DataError
from .detector import Detector
from .ranges import check, optional, whole

MEASURE = "AP"


@dataclass
class Validation:
    """Called after a step; its state is part of a checkpoint.

    `evaluate` returns the figures, MEASURE among them, the same on every rank.
    """

    evaluate: Callable[[Detector], dict[str, float]]
    every: int
    patience: int | None = None  # evaluations in a row that may bring nothing better
    data: dict[str, Any] = field(default_factory=dict)  # the fingerprint of what it evaluates on
    best: float | None = None
    best_step: int = 0
    last_step: int = 0
    without_gain: int = 0
    figures: dict[str, float] = field(default_factory=dict)  # of the last evaluation

    def __post_init__(self) -> None:
        check("every", self.every, whole(1))
        check("patience", self.patience, optional(whole(1)))

    def due(self, step: int, steps: int) -> bool:
        """Every so many steps and after the last one, but not twice after a run was resumed."""
        return step > self.last_step and (step % self.every == 0 or step == steps)

    def __call__(self, step: int, model: Detector) -> bool:
        """Whether the model is the best so far."""
        self.figures, self.last_step = self.evaluate(model.eval()), step
        value = self.figures[MEASURE]
        if self.best is not None and value <= self.best:
            self.without_gain += 1
            return False
        self.best, self.best_step, self.without_gain = value, step, 0
        return True

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.without_gain >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        """Goes on from what state_dict returned; None where the run was not validated so far."""
        if state is None:
            return
        if state["data"] != self.data:
            raise DataError(
                "a run must go on with the images that it was validated on, or without --val-split: "
                "an AP on others cannot be compared with its best"
            )
        for name in STATE:
            setattr(self, name, state[name])


STATE = ("data", "best", "best_step", "last_step", "without_gain")
