"""Which losses a student is trained for, by name: `soft`, `soft+dist`, `dkd+task=0.5`.

Names are joined by `+`. A loss without a number gets its weight automatically, as `distillation.balance` says; with
`=NUMBER` it has that weight. The task's own loss is always there, with 1 - soft_share, unless it is given a weight.
`mixed` is no loss but what they are taken on: half of each batch, or NUMBER of it, becomes mixtures (`mixing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from automl_compress.errors import InputError, did_you_mean

TASK = "task"
SOFT = "soft"
MIXED = "mixed"
_HALF = 0.5
# Losses on the model's outputs, and what they are.
LABEL_LOSSES = {
    SOFT: "soft labels at a temperature (squared error where outputs are no class scores)",
    "logit": "squared error of the logits",
    "dkd": "decoupled: target class and other classes apart",
    "dist": "relations: correlation of rows and of classes",
}
# Losses on what layers read.
FEATURE_LOSSES = {
    "features": "what layers read, channel by channel",
    "attention": "where what layers read is large",
}
NAMES = {**LABEL_LOSSES, **FEATURE_LOSSES, TASK: "the task's own loss (cross-entropy) alone"}
# What a search's candidates learn. Where there are no features to compare they do without.
DEFAULT = "soft+features"


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Which losses are added up, and how they are weighed.

    weights      loss -> its weight; None: automatic
    temperature  softens teacher and student alike
    soft_share   weight of what is learned from the teacher's outputs; the rest goes to the task's own loss
    feature_share    how much larger or smaller an automatic loss on features is made than one on outputs
    mixed        share of each batch that becomes mixtures, for classification of images and signals; elsewhere none
    target, others   weights of the two parts of the decoupled loss (alpha and beta of Zhao et al.)

    Raises InputError for a name that isn't known and for a number out of range.
    """

    weights: Mapping[str, float | None] = field(default_factory=lambda: {SOFT: None})
    temperature: float = 6.0
    soft_share: float = 0.9
    feature_share: float = 2.0
    mixed: float = 0.0
    target: float = 1.0
    others: float = 8.0

    def __post_init__(self) -> None:
        if not self.weights:
            raise InputError(f"distillation needs at least one loss of: {', '.join(NAMES)}")
        for name, weight in self.weights.items():
            if name not in NAMES:
                known = (*NAMES, MIXED)
                raise InputError(
                    f"unknown distillation loss {name!r}; there are: {', '.join(known)}{did_you_mean(name, known)}"
                )
            if weight is not None and not 0 <= weight < math.inf:
                raise InputError(f"the weight of distillation loss {name} must be 0 or more, found {weight:g}")
        if all(weight == 0 for weight in self.weights.values()):
            raise InputError(f"distillation {str(self)!r}: all weights are 0; give one loss a weight above 0")
        if not self.temperature > 0:
            raise InputError(f"the temperature of distillation must be above 0, found {self.temperature:g}")
        if not 0 <= self.soft_share <= 1:
            raise InputError(f"the teacher's share of the loss must be from 0 to 1, found {self.soft_share:g}")
        if not 0 <= self.mixed < 1:
            raise InputError(f"the share of a batch that is mixed must be at least 0 and below 1, found {self.mixed:g}")
        if self.mixed and not self.labels:
            raise InputError("mixed inputs have no labels but the teacher's: add a loss on its outputs, such as soft")
        if not 0 <= self.feature_share < math.inf:
            raise InputError(f"the features' share of the loss must be 0 or more, found {self.feature_share:g}")

    @property
    def labels(self) -> tuple[str, ...]:
        """Those on the teacher's outputs that count."""
        return tuple(name for name, weight in self.weights.items() if name in LABEL_LOSSES and weight != 0)

    @property
    def features(self) -> tuple[str, ...]:
        """Those on what layers read that count."""
        return tuple(name for name, weight in self.weights.items() if name in FEATURE_LOSSES and weight != 0)

    def without_features(self) -> Losses:
        """Those on outputs, and the task's own, alone."""
        return replace(self, weights={n: w for n, w in self.weights.items() if n not in FEATURE_LOSSES})

    @property
    def needs_teacher(self) -> bool:
        return any(name != TASK and weight != 0 for name, weight in self.weights.items())

    @property
    def task_weight(self) -> float:
        """Of the task's own loss."""
        given = self.weights.get(TASK)
        if given is not None:
            return given
        return 1 - self.soft_share if self.needs_teacher else 1.0

    def __str__(self) -> str:
        given = {**self.weights, **({MIXED: None if self.mixed == _HALF else self.mixed} if self.mixed else {})}
        return "+".join(name if weight is None else f"{name}={weight:g}" for name, weight in given.items())


def parse_losses(text: str) -> Losses:
    """`soft`, `soft+dist`, `soft=0.7+task=0.3`. Raises InputError."""
    weights: dict[str, float | None] = {}
    for part in text.split("+"):
        name, equals, number = (word.strip() for word in part.partition("="))
        if name in weights:
            raise InputError(f"distillation {text!r}: {name} is there twice")
        try:
            weights[name] = float(number) if equals else None
        except ValueError as error:
            raise InputError(
                f"distillation {text!r}: {name} must have a number as its weight, found {number!r}"
            ) from error
    share = weights.pop(MIXED, 0.0)
    return Losses(weights=weights, mixed=_HALF if share is None else share)
