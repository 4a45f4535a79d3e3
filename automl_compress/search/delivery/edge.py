"""Where a model is just good enough: a bracket around a budget, narrowed by what trials and recovered models tell.

Losses of one-shot trials are known at many budgets, those after recovery at the few that were looked at. What recovery
leaves of a loss varies less between budgets than the loss itself, so the ratio of the two, as seen so far, says where
to look next; the bracket keeps that honest. With a ratio that is right this is a secant search, with one that is wrong,
which a look at too little shows that left most of the bracket, a bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from automl_compress.search.evaluation.candidate import Candidate

_CLOSE = 1.03
_MARGIN = 0.15
_REMEMBERED = 5
_WORST = 1.5
_ROUNDING = 1e-9
# What is left of a one-shot loss after recovery, until a recovered model tells.
LEFT_AFTER_RECOVERY = 0.3


@dataclass
class Edge:
    """The least budget, as a share of the original's figure, with a good enough model: bracketed by what is known.

    low, high     too little as far as is known; enough, or the most that there is
    allowed       loss of metric that will do
    lost          (share, loss) of one-shot trials
    left_over     what was left of the one-shot loss in models that were recovered, the latest last
    found         (share, loss, model) of all that were recovered and may be delivered
    highest_seen  the largest share at which a model was looked for
    """

    low: float
    high: float
    allowed: float
    lost: Sequence[tuple[float, float]] = ()
    left_over: list[float] = field(default_factory=lambda: [LEFT_AFTER_RECOVERY])
    found: list[tuple[float, float, Candidate]] = field(default_factory=list)
    highest_seen: float = 0.0
    _looked: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self._most = self.high

    @property
    def good(self) -> list[Candidate]:
        """The models that are good enough, cheapest first, the better one among equals."""
        fine = [entry for entry in self.found if self._enough(entry[1])]
        return [candidate for _, _, candidate in sorted(fine, key=lambda entry: entry[:2])]

    def next(self) -> float | None:
        """The share to look at next; None when the bracket is close enough."""
        if self.high / self.low <= _CLOSE:
            return None if self.good or self.highest_seen >= self.high else self.high
        before, self._looked = self._looked, (self.low, self.high)
        if before is not None and before[0] < self.low and self.high / self.low > math.sqrt(before[1] / before[0]):
            return math.sqrt(self.low * self.high)
        ratio = median(self.left_over)
        enough = [share for share, loss in self.lost if self._enough(ratio * loss)]
        aim = min(enough, default=self.high)
        if aim >= self.high:
            if not self.good and self.highest_seen < self.high:
                return self.high
            aim = math.sqrt(self.low * self.high)
        # Away from both ends by a part of the bracket, so that every look narrows it.
        margin: float = (self.high / self.low) ** _MARGIN
        return min(max(aim, self.low * margin), self.high / margin)

    def add(self, candidate: Candidate, share: float, loss: float, *, at: float) -> None:
        """A recovered model that costs `share`, found by looking `at` a share; the same model counts once."""
        self.found = [entry for entry in self.found if entry[2].plan.key != candidate.plan.key]
        self.found.append((share, loss, candidate))
        self.highest_seen = max(self.highest_seen, at)
        before = min((lost for cost, lost in self.lost if cost <= share), default=0.0)
        if before > 0:
            self.left_over = [*self.left_over, min(_WORST, max(0.0, loss) / before)][-_REMEMBERED:]
        if self._enough(loss):
            self.high = min(self.high, share)
            self.low = min(self.low, self.high)
        elif at < self.high:
            self.low = max(self.low, at)

    def forget(self, candidate: Candidate) -> None:
        """A model can't be delivered after all: what was known by it alone isn't known any more."""
        self.found = [entry for entry in self.found if entry[2].plan.key != candidate.plan.key]
        self.high = min((share for share, loss, _ in self.found if self._enough(loss)), default=self._most)

    def nothing_at(self, share: float) -> None:
        """No model was found that takes at most this share."""
        self.highest_seen = max(self.highest_seen, share)
        self.low = max(self.low, min(share, self.high))

    def _enough(self, loss: float) -> bool:
        return loss <= self.allowed + _ROUNDING
