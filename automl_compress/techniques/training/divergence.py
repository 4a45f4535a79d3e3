"""Whether a training diverges: a loss or gradient that is no number, or a loss far above what it was."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_WINDOW = 50
_SETTLED = 10  # losses that a median is trusted from
_FACTOR = 10.0
_IN_A_ROW = 5
_LEAST = 0.05  # of the first losses: near zero, ten times as much is no explosion


class Watch:
    """Looks at each step's loss.

    Explosion: `_IN_A_ROW` losses in succession that are more than `_FACTOR` times above the median of the last
    `_WINDOW` ones before them.
    """

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=_WINDOW)
        self.first = 0.0
        self.high = 0

    @property
    def calm(self) -> bool:
        """Whether the last loss gave no cause for concern."""
        return self.high == 0

    def verdict(self, loss: float, gradient: float) -> str:
        """What is wrong, in words; empty while nothing is."""
        if not math.isfinite(loss):
            return f"the loss became {loss}"
        if not math.isfinite(gradient):
            return f"the gradient's norm became {gradient}"
        if len(self.window) >= _SETTLED and loss > self._limit():
            self.high += 1
            if self.high >= _IN_A_ROW:
                return f"the loss rose to {loss:.4g} from a median of {median(self.window):.4g}"
            return ""
        self.high = 0
        self.window.append(loss)
        if len(self.window) == _SETTLED and not self.first:
            self.first = median(self.window)
        return ""

    def restart(self) -> None:
        """The next steps are judged anew: after a rollback, or when the model itself was changed."""
        self.high = 0
        self.window.clear()

    def state(self) -> list[float]:
        return [float(self.high), self.first, *self.window]

    def put_back(self, state: list[float]) -> None:
        self.high, self.first = int(state[0]), state[1]
        self.window = deque(state[2:], maxlen=_WINDOW)

    def _limit(self) -> float:
        usual = median(self.window)
        spread = median(abs(loss - usual) for loss in self.window)
        return usual + (_FACTOR - 1) * max(abs(usual), spread, _LEAST * abs(self.first))
