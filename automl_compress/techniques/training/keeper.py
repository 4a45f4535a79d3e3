"""What validation says: which weights are the best so far, whether to go on, and what is delivered in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from automl_compress.errors import TaskError
from automl_compress.techniques.training.averaging import Average
from automl_compress.techniques.training.settings import Training
from automl_compress.techniques.training.state import Tensors, kept, live, write

Validate = Callable[[nn.Module], float]


class Keeper:
    """Validates a student and its average from time to time, and remembers the better one's weights.

    `metric` is the last validation's; of two equal ones the later weights count, and plain ones before their average.
    """

    def __init__(
        self, student: nn.Module, average: Average | None, validate: Validate | None, training: Training
    ) -> None:
        self._student, self._average, self._validate, self._training = student, average, validate, training
        self.metric: float | None = None
        self.best: Tensors = {}
        self._last: list[float] = []  # the last validation's metrics: of the weights, and of their average
        self._best_metric, self._label, self._waited = -math.inf, "last", 0

    def look(self, *, last: bool) -> None:
        """Validate now."""
        assert self._validate is not None
        weights = live(self._student)
        found = [("last" if last else "best", self._measured(), weights)]
        if self._average is not None:
            now = {name: kept(value) for name, value in weights.items()}
            write(weights, self._average.state)
            found.append(("average", self._measured(), self._average.state))
            write(weights, now)
        label, value, state = max(found, key=lambda entry: entry[1])  # the first of equal ones
        self._waited = 0 if value > self._best_metric else self._waited + 1
        if value >= self._best_metric:
            self._best_metric, self._label = value, label
            self.best = {name: kept(tensor) for name, tensor in state.items()}
        self.metric, self._last = value, [entry[1] for entry in found]

    @property
    def patience_is_over(self) -> bool:
        return self._training.patience is not None and self._waited >= self._training.patience

    def deliver(self) -> tuple[str, float | None]:
        """Leave in the student what was asked for; says what that is, and its metric where it was validated."""
        wanted = self._training.deliver
        if wanted == "average" or (wanted == "best" and self._validate is None and self._average is not None):
            assert self._average is not None
            write(live(self._student), self._average.state)
            return "average", self._last[-1] if self._last else None
        if wanted == "best" and self.best:
            write(live(self._student), self.best)
            return self._label, self._best_metric
        return "last", self._last[0] if self._last else None

    def state(self) -> list[Any]:
        return [self.metric, self._last, self._best_metric, self._label, self._waited]

    def put_back(self, state: list[Any], best: Tensors) -> None:
        self.metric, self._last, self._best_metric, self._label, self._waited = state
        self.best = best

    def _measured(self) -> float:
        assert self._validate is not None
        self._student.eval()
        with torch.no_grad():
            value = float(self._validate(self._student))
        self._student.train()
        if math.isnan(value):
            raise TaskError("the metric on validation data is NaN: check the metric, the data and the model's outputs")
        return value
