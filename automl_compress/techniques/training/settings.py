"""How a model is trained, and on what: values that were checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from automl_compress.errors import InputError, did_you_mean

Optimizer = Literal["muon", "sgd", "adamw"]
Shape = Literal["one-cycle", "cosine", "constant"]
Deliver = Literal["best", "last", "average"]
Precision = Literal["auto", "float32", "bfloat16"]
# The peak of AdamW's rate where none is asked for: its steps don't shrink with the gradients.
ADAMW_RATE = 1e-3
WARM_UP = {"one-cycle": 0.3, "cosine": 0.0, "constant": 0.0}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained. Two runs with equal settings, seed, data and threads give the same model.

    epochs            passes over the training data; a fraction stops within a pass
    optimizer         'muon' (see `training.muon`: weights of convolutions and linear layers; the rest by SGD), 'sgd'
                      (Nesterov) or 'adamw'
    learning_rate     the peak of the schedule; the default suits Muon and SGD, AdamW wants a twentieth
    schedule          'one-cycle' (Smith 2018: up, then down to almost nothing, momentum the other way round), 'cosine'
                      (down to zero) or 'constant'
    warm_up           share of the steps in which the rate rises; None: 0.3 for one-cycle, else none
    momentum          of SGD, or AdamW's first beta; what one-cycle starts from is a little more
    weight_decay      on weights alone: norms, biases and whatever has one dimension are exempt
    decay_embeddings  whether weights of embeddings decay, too
    clip              largest norm of all gradients together; 0 leaves them as they are
    average           decay of an exponential moving average of the weights by step (0.999, say); 0 keeps none
    deliver           'best' on validation data of the weights and their average, 'last', or 'average'. Where nothing is
                      validated the best is the average if one is kept, else the last.
    validate_every    epochs between validations; the end is always validated
    patience          validations without a better one after which training stops; None trains to the end
    rollbacks         how often a diverging training is taken back to its last good state, at half the learning rate
    """

    epochs: float = 3.0
    optimizer: Optimizer = "muon"
    learning_rate: float = 0.02
    schedule: Shape = "one-cycle"
    warm_up: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_embeddings: bool = True
    clip: float = 5.0
    average: float = 0.0
    deliver: Deliver = "best"
    validate_every: float = 1.0
    patience: int | None = None
    rollbacks: int = 5

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("epochs", "weight_decay", "clip"):
            _require(self, name, 0 <= getattr(self, name) < math.inf, "at least 0")
        for name in ("learning_rate", "validate_every"):
            _require(self, name, 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("momentum", "average"):
            _require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        _require(self, "warm_up", self.warm_up is None or 0 <= self.warm_up < 1, "at least 0 and below 1")
        _require(self, "patience", self.patience is None or self.patience >= 1, "at least 1, or None")
        _require(self, "rollbacks", self.rollbacks >= 0, "at least 0")
        _require(self, "deliver", self.deliver != "average" or self.average > 0, "another, as no average is kept")

    @property
    def warm_up_share(self) -> float:
        return WARM_UP[self.schedule] if self.warm_up is None else self.warm_up


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a training may use. None of this is meant to change what is learned, beyond rounding.

    device              'auto' (the first CUDA device if there is one, else the processor) or a device's name
    precision           'auto' (see `placement.precision_of`), 'float32' or 'bfloat16'
    micro_batch         samples at a time; gradients of a batch's parts are added up. None: as many as fit in memory
    memory_bytes        what a step may take, 0: what the device has free
    checkpoint          file to which the state is written and from which training goes on; None: none is kept. It
                        stays, with the finished training in it, until the caller removes it.
    checkpoint_seconds  between two of them
    accelerator         an `accelerate.Accelerator` where several processes train together, a GPU each
    """

    device: str = "auto"
    precision: Precision = "auto"
    micro_batch: int | None = None
    memory_bytes: int = 0
    checkpoint: Path | None = None
    checkpoint_seconds: float = 120.0
    accelerator: Any = None

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self, "micro_batch", self.micro_batch is None or self.micro_batch >= 1, "at least 1, or None")
        _require(self, "memory_bytes", self.memory_bytes >= 0, "at least 0")
        _require(self, "checkpoint_seconds", self.checkpoint_seconds >= 0, "at least 0")


def parse_training(text: str, *, epochs: float) -> Training:
    """`optimizer=adamw,learning_rate=0.0005,average=0.999`: fields of `Training`, the others as they are by default,
    which for AdamW is a learning rate of 0.001. Raises InputError."""
    hints = {name: hint for name, hint in get_type_hints(Training).items() if name != "epochs"}
    given: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in hints:
            there = f"there are: {', '.join(hints)}{did_you_mean(name, hints)}"
            raise InputError(f"training {text!r}: unknown setting {name!r}; {there}")
        given[name] = _read(hints[name], value, f"training {text!r}: {name}")
    if given.get("optimizer") == "adamw":
        given.setdefault("learning_rate", ADAMW_RATE)
    return Training(epochs=epochs, **given)


def _read(hint: Any, value: str, what: str) -> Any:
    """A setting as its field has it. Raises InputError."""
    kinds = get_args(hint) or (hint,)
    if isinstance(kinds[0], str):
        return value  # checked by `Training`
    if type(None) in kinds and value == "none":
        return None
    if kinds[0] is bool and value in ("true", "false"):
        return value == "true"
    try:
        if kinds[0] is not bool:
            return kinds[0](value)
    except ValueError:
        pass
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kinds[0]]
    raise InputError(f"{what} must be {wanted}, found {value!r}")


def _check_choices(settings: Any) -> None:
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        choices = get_args(hints[field.name])
        if choices and all(isinstance(choice, str) for choice in choices):
            found = getattr(settings, field.name)
            near = did_you_mean(found, choices) if isinstance(found, str) else ""
            _require(settings, field.name, found in choices, f"one of {', '.join(choices)}", near)


def _require(settings: Any, name: str, holds: bool, what: str, near: str = "") -> None:
    if not holds:
        raise InputError(f"training: {name} must be {what}, found {getattr(settings, name)!r}{near}")
