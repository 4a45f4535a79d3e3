"""A time limit, planned over the rungs: what things take here, and what of the search then fits.

What trials, epochs and measuring take is measured while the search goes on. From that and from what is left, `allot`
decides how much is tried, how many models are distilled, and for how long; the first of these settings that fits is
taken, from the whole schedule down to repair without training:

1. everything as asked
2. baselines are only repaired
3. two models enter the ladder, then one
4. fewer epochs
5. no baselines, then no epochs

What was planned without baselines still gets those for which time is left in the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NoReturn

from automl_compress.errors import InputError
from automl_compress.progress import format_seconds

# Shares of the epochs that are tried. A grid, so that a resumed run is likely to plan as before and to find its models.
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
REDUCTION = 3
# A rung's training is worth its overhead from about here, in epochs.
_SHORTEST = 0.25
_MOST_ENTRANTS = 8
_EXPLORE_SHARE = 0.25
# Training with rounding may follow the last rung, with a third of its epochs.
_WITH_ROUNDING = 4 / 3
_CAUTION = 1.1


@dataclass(frozen=True, kw_only=True)
class Rung:
    """So many models are trained for so many epochs; of the last rung there is one model."""

    models: int
    epochs: float


def rungs(epochs: float, entrants: int) -> tuple[Rung, ...]:
    """Successive halving: of `entrants` models half go on at every rung, with three times the epochs, up to `epochs`.

    Without epochs there is nothing to choose by, and the first one is finished.
    """
    if epochs == 0:
        return (Rung(models=1, epochs=0.0),)
    found = [Rung(models=1, epochs=epochs)]
    while found[-1].models * 2 <= entrants:
        found.append(Rung(models=found[-1].models * 2, epochs=found[-1].epochs / REDUCTION))
    return tuple(reversed(found))


def most_entrants(epochs: float) -> int:
    """How many models enter the ladder: more, the more epochs there are to divide. One without training."""
    count = 1
    while count < _MOST_ENTRANTS and epochs / REDUCTION ** count.bit_length() >= _SHORTEST:
        count *= 2
    return count


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds for a one-shot trial; a training epoch; a model of a rung besides its training (repair, calibration,
    export, metric); measuring a model beside the original."""

    trial: float
    epoch: float
    finishing: float
    measuring: float

    def ladder(self, steps: Sequence[Rung]) -> float:
        """For all rungs, the measuring of the entrants before them included."""
        last = steps[-1]
        training = sum(rung.models * rung.epochs for rung in steps) + (_WITH_ROUNDING - 1) * last.epochs
        models = sum(rung.models for rung in steps)
        return _CAUTION * (
            training * self.epoch + models * self.finishing + 2 * max(rung.models for rung in steps) * self.measuring
        )

    def baselines(self, count: int, epochs: float) -> float:
        return _CAUTION * count * (_WITH_ROUNDING * epochs * self.epoch + self.finishing)

    def delivery(self, models: int) -> float:
        """Verifying, and the metric on test data, with so many models measured beside the original."""
        return _CAUTION * (2 * self.finishing + (models + 2) * self.measuring)


class TooShort(Exception):
    """So many seconds are `missing`; the text says for what."""

    def __init__(self, text: str, missing: float) -> None:
        super().__init__(text)
        self.missing = missing


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """What is done in the time that is left. `exploring`: seconds for one-shot trials, None without a limit.
    `baselines`: models that time is set aside for, None without a limit."""

    exploring: float | None
    rungs: tuple[Rung, ...]
    baseline_epochs: float
    baselines: int | None = None
    cut: tuple[str, ...] = ()

    @property
    def epochs(self) -> float:
        """Of the last rung."""
        return self.rungs[-1].epochs


def unlimited(epochs: float) -> Allotment:
    """Everything as asked."""
    return Allotment(exploring=None, rungs=rungs(epochs, most_entrants(epochs)), baseline_epochs=epochs)


def least(epochs: float) -> Allotment:
    """One model is finished without training, and no more trials: what is done when the time is nearly over."""
    cut = _cut(epochs, 0.0, 1, most_entrants(epochs), baselines=False)
    return Allotment(exploring=0.0, rungs=rungs(0.0, 1), baseline_epochs=0.0, baselines=0, cut=cut)


def allot(left: float, costs: Costs, *, epochs: float, baselines: int, trials: int, looks: int = 1) -> Allotment:
    """Divide `left` seconds.

    epochs     of the whole schedule
    baselines  how many models are finished only to compare with
    trials     one-shot trials that are still wanted
    looks      how many ladders are climbed, one after the other

    Raises TooShort where not even an untrained model could be finished.
    """
    whole = most_entrants(epochs)
    fewer = [count for count in (2, 1) if count < whole]
    ways = [(1.0, whole, True, baselines), (1.0, whole, False, baselines)]
    ways += [(1.0, count, False, baselines) for count in fewer]
    ways += [(share, count, False, baselines) for share in SHARES[1:] for count in fewer or [1]]
    ways += [(share, 1, False, 0) for share in (SHARES[-1], 0.0)]
    wanted = trials * costs.trial
    for share, entrants, whole_baselines, others in ways:
        steps = rungs(share * epochs, entrants)
        beside = epochs if whole_baselines else 0.0
        ends = looks * costs.ladder(steps) + costs.baselines(others, beside) + costs.delivery(1 + others)
        trying = min(wanted, max(_EXPLORE_SHARE * left, 4 * costs.trial) if share else costs.trial)
        if ends + trying <= left:
            return Allotment(
                exploring=left - ends,
                rungs=steps,
                baseline_epochs=beside,
                baselines=others,
                cut=_cut(epochs, share, entrants, whole, (whole_baselines and baselines > 0) or not baselines),
            )
    raise TooShort(
        f"{format_seconds(left)} are left, and a trial takes {costs.trial:.1f} s, finishing a model "
        f"{costs.finishing:.1f} s, measuring one {costs.measuring:.1f} s",
        ends + trying - left,
    )


def _cut(epochs: float, share: float, entrants: int, whole: int, baselines: bool) -> tuple[str, ...]:
    """What is left out, in words."""
    found = []
    if epochs > 0 and share < 1:
        found.append(f"{share * epochs:.2g} instead of {epochs:g} epochs of distillation")
    if entrants < whole and share:
        found.append(f"{entrants} instead of {whole} models enter the ladder")
    if epochs > 0 and not baselines:
        found.append("baselines are repaired and not distilled")
    return tuple(found)


@dataclass
class Clock:
    """The time limit of a run, and what things took so far. `deadline`: on `now`'s scale; None: no limit."""

    deadline: float | None = None
    now: Callable[[], float] = time.monotonic
    begun: float = 0.0
    cuts: list[str] = field(default_factory=list)
    _seen: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begun = self.now()

    @property
    def left(self) -> float | None:
        """Seconds, None without a limit."""
        return None if self.deadline is None else max(0.0, self.deadline - self.now())

    @contextmanager
    def timing(self, what: str, *, units: float = 1.0) -> Iterator[None]:
        """Remember what a unit of something takes: a field of `Costs`."""
        begun = self.now()
        yield
        self.record(what, (self.now() - begun) / units)

    def record(self, what: str, seconds: float) -> None:
        self._seen.setdefault(what, []).append(seconds)

    def typical(self, what: str) -> float | None:
        """The median of the latest ten; None where there is none."""
        return median(self._seen[what][-10:]) if self._seen.get(what) else None

    def part(self, looks: int) -> Clock:
        """For the first of so many equal parts of what is left; what is seen counts for all of them."""
        left = self.left
        return self if left is None else replace(self, deadline=self.now() + left / looks, _seen=self._seen)

    def require(self, seconds: float, what: str) -> None:
        """Raise InputError where less is left than something is going to take at least."""
        left = self.left
        if left is not None and left < seconds:
            self.refuse(f"{what} takes {format_seconds(seconds)}, and {format_seconds(left)} are left", seconds - left)

    def refuse(self, reason: str, missing: float) -> NoReturn:
        """Say that the limit is too short, and how long would do."""
        total = (self.deadline or self.begun) - self.begun
        raise InputError(
            f"--timeout {format_seconds(total)} is too short: {reason}; give {format_seconds(1.2 * (total + missing))} "
            "or more (what was measured so far is kept)"
        )
