"""What a training run tells while it goes on, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from automl_compress.progress import Progress

_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A step that was made. `loss` and its `parts` are this step's, `metric` the last validation's (None before)."""

    label: str
    step: int
    steps: int
    loss: float
    parts: Mapping[str, float]
    metric: float | None
    learning_rate: float
    images_per_second: float
    seconds_left: float
    rollbacks: int

    def facts(self) -> dict[str, str | int | float]:
        """What a progress line shows beside the count of steps and the time left."""
        found: dict[str, str | int | float] = {"loss": round(self.loss, 4)}
        found.update({name: round(value, 4) for name, value in self.parts.items()})
        if self.metric is not None:
            found["metric"] = round(self.metric, 4)
        found["images_per_second"] = round(self.images_per_second)
        if self.rollbacks:
            found["rollbacks"] = self.rollbacks
        return found


OnStep = Callable[[StepReport], None]


def shown_by(progress: Progress) -> OnStep:
    """What shows every step of trainings that follow each other, a stage for each, also where one is taken up in its
    middle."""
    label, last = "", 0

    def on_step(report: StepReport) -> None:
        nonlocal label, last
        begins = report.label != label or report.step <= last
        if begins:
            progress.stage(report.label, report.steps, done=report.step)
        label, last = report.label, report.step
        progress.advance(0 if begins else 1, **report.facts())

    return on_step


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Figures by step, of at most some hundred points: each the mean of `every` steps up to and including `steps`.

    metrics  (step, validation metric) of every validation
    """

    every: int
    steps: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()
    metrics: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """What a training run took and did.

    label       the stage's name
    images      samples trained on
    seconds     spent in training and validating, over all processes that took part one after the other
    rollbacks   times that a diverging training was taken back
    metric      the delivered weights' on validation data, None where nothing was validated
    delivered   'last', 'best' or 'average': which weights those are
    computed    device, precision and layout, in words
    micro_batch samples that were computed at a time
    notes       what a reader should know, a line each
    """

    label: str
    curves: Curves
    images: int
    seconds: float
    rollbacks: int = 0
    metric: float | None = None
    delivered: str = "last"
    computed: str = ""
    micro_batch: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss by tenth of the run."""
        values = self.curves.losses
        size = max(1, -(-len(values) // 10))
        return tuple(sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size)))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as a record or a report keeps them."""
        curves = self.curves
        return {
            "label": self.label,
            "steps": list(curves.steps),
            "losses": list(curves.losses),
            "learning_rates": list(curves.learning_rates),
            "metrics": [list(point) for point in curves.metrics],
            "images": self.images,
            "seconds": self.seconds,
            "rollbacks": self.rollbacks,
            "metric": self.metric,
            "delivered": self.delivered,
            "computed": self.computed,
            "micro_batch": self.micro_batch,
            "notes": list(self.notes),
        }


@dataclass
class Recorder:
    """Gathers curves. A run of any length has as many points."""

    total: int
    _rows: list[list[float]] = field(default_factory=list)  # step, loss, rate of finished points
    _open: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # steps, losses, rates of the unfinished one
    _metrics: list[list[float]] = field(default_factory=list)

    @property
    def every(self) -> int:
        return max(1, -(-self.total // _POINTS))

    def step(self, number: int, loss: float, rate: float) -> None:
        count, losses, rates = self._open
        self._open = [count + 1, losses + loss, rates + rate]
        if self._open[0] >= self.every or number == self.total:
            self._close(number)

    def metric(self, step: int, value: float) -> None:
        self._metrics.append([step, value])

    def curves(self, step: int) -> Curves:
        """Everything so far; `step` is the last one made."""
        if self._open[0]:
            self._close(step)
        columns = list(zip(*self._rows, strict=True)) or [(), (), ()]
        return Curves(
            every=self.every,
            steps=tuple(int(number) for number in columns[0]),
            losses=columns[1],
            learning_rates=columns[2],
            metrics=tuple((int(number), value) for number, value in self._metrics),
        )

    def state(self) -> list[Any]:
        return [list(self._rows), list(self._open), list(self._metrics)]

    def put_back(self, state: list[Any]) -> None:
        self._rows, self._open, self._metrics = (list(part) for part in state)

    def _close(self, number: int) -> None:
        count, losses, rates = self._open
        self._rows.append([number, losses / count, rates / count])
        self._open = [0.0, 0.0, 0.0]
